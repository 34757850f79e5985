"""Settings to compare, and what `select` would keep under each."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from curate.ablate.students import Mitigation
from curate.config import describe_fault, nearest, read_yaml_file
from curate.engine.finished import open_room
from curate.errors import ConfigError
from curate.stages.base import Room
from curate.stages.select import Select, decide

__all__ = ["CONTROLS", "Decided", "Setting", "decide_all", "open_select", "propose", "read_grid"]

Array = np.ndarray[Any, Any]

#: What stands beside every setting, of as many samples as it keeps.
CONTROLS = ("random", "cosine")
#: Of the samples that the loosest setting keeps, the shares that the default grid drops.
_SHARES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
#: What a setting may change besides fields of `select`; all but the first is done in training.
_MIN_COSINE, _WEIGHTED, _MITIGATION = "dedup.min_cosine", "load.weighted", "mitigation."
_WHILE_TRAINING = (_WEIGHTED, *(f"{_MITIGATION}{part.name}" for part in fields(Mitigation)))
_OTHERS = (_MIN_COSINE, *_WHILE_TRAINING)
#: The least and the largest value.
_LIMITS = {
    _MIN_COSINE: (0, 1), "mitigation.noise": (0, 10), "mitigation.captions": (1, 100),
    "mitigation.text_mask": (0, 0.9),
}  # fmt: skip
_WHOLE = ("mitigation.captions",)


@dataclass(frozen=True)
class Setting:
    """One point of the grid.

    Parameters
    ----------
    values : dict of str to value
        By the name that `--set` gives it. `load.weighted` and `mitigation.FIELD`, see
        `Mitigation`, are no parameters of a run: they are done while the model trains.
    """

    values: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As one line, in the form of `--set`."""
        return self._line(list(self.values)) or "as the run is"

    @property
    def training(self) -> str:
        """What is done while a model trains, as one line."""
        return self._line([name for name in self.values if name in _WHILE_TRAINING])

    def _line(self, names: Sequence[str]) -> str:
        return " ".join(f"{name}={_show(self.values[name])}" for name in names)

    @property
    def options(self) -> str:
        """What to add to `curate run`; what is no parameter of a run is left out."""
        kept = {n: v for n, v in self.values.items() if n not in _WHILE_TRAINING}
        return " ".join(
            f"--set {shlex.quote(f'{name}={_show(value)}')}" for name, value in kept.items()
        )

    @property
    def mitigation(self) -> Mitigation:
        """What students do besides."""
        given = {
            n.removeprefix(_MITIGATION): v
            for n, v in self.values.items()
            if n.startswith(_MITIGATION)
        }
        return Mitigation(**given)

    @property
    def weighted(self) -> bool | None:
        """Whether samples are drawn by their weights; None where the setting does not say."""
        return self.values.get(_WEIGHTED)

    def stage(self, base: Select) -> Select:
        """Return `select` as the setting has it."""
        changed = {n.partition(".")[2]: v for n, v in self.values.items() if n not in _OTHERS}
        return Select(**{**base.model_dump(), **changed})


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Decided:
    """What a setting keeps.

    Parameters
    ----------
    setting : Setting
    keep : (N,) bool
    weight : (N,) float64
        0 where dropped.
    dropped : dict of str to int
        By reason.
    captions : (M, 2) int64
        Rows that are kept and have a caption, ascending, and rows whose captions they have, their
        own first.
    """

    setting: Setting
    keep: Array
    weight: Array
    dropped: dict[str, int]
    captions: Array


def open_select(out: str, run: dict[str, Any]) -> Room:
    """Return the room of a finished run's `select`, from which others decide anew.

    Raises
    ------
    OutputError
        If the run has no decisions.
    """
    room = open_room(out, run)
    given = run["stages"]["select"].get("parameters", {})
    fields: dict[str, Any] = {n: v for n, v in given.items() if n in Select.model_fields}
    # Tables from outside were joined by the run; where they lay is not part of its recipe.
    tables = fields.get("score_tables", ())
    fields["score_tables"] = tuple({"path": one["name"], **one} for one in tables)
    return replace(room, stage=Select(**fields))


def read_grid(path: str) -> list[Setting]:
    """Read a grid: a YAML list of mappings from `select.FIELD` and such to values.

    Raises
    ------
    ConfigError
        If it cannot be read, is no such list, or holds fewer than two settings.
    """
    found = read_yaml_file(path, "--grid")
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ConfigError(
            f"{path}: must be a list of settings, each a mapping such as "
            "`- {select.max_mismatch_rate: 0.05}`; it is not. Mend it."
        )
    try:
        json.dumps(found)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: must hold numbers, texts, true, false, null and lists of them; {error}. "
            "Mend it."
        ) from error
    settings = [Setting({str(name): value for name, value in one.items()}) for one in found]
    for setting in settings:
        _check_names(path, setting)
    names = [setting.name for setting in settings]
    if len(set(names)) < max(2, len(names)):
        raise ConfigError(
            f"{path}: must hold at least two settings, all different, for one to be better; got "
            f"{len(names)}, {len(set(names))} different. Add one, e.g. "
            "`- {select.max_mismatch_rate: null}`."
        )
    return settings


def _check_names(path: str, setting: Setting) -> None:
    known = [*(f"select.{name}" for name in Select.model_fields), *_OTHERS]
    for name, value in setting.values.items():
        if name not in known:
            near = nearest(name, known) or " Choose select.FIELD, " + " or ".join(_OTHERS) + "."
            raise ConfigError(f"{path}: {name!r} is no parameter that can be compared.{near}")
        if name == _WEIGHTED and not isinstance(value, bool):
            raise ConfigError(f"{path}: {name} must be true or false; got {value!r}.")
        low, high = _LIMITS.get(name, (None, None))
        kinds = int if name in _WHOLE else int | float
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if low is not None and not (is_number and low <= value <= high):
            what = "a whole number in" if name in _WHOLE else "in"
            raise ConfigError(f"{path}: {name} must be {what} [{low}, {high}]; got {value!r}.")


def propose(room: Room) -> list[Setting]:
    """Return the default grid: rates of mismatch that drop from nothing to two fifths.

    Raises
    ------
    ConfigError
        If the run has no probabilities of mismatch.
    """
    column, loosest = "mismatch_probability", Setting({"select.max_mismatch_rate": None})
    shards = room.shards() if room.has(column) else []
    values = [room.read(s, [column])[column].to_numpy(zero_copy_only=False) for s in shards]
    probability = np.concatenate(values).astype(float) if values else np.zeros(0)
    if not np.isfinite(probability).any():
        raise ConfigError(
            "--grid: must be given where a run has no probabilities of mismatch; this one has none "
            "(no `score`, or fewer samples than score.min_samples). Name a grid."
        )
    keep = decide_all(room, [loosest])[0].keep
    kept = np.sort(probability[keep & np.isfinite(probability)])
    means = np.cumsum(kept) / np.arange(1, len(kept) + 1)
    rates = [float(f"{means[round(len(kept) * (1 - s)) - 1]:.4g}") for s in _SHARES[1:]]
    return [loosest, *(Setting({"select.max_mismatch_rate": rate}) for rate in rates)]


def decide_all(room: Room, settings: Sequence[Setting]) -> list[Decided]:
    """Let `select` decide anew under each setting; the run's own tables stay as they are.

    Parameters
    ----------
    room : Room
        See `open_select`.
    settings : sequence of Setting

    Returns
    -------
    list of Decided
        In the order of the settings.

    Raises
    ------
    ConfigError
        If a value does not hold, or a column is asked for that the run does not have.
    """
    return [_decide(room, setting) for setting in settings]


def _decide(room: Room, setting: Setting) -> Decided:
    base = room.find(Select)
    try:
        stage = setting.stage(base)
    except ValidationError as error:
        raise ConfigError(f"--grid: {describe_fault(error, 'select')}. Correct it.") from error
    _check_columns(room, base, stage)
    least = setting.values.get(_MIN_COSINE)
    if least is not None and not room.has("cluster_id"):
        raise ConfigError(f"--grid: {_MIN_COSINE} needs a run with `dedup`; this one has none.")
    decisions, _ = decide(replace(room, stage=stage), least)
    weight = np.asarray(decisions.weight, np.float64)
    dropped, captions = decisions.counts()["counts"]["dropped"], np.stack(decisions.merged, 1)
    return Decided(setting, decisions.walk.kept, weight, dropped, captions)


def _check_columns(room: Room, base: Select, stage: Select) -> None:
    outside = base.outside_columns()
    for column in (*stage.reads(), *stage.outside_columns()):
        if column in outside or ("." not in column and room.has(column)):
            continue
        raise ConfigError(
            f"--grid: {column} must be a column that the run has read; it has not. Name it in a "
            "rule of the run first, or leave it out."
        )
