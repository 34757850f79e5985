"""Does `curate ablate` say more than it knows? `python -m benchmarks.gate`.

Outcomes of settings are drawn from a model with known parts: what varies with the held-out pair,
with the seed, and with both. Prints one JSON line: by how much a training varies with its seed (in
standard errors that the pairs of one seed alone give), how often a setting is called better where
none is (at most .05 is asked), and how often one that gains three such errors is; where all seeds
are judged by the same pairs, and where each is by its own.
"""

import json
from itertools import product
from typing import Any

import click
import numpy as np

from curate.ablate.verdict import recommend

_PAIRS, _SEEDS = 1000, 3
#: Standard deviations of a setting's outcome by pair, and by pair and seed: half a hit or so.
_BY_PAIR, _BY_BOTH = 0.14, 0.22
_BY_SEED = (0.0, 0.5, 1.0, 2.0)
_GAIN = 3.0


def _draw(
    rng: np.random.Generator, settings: int, by_seed: float, gain: float, apart: bool
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number in range(settings):
        drawn = rng.normal(size=(_SEEDS if apart else 1, _PAIRS))
        own = _BY_PAIR * np.broadcast_to(drawn, (_SEEDS, _PAIRS)) + gain * (number == settings // 2)
        found[str(number)] = {
            seed: own[seed] + _BY_BOTH * rng.normal(size=_PAIRS) + by_seed * rng.normal()
            for seed in range(_SEEDS)
        }
    return found


@click.command()
@click.option("--settings", default=9, show_default=True)
@click.option("--draws", default=1000, show_default=True)
def main(settings: int, draws: int) -> None:
    """Count how often a setting is called better."""
    rng, error = np.random.default_rng(0), _BY_PAIR * (2 / _PAIRS) ** 0.5
    rows = []
    for apart, times in product((False, True), _BY_SEED):
        row = {"apart": apart, "by_seed": times}
        for name, gain in (("called_better_of_none", 0.0), ("found", _GAIN * error)):
            called = 0
            for _ in range(draws):
                scores = _draw(rng, settings, times * error, gain, apart)
                called += recommend(scores, list(scores), apart).is_better
            row[name] = round(called / draws, 3)
        rows.append(row)
    click.echo(json.dumps({"settings": settings, "seeds": _SEEDS, "pairs": _PAIRS, "rows": rows}))


if __name__ == "__main__":
    main()
