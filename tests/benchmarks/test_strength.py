"""Scores over encoders of several strengths."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import memorization, strength
from benchmarks.methods import METHODS
from benchmarks.strength import OWN_COSINE, PACKAGED, SCORED, measure, summarize, write_table
from benchmarks.trial import Corpus
from tests.benchmarks.corpus import make_painted


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Corpus]:
    out = tmp_path_factory.mktemp("out")
    # Towers that know next to nothing: what is left of their vectors is noise.
    corpus = make_painted(out, 1400)
    noise = np.random.default_rng(0).normal(size=(2, 1400, 64)).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=2, keepdims=True)
    return out, corpus.with_vectors(noise[0], np.pad(noise[1], ((0, 0), (0, 320))))


def test_an_encoder_trained_on_others_sees_more(
    painted: tuple[Path, Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {name: METHODS[name] for name in ("random", "left-out cosine", "ours", "oracle")}
    for module in (memorization, strength):
        monkeypatch.setattr(module, "METHODS", kept)
    out, corpus = painted
    corpus = Corpus(**{**vars(corpus), "shared": False})
    result = measure(out, corpus, (1, 12), 0.2, 0)
    assert list(result) == [PACKAGED, "1 epochs on others", "12 epochs on others", SCORED]
    assert OWN_COSINE not in result[PACKAGED]
    assert result[PACKAGED]["ours"]["auroc"] == pytest.approx(0.5, abs=0.1)
    trained = result["12 epochs on others"]
    assert trained["ours"]["auroc"] > 0.75
    assert trained[OWN_COSINE]["auroc"] > 0.75
    # A model that was shown the wrong captions finds them less wrong.
    assert result[SCORED][OWN_COSINE]["auroc"] < trained[OWN_COSINE]["auroc"]
    assert all(row["oracle"]["precision"] == 1 for row in result.values())
    table = write_table(summarize([result, result])).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert f"| {OWN_COSINE} | - |" in table[-1]
