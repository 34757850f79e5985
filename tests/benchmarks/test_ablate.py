"""How settings found by one size of student hold for another."""

from typing import Any

import pytest

from benchmarks.ablate import compare_models

SHARES = (0.0, 0.1, 0.2, 0.3)


def report(gains: list[float], recommended: int) -> dict[str, Any]:
    """What `curate ablate --json` prints, as far as it is read."""
    rows = [
        {"name": f"drops {share}", "kind": "setting", "figures": {"all": {"gain": gain}}}
        for share, gain in zip(SHARES, gains, strict=True)
    ]
    control = {"name": "random", "kind": "random", "figures": {"all": {"gain": -1.0}}}
    chosen = {"name": rows[recommended]["name"], "share_dropped": SHARES[recommended]}
    return {"lines": [*rows, control], "recommended": chosen}


def test_every_two_models_are_compared() -> None:
    reports = {
        "small": report([0.0, 0.01, 0.03, 0.02], 2),
        "large": report([0.0, 0.02, 0.05, 0.03], 2),
        "larger": report([0.0, 0.04, 0.03, 0.01], 1),
    }
    found = compare_models(reports)
    assert list(found) == ["small large", "small larger", "large larger"]
    assert found["small large"] == {
        "rank_correlation": 1.0, "recommended": [0.2, 0.2], "lost": [0.0, 0.0],
    }  # fmt: skip
    other = found["small larger"]
    assert other["rank_correlation"] == pytest.approx(0.4)
    assert other["recommended"] == [0.2, 0.1]
    assert other["lost"] == [0.02, 0.01]


def test_one_model_is_compared_with_none_and_equal_gains_have_no_rank() -> None:
    flat, steep = report([0.0] * 4, 0), report([0.0, 0.1, 0.2, 0.3], 3)
    assert compare_models({"small": flat}) == {}
    assert compare_models({"small": flat, "large": steep})["small large"] == {
        "rank_correlation": None, "recommended": [0.0, 0.3], "lost": [0.0, 0.3],
    }  # fmt: skip
