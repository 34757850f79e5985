"""Retrieval among pairs that can be told by eye."""

import numpy as np

from curate.memorization.retrieval import hits_at


def test_a_pair_of_equal_caption_is_a_hit() -> None:
    queries, targets = np.eye(3), np.eye(3)[[1, 0, 2]]
    assert hits_at(queries, targets, np.array(["a", "b", "c"]), 1).tolist() == [False, False, True]
    assert hits_at(queries, targets, np.array(["a", "a", "c"]), 1).all()
    assert hits_at(queries, targets, np.array(["a", "b", "c"]), 3).all()
