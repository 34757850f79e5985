"""Which students are trained: settings and their controls, seed by seed, losers no longer."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from curate import storage
from curate.ablate.grid import CONTROLS, Decided
from curate.ablate.pairs import Pairs
from curate.ablate.students import Mitigation, train_student
from curate.ablate.verdict import LEAST_SEEDS, is_loser
from curate.engine.export import Mapper
from curate.engine.manifest import fingerprint
from curate.engine.runner import Progress
from curate.errors import ConfigError
from curate.memorization.folds import hash_unit

__all__ = ["Line", "Pool", "Rounds", "Training", "plan_lines"]

Array = np.ndarray[Any, Any]


class Pool(Mapper, Protocol):
    """Whatever maps a function over tasks and knows how many run at once, as `Workers` does."""

    def planned(self) -> int:
        """Tasks that run at once; an estimate before anything was started."""


@dataclass(frozen=True)
class Training:
    """What a setting leaves to train on.

    Parameters
    ----------
    decided : Decided
    places : (K,) int64
        In the pool. A student leaves out those that its seed holds out.
    weight : (K,) float64
    trained_on : int
        Places that the first seed's students train on.
    size : int
        Samples of the whole run that are kept.
    captions : (M, 2) int64
        Places, ascending, and places whose captions they may have.
    """

    decided: Decided
    places: Array
    weight: Array
    trained_on: int
    size: int
    captions: Array


@dataclass
class Line:
    """A setting, or a control of as many samples, and its students' outcomes.

    Parameters
    ----------
    name : str
    kind : {"setting", "random", "cosine"}
    training : Training
        For a control the setting whose size it has.
    stopped : bool
        Clearly behind the best: got no further seeds.
    outcomes : dict of int to dict
        By seed, as `train_student` commits them.
    """

    name: str
    kind: str
    training: Training
    stopped: bool = False
    outcomes: dict[int, dict[str, Any]] = field(default_factory=dict)

    def scores(self, measure: str = "retrieval") -> dict[int, Array]:
        """Outcomes of a seed's held-out pairs by seed: (H,) float64."""
        if measure == "zero_shot":
            return {seed: np.array(one[measure], float) for seed, one in self.outcomes.items()}
        return {
            seed: (np.array(one["image_to_text"]) + np.array(one["text_to_image"])) / 2
            for seed, one in self.outcomes.items()
        }


def plan_lines(
    decided: Sequence[Decided], pairs: Pairs, weighted: bool, controls: bool, seeds: int
) -> list[Line]:
    """Return all lines, settings first and the loosest of them first.

    Raises
    ------
    ConfigError
        If a setting leaves too little, or all keep the same.
    """
    trainings = []
    for one in decided:
        kept, size = one.keep[pairs.rows], int(one.keep.sum())
        trained_on = [int((kept & pairs.trainable(seed)).sum()) for seed in range(seeds)]
        if min(trained_on) < 2:
            raise ConfigError(
                f"--grid: {one.setting.name} must keep something to train on; it keeps {size} "
                f"samples, {min(trained_on)} of them outside the held-out clusters. Loosen it."
            )
        places = np.flatnonzero(kept)
        by_weight = weighted if one.setting.weighted is None else one.setting.weighted
        weight = one.weight[pairs.rows][places] if by_weight else np.ones(len(places))
        trainings.append(Training(one, places, weight, trained_on[0], size, _captions(one, pairs)))
    trainings.sort(key=lambda training: -training.size)
    lines = [Line(own.decided.setting.name, "setting", own) for own in trainings]
    if len({_identity(line, trainings[0], 0) for line in lines}) < 2:
        raise ConfigError(
            "--grid: must hold settings that differ; on this run all keep the same samples. Widen "
            "it."
        )
    if controls:
        kinds = CONTROLS if pairs.cosine_column else CONTROLS[:1]
        for own in trainings:
            if len(own.places) < len(trainings[0].places):
                lines += [Line(f"{k} of {own.decided.setting.name}", k, own) for k in kinds]
    return lines


def _captions(decided: Decided, pairs: Pairs) -> Array:
    """Whose captions a setting's samples may have, as places in the pool: (M, 2) int64.

    Raises
    ------
    ConfigError
        If none may have more than its own.
    """
    most = decided.setting.mitigation.captions
    if most == 1:
        return np.zeros((0, 2), np.int64)
    place = np.full(len(decided.keep), -1)
    place[pairs.rows] = np.arange(len(pairs))
    known = place[decided.captions]
    known = known[(known >= 0).all(1)]
    known = known[np.argsort(known[:, 0], kind="stable")]
    rank = np.arange(len(known)) - np.searchsorted(known[:, 0], known[:, 0])
    if not rank.any():
        raise ConfigError(
            f"--grid: {decided.setting.name}: mitigation.captions needs samples with the captions "
            "of dropped duplicates; this run has none. Leave it out."
        )
    return known[rank < most]


def _members(line: Line, loosest: Training, pairs: Pairs, seed: int) -> tuple[Array, Array]:
    """Places in the pool, ascending, and weights."""
    if line.kind == "setting":
        return line.training.places, line.training.weight
    count = len(line.training.places)
    if line.kind == "random":
        uids = [pairs.uids[place] for place in loosest.places]
        ranks = hash_unit(uids, seed, "ablate random")
    else:
        ranks = np.nan_to_num(-pairs.cosine[loosest.places], nan=np.inf)
    chosen = np.sort(loosest.places[np.argsort(ranks, kind="stable")[:count]])
    return chosen, np.ones(count)


def _identity(line: Line, loosest: Training, seed: int) -> str:
    """Name what a line's student trains on; equal for lines that keep the same.

    Controls are drawn from what the `loosest` setting keeps.
    """
    drawn: Any = 0
    if line.kind != "setting":
        drawn = [seed if line.kind == "random" else 0, loosest.places.tolist()]
    training, mitigation = line.training, _mitigation(line)
    numbers = fingerprint([training.places.tolist(), np.round(training.weight, 6).tolist()])
    captions = training.captions.tolist() if mitigation.captions > 1 else []
    return fingerprint([numbers, line.kind, drawn, asdict(mitigation), captions])


def _mitigation(line: Line) -> Mitigation:
    """Controls are trained plainly."""
    return line.training.decided.setting.mitigation if line.kind == "setting" else Mitigation()


class Rounds:
    """Trains students and decides, between rounds, who gets another seed.

    Parameters
    ----------
    lines : list of Line
        See `plan_lines`.
    pairs : Pairs
    folder : str
        See `commit_data`.
    seeds : int
        At most, per line.
    """

    def __init__(self, lines: list[Line], pairs: Pairs, folder: str, seeds: int) -> None:
        self.lines, self._pairs, self._folder, self._seeds = lines, pairs, folder, seeds

    @property
    def settings(self) -> list[Line]:
        """Without controls, the loosest first."""
        return [line for line in self.lines if line.kind == "setting"]

    def tasks(self, seeds: Sequence[int]) -> dict[str, list[tuple[Line, int]]]:
        """Students of the lines that go on, by task: one may stand for several lines."""
        found: dict[str, list[tuple[Line, int]]] = {}
        for seed in seeds:
            for line in self.lines:
                if not line.stopped:
                    task = f"{_identity(line, self.settings[0].training, seed)}-{seed}"
                    found.setdefault(task, []).append((line, seed))
        return found

    def path(self, task: str) -> str:
        """Where a student's outcome is committed."""
        return storage.join(self._folder, "students", f"{task}.json")

    def missing(self, tasks: Sequence[str]) -> list[str]:
        """Tasks that no earlier call has finished."""
        return [task for task in tasks if not storage.exists(self.path(task))]

    def run(self, workers: Pool, progress: Progress) -> None:
        """Train everything; first as many seeds as a comparison takes, then one at a time."""
        first = min(LEAST_SEEDS, self._seeds)
        rounds = [tuple(range(first)), *((seed,) for seed in range(first, self._seeds))]
        for number, seeds in enumerate(rounds):
            self._stop_losers()
            tasks = self.tasks(seeds)
            missing = self.missing(list(tasks))
            for task in missing:
                self._commit_set(task, *tasks[task][0])
            name = f"round {number + 1}"
            progress.begin("ablate", name, len(tasks), len(tasks) - len(missing))
            for _, counts in workers.map(train_student, missing, self._folder):
                progress.advance(counts)
            progress.end()
            for task, owners in tasks.items():
                outcome = storage.read_json(self.path(task))
                for line, seed in owners:
                    line.outcomes[seed] = outcome

    def _commit_set(self, task: str, line: Line, seed: int) -> None:
        places, weight = _members(line, self.settings[0].training, self._pairs, seed)
        chosen = np.zeros(len(places), [("place", "<i8"), ("weight", "<f8")])
        chosen["place"], chosen["weight"] = places, weight
        name = storage.join(self._folder, "sets", task.rsplit("-", 1)[0])
        storage.commit_array(f"{name}.npy", chosen)
        storage.commit_array(f"{name}-captions.npy", line.training.captions)
        storage.commit_json(f"{name}.json", asdict(_mitigation(line)))

    def _stop_losers(self) -> None:
        """Give up settings that are clearly behind, and their controls with them."""
        settings = self.settings
        scores = {line.name: line.scores() for line in settings if line.outcomes}
        if not scores:
            return
        for line in settings:
            line.stopped = line.stopped or is_loser(
                scores, line.name, settings[0].name, self._pairs.apart
            )
        for line in self.lines:
            if line.kind != "setting":
                owner = next(one for one in settings if one.training is line.training)
                line.stopped = owner.stopped
