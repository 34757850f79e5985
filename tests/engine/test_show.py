"""What `curate show` prints of numbers."""

from curate.engine.show import describe_sample
from curate.schema import public_columns


def test_small_scores_are_told_as_on_the_page() -> None:
    found = dict.fromkeys(public_columns("decisions")) | {
        "uid": "0" * 32,
        "keep": True,
        "weight": 1.0,
        "source": {"file": "0.tar", "key": "a"},
        "captions": [],
        "cluster": [],
        "rules": [],
        "mismatch_probability": 5.61e-7,
        "mismatch_probability_stderr": 1.94e-7,
        "rarity": 0.95351,
    }
    lines = describe_sample(found, "OUT").splitlines()
    (told,) = (line.split() for line in lines if "mismatch_probability" in line)
    assert told[1:4] == ["5.6e-07", "±", "1.9e-07"]
    (told,) = (line.split() for line in lines if "rarity" in line)
    assert told[1] == "0.9535"
