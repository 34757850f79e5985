"""Deja vu: a caption that leads to pictures of what its own shows beyond what it says."""

import numpy as np
import pytest

from curate.audit.recall import Recall, measure_recall

COUNT, CLASSES, WIDTH = 400, 20, 64

Side = tuple[np.ndarray, np.ndarray, np.ndarray]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Planted:
    """Pictures of one object each; captions say nothing of it."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._axes = unit(self._rng.normal(size=(CLASSES, WIDTH)))
        self.shown = self._rng.integers(0, CLASSES, (2, COUNT))
        self.objects = tuple(np.eye(CLASSES, dtype=bool)[side] for side in self.shown)
        self.public = np.arange(COUNT) % 2 == 0

    def side(self, knows: float) -> Side:
        """A model whose captions of candidates hold so much of what their pictures show."""
        noise = self._rng.normal(size=(3, COUNT, WIDTH)) / WIDTH**0.5
        candidates = knows * self._axes[self.shown[0]] + noise[0]
        images = self._axes[self.shown[1]] + noise[2]
        return unit(candidates), unit(noise[1]), unit(images)

    def measure(self, model: Side, other: Side) -> Recall:
        names = np.arange(COUNT)
        return measure_recall(model, other, "reference", self.objects, names, self.public)


def test_what_only_the_model_recalls_is_deja_vu() -> None:
    planted = Planted()
    found = planted.measure(planted.side(1.0), planted.side(0.0))
    assert found.k == 4  # two in a hundred of the public ones
    assert found.gaps["ppg"] > 0.5
    assert found.gaps["prg"] > 0.5
    # Captions that no model has seen recall nothing, under neither.
    assert abs(found.gaps["ppg_held_out"]) < 0.1
    assert found.gaps["ppg_excess"]["low"] > 0.4
    assert found.precision.mean() > 0.8
    # By chance a picture shows one of twenty objects.
    assert found.reference_precision.mean() == pytest.approx(1 / CLASSES, abs=0.02)


def test_nothing_is_deja_vu_where_both_recall_alike() -> None:
    planted = Planted()
    for knows in (0.0, 0.5):
        found = planted.measure(planted.side(knows), planted.side(knows))
        for name in ("ppg_excess", "prg_excess"):
            assert abs(found.gaps[name]["mean"]) < 3 * found.gaps[name]["stderr"]
    same = planted.side(0.5)
    assert planted.measure(same, same).gaps["ppg"] == 0
