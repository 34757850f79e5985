"""`curate ablate`: how hard to filter the data of a finished run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from curate import storage
from curate.ablate.grid import Setting, decide_all, open_select, propose, read_grid
from curate.ablate.labels import read_labels, read_uids
from curate.ablate.pairs import Pairs, choose_pairs, limit_share
from curate.ablate.rounds import Line, Pool, Rounds, plan_lines
from curate.ablate.students import MODELS, Budget, Labels, commit_data, measure_cost
from curate.ablate.verdict import LEAST_SEEDS, Difference, compare, pool_seeds, recommend
from curate.engine.finished import read_finished
from curate.engine.manifest import fingerprint
from curate.engine.runner import Progress, lock_output
from curate.errors import ConfigError, InputError
from curate.report.ablate_page import render_ablation
from curate.report.plain import read_style

__all__ = ["Request", "ablate", "describe_cost", "imports_of", "page_of"]

Array = np.ndarray[Any, Any]

_VERSION = 3
#: Tables of the run that students see.
_SEEN = ("ingest", "embed.vectors", "embed.thumbnails", "dedup")
#: With fewer samples a student learns too little to tell settings apart.
_FEW = 500


@dataclass(frozen=True)
class Request:
    """What to compare, and how.

    Parameters
    ----------
    out : str
        A finished run.
    grid : str or None
        See `read_grid`; default: rates of mismatch, see `propose`.
    model : str
        "small", "large" or, for a GPU, "larger": CLIPs trained end to end on thumbnails; "heads":
        over the run's vectors.
    labels : str or None
        See `read_labels`.
    held_out : float
        Share of the clusters that judges a seed's students, another for each seed; at most
        1 / `seeds`, and a plan's warning where that is less than asked.
    held_out_list : str or None
        Names the pairs that judge all instead, see `read_uids`.
    limit : int
        Samples of the pool at most.
    seeds : int
        Per setting at most.
    epochs : float or None
        Passes over what the loosest setting keeps that every student's steps are worth.
    weighted : bool
        Draw samples by the weight that `select` gives them, which by itself makes little of what
        is probably mismatched; where a setting does not say otherwise.
    controls : bool
        Random and cosine-filtered sets of each size.
    seed : int
        Draws pool and held-out pairs.
    plan : bool
        Only say how long it would take.
    """

    out: str
    grid: str | None = None
    model: str = "small"
    labels: str | None = None
    held_out: float = 0.15
    held_out_list: str | None = None
    limit: int = 20_000
    seeds: int = 3
    epochs: float | None = None
    weighted: bool = False
    controls: bool = True
    seed: int = 0
    plan: bool = False


def imports_of(model: str) -> tuple[str, ...]:
    """Modules that training such a model takes seconds to import, for workers to share."""
    return ("curate.models.train" if model == "heads" else "curate.models.train_clip",)


def ablate(request: Request, workers: Pool, progress: Progress) -> dict[str, Any]:
    """Compare settings; write OUT/ablate unless only a plan was asked for.

    Parameters
    ----------
    request : Request
    workers : Pool
        Started only if a student is to be trained.
    progress : Progress

    Returns
    -------
    dict
        `plan` (`students`, `missing`, `steps`, `batch`, `seconds_each`, `minutes`, `at_once`,
        `warnings`), and without `request.plan` `lines`, `recommended`, `warnings` and what was
        compared on.

    Raises
    ------
    CurateError
        One line on what is wrong with the request or the run.
    """
    run = read_finished(request.out)
    if request.seeds < LEAST_SEEDS:
        raise ConfigError(
            f"--seeds: must be at least {LEAST_SEEDS}, for the noise between trainings to be "
            f"known; got {request.seeds}."
        )
    with lock_output(request.out):
        return _ablate(request, run, workers, progress)


def _ablate(
    request: Request, run: dict[str, Any], workers: Pool, progress: Progress
) -> dict[str, Any]:
    room = open_select(request.out, run)
    settings = propose(room) if request.grid is None else read_grid(request.grid)
    _check_heads(request.model, settings)
    _check_cosines(run, settings)
    named = None if request.held_out_list is None else read_uids(request.held_out_list)
    pairs = choose_pairs(room, request.held_out, request.limit, request.seed, request.seeds, named)
    labels = _read_labels(request, run, pairs)
    decided = decide_all(room, settings)
    lines = plan_lines(decided, pairs, request.weighted, request.controls, request.seeds)
    budget = _budget(request, lines[0])
    folder = storage.join(request.out, "ablate", f"work-{_identity(request, run, budget, pairs)}")
    rounds = Rounds(lines, pairs, folder, request.seeds)
    tasks = rounds.tasks(range(request.seeds))
    missing = rounds.missing(list(tasks))
    warnings: list[str] = []
    if missing:
        warnings = commit_data(room, pairs, budget, labels, folder)
    plan = _plan(budget, tasks, missing, folder, lines[0], workers.planned())
    plan["warnings"] = _warn_of_share(request)
    if request.plan:
        _clear(folder)
        return {"plan": plan}
    progress.note(describe_cost(plan))
    rounds.run(workers, progress)
    report = {
        "out": request.out,
        "model": request.model,
        "plan": plan,
        "pool": len(pairs),
        "held_out": len(pairs.held(0)),
        "apart": pairs.apart,
        "cosine_column": pairs.cosine_column,
        "warnings": [*warnings, *_warn(lines)],
        **_summarize(lines, pairs, labels),
    }
    _write(request.out, report)
    _clear(folder)
    return report


def _check_heads(model: str, settings: Sequence[Setting]) -> None:
    for setting in settings:
        asked = setting.mitigation
        for name in ("noise", "text_mask"):
            if model == "heads" and getattr(asked, name):
                raise ConfigError(
                    f"--model heads: knows no mitigation.{name}. Leave it out of the grid, or take "
                    "another model."
                )


def _check_cosines(run: dict[str, Any], settings: Sequence[Setting]) -> None:
    """Refuse what asks for pairs that the run has not searched for."""
    searched = run["stages"].get("dedup", {}).get("parameters", {}).get("min_cosine", 0)
    for setting in settings:
        asked = setting.values.get("dedup.min_cosine", searched)
        if asked < searched:
            raise ConfigError(
                f"--grid: dedup.min_cosine must be at least {searched}, from which the run looked "
                f"for copies; got {asked}. Raise it, or run with less first."
            )


def _read_labels(request: Request, run: dict[str, Any], pairs: Pairs) -> Labels | None:
    if request.labels is None:
        return None
    judges = np.flatnonzero(pairs.judges)
    names, known = read_labels(request.labels, [pairs.uids[place] for place in judges])
    places = np.full(len(pairs), -1)
    places[judges] = known
    fewest = min(int((places[pairs.held(s)] >= 0).sum()) for s in range(request.seeds))
    if fewest < 2:
        raise InputError(
            f"--labels {request.labels}: must label at least two of the pairs that judge each "
            f"seed; got {fewest}. Label more, or name those that judge by --held-out-list."
        )
    parameters = run["stages"]["embed.vectors"].get("parameters", {})
    return Labels(names, places, str(parameters.get("encoder", "")))


def _budget(request: Request, loosest: Line) -> Budget:
    epochs, batch = MODELS[request.model]
    epochs = epochs if request.epochs is None else request.epochs
    samples = loosest.training.trained_on
    batch = min(batch, max(2, samples // 4))
    return Budget(request.model, max(1, round(epochs * samples / batch)), batch)


def _identity(request: Request, run: dict[str, Any], budget: Budget, pairs: Pairs) -> str:
    """Everything that a student's outcome depends on besides its set and seed."""
    tables = {name: table["fingerprint"] for name, table in run["stages"].items()}
    made_of = [tables.get(name) for name in _SEEN]
    labels = None
    if request.labels is not None:
        labels = fingerprint(storage.read_bytes(request.labels).hex())
    pool = fingerprint([pairs.uids, pairs.held_by.tolist(), pairs.judges.tolist()])
    return fingerprint([_VERSION, made_of, asdict(budget), pool, labels])


def _plan(
    budget: Budget,
    tasks: dict[str, Any],
    missing: list[str],
    folder: str,
    loosest: Line,
    count: int,
) -> dict[str, Any]:
    each = measure_cost(folder, loosest.training.places) if missing else 0.0
    return {
        "students": len(tasks),
        "missing": len(missing),
        "steps": budget.steps,
        "batch": budget.batch,
        "seconds_each": round(each, 2),
        "minutes": round(each * -(-len(missing) // max(1, count)) / 60, 1),
        "at_once": count,
    }


def page_of(out: str) -> str:
    """Where an ablation's page lies."""
    return storage.join(out, "ablate", "index.html")


def describe_cost(plan: dict[str, Any]) -> str:
    """Say what is to come, as one line, and a line for each warning of the plan."""
    done = plan["students"] - plan["missing"]
    told = (
        f"{plan['students']} students of {plan['steps']} steps of {plan['batch']} pairs"
        + (f", {done} of them finished before" if done else "")
        + f": at most about {plan['minutes']:.1f} minutes, {plan['seconds_each']:.1f} s each, "
        f"{plan['at_once']} at once"
    )
    return "\n".join([told, *(f"Warning: {line}" for line in plan["warnings"])])


def _warn_of_share(request: Request) -> list[str]:
    most = limit_share(request.held_out, request.seeds)
    if request.held_out_list is not None or request.held_out == most:
        return []
    return [
        f"--held-out {request.held_out:g} is lowered to {most:.3g}: each of {request.seeds} seeds "
        "holds out clusters that no other does"
    ]


def _warn(lines: list[Line]) -> list[str]:
    return [
        f"{line.name}: keeps fewer than {_FEW} samples to train on"
        for line in lines
        if line.kind == "setting" and line.training.trained_on < _FEW
    ]


def _summarize(lines: list[Line], pairs: Pairs, labels: Labels | None) -> dict[str, Any]:
    settings = [line for line in lines if line.kind == "setting"]
    loosest = settings[0]
    chosen = recommend(
        {line.name: line.scores() for line in settings},
        [line.name for line in settings],
        pairs.apart,
    )
    parts: dict[str, Array | None] = {"all": None}
    if pairs.rare is not None:
        parts |= {
            name: part
            for name, part in (("rare", pairs.rare), ("rest", ~pairs.rare))
            # An interval takes two of each seed.
            if min(part[pairs.held(seed)].sum() for seed in loosest.outcomes) >= 2
        }
    labelled = None if labels is None else labels.places >= 0
    rows = []
    for line in lines:
        training = line.training
        figures = {
            name: _figures(line, settings, "retrieval", pairs, part) for name, part in parts.items()
        }
        if all("zero_shot" in one for one in (*line.outcomes.values(), *loosest.outcomes.values())):
            figures["zero_shot"] = _figures(line, settings, "zero_shot", pairs, labelled)
        row = {
            "name": line.name,
            "kind": line.kind,
            "kept": training.size,
            "trained_on": training.trained_on,
            "share_dropped": 1 - training.size / loosest.training.size,
            "seeds": len(line.outcomes),
            "stopped": line.stopped,
            "figures": figures,
        }
        if line.kind == "setting":
            row |= {"values": training.decided.setting.values, "dropped": training.decided.dropped}
        rows.append(row)
    of = {row["name"]: row for row in rows}
    best = next(line for line in settings if line.name == chosen.name)
    compared = chosen.comparisons
    return {
        "lines": rows,
        "recommended": {
            "name": chosen.name,
            "options": best.training.decided.setting.options,
            "training": best.training.decided.setting.training,
            "share_dropped": of[chosen.name]["share_dropped"],
            "best": chosen.best,
            "gain": _told(chosen.gain, compared),
            "is_better": chosen.is_better,
            "comparisons": compared,
            "rival": {
                "name": chosen.rival,
                **_told(chosen.rival_gain, compared),
                "needed": chosen.rival_gain.needed(compared),
            },
            "versus": _versus(best, lines, compared, pairs.apart),
        },
    }


def _told(difference: Difference, comparisons: int) -> dict[str, float]:
    """As plain values, with the interval."""
    low, high = difference.interval(comparisons)
    return {**asdict(difference), "low": low, "high": high}


def _versus(
    best: Line, lines: list[Line], comparisons: int, apart: bool
) -> dict[str, dict[str, float]]:
    """Compare the recommended setting, chosen among so many, with its own controls."""
    return {
        line.kind: _told(compare(best.scores(), line.scores(), apart=apart), comparisons)
        for line in lines
        if line.kind != "setting" and line.training is best.training
    }


def _figures(
    line: Line, settings: list[Line], measure: str, pairs: Pairs, part: Array | None
) -> dict[str, Any]:
    """Mean, and gain over the loosest setting with an interval of its own.

    `part` (N,) bool says which places in the pool count.
    """

    def scores(one: Line) -> dict[int, Array]:
        found = one.scores(measure)
        if part is None:
            return found
        return {seed: values[part[pairs.held(seed)]] for seed, values in found.items()}

    own = scores(line)
    noise = None
    if line.kind == "setting":  # a random control varies more: its set is drawn by seed
        noise = pool_seeds(map(scores, settings), pairs.apart)
    gain = compare(own, scores(settings[0]), noise, pairs.apart)
    low, high = gain.interval()
    return {
        "mean": float(np.mean([values.mean() for values in own.values()])),
        "gain": gain.mean,
        "stderr": gain.stderr,
        "low": low,
        "high": high,
    }


def _write(out: str, report: dict[str, Any]) -> None:
    folder = storage.join(out, "ablate")
    storage.commit_bytes(storage.join(folder, "report.css"), read_style())
    storage.commit_bytes(page_of(out), render_ablation(report))
    storage.commit_json(storage.join(folder, "ablate.json"), report)


def _clear(folder: str) -> None:
    """Leave the students' outcomes, by which a wider grid need not train them again."""
    for name in storage.list_names(folder):
        if name != "students":
            storage.remove(storage.join(folder, name))
