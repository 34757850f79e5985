"""Pipelines: YAML text to checked, frozen stages."""

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import ValidationError

from curate.errors import ConfigError
from curate.stages import STAGES
from curate.stages.base import Stage
from curate.stages.download import SHARED_WITH_INGEST, Download
from curate.stages.ingest import Ingest

__all__ = [
    "Pipeline",
    "describe_fault",
    "load_pipeline",
    "nearest",
    "parse_setting",
    "read_yaml",
    "read_yaml_file",
    "shipped_pipelines",
]


#: What pydantic calls by Python's names, by the type of its error.
_PLAIN_KINDS = {"tuple_type": "a list", "model_type": "a mapping", "dict_type": "a mapping"}


@dataclass(frozen=True)
class Pipeline:
    """Stages in order, and the text they came from.

    Parameters
    ----------
    name : str
        File name or shipped name.
    text : str
        YAML of all parameters, those of the command line included.
    stages : tuple of Stage
    """

    name: str
    text: str
    stages: tuple[Stage, ...]


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML with a key given twice as an error, and no booleans but `true` and `false`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# As YAML 1.2 has it: else the field `on` and Norwegian, `no`, would be true and false.
_BOOLEAN = "tag:yaml.org,2002:bool"
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOLEAN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    _BOOLEAN, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_yaml(text: str, where: str) -> Any:
    """Parse safe YAML.

    Raises
    ------
    ConfigError
        With the line of the fault.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{line}: must be valid YAML; {problem}. Mend it.") from error


def read_yaml_file(path: str, option: str) -> Any:
    """Parse safe YAML of a local file that an option names.

    Raises
    ------
    ConfigError
        If it cannot be read, or with the line of the fault.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{option} {path}: must be a readable YAML file; {_why_unread(error)}. Correct the "
            "path."
        ) from error
    return read_yaml(text, path)


def _why_unread(error: OSError | UnicodeDecodeError) -> str:
    return getattr(error, "strerror", None) or "not UTF-8 text"


def shipped_pipelines() -> list[str]:
    """Return the names of the pipelines that come with the package."""
    folder = resources.files("curate.pipelines")
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def parse_setting(text: str) -> tuple[str, str, Any]:
    """Split `stage.field=value`; the value is YAML.

    Raises
    ------
    ConfigError
    """
    target, equals, value = text.partition("=")
    stage, dot, name = target.partition(".")
    if not equals or not dot or not stage or not name:
        raise ConfigError(
            f"--set {text}: must be STAGE.FIELD=VALUE. Write e.g. --set dedup.min_cosine=0.95."
        )
    return stage.strip(), name.strip(), read_yaml(value, f"--set {text}:")


def load_pipeline(
    name: str,
    settings: Sequence[tuple[str, str, Any]] = (),
) -> Pipeline:
    """Read and check a pipeline.

    Parameters
    ----------
    name : str
        A file, or the name of a shipped pipeline.
    settings : sequence of (stage, field, value)
        Override what the file says.

    Raises
    ------
    ConfigError
        If anything does not hold; the message names the place and the nearest valid word.
    """
    where, text = _find(name)
    content = read_yaml(text, where)
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{where}: must be a mapping of stages; got {_kind(content)}. Mend it.")
    chosen: dict[str, dict[str, Any]] = {}
    for stage, fields in content.items():
        _check_stage(where, stage)
        if fields is not None and not isinstance(fields, dict):
            raise ConfigError(
                f"{where}: {stage} must be a mapping of parameters; got {_kind(fields)}. "
                f"Write `{stage}: {{}}` for the defaults."
            )
        chosen[stage] = dict(fields or {})
    for stage, field_name, value in settings:
        if stage == Download.name and stage not in chosen:
            chosen = {stage: {}, **chosen}  # where the input is a list of URLs it is implied
        if stage not in chosen:
            near = nearest(stage, chosen) or f" Choose among {', '.join(chosen)}."
            raise ConfigError(f"--set: this pipeline has no stage {stage!r}.{near}")
        chosen[stage][field_name] = value
    stages = tuple(_build(where, stage, fields) for stage, fields in chosen.items())
    _check_columns(where, stages)
    stages = _with_download(stages)
    return Pipeline(name, yaml.safe_dump(_without_paths(chosen), sort_keys=False), stages)


def _with_download(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Put `download` first where the input is a list of URLs, and leave it out where it is not."""
    ingest = next(stage for stage in stages if isinstance(stage, Ingest))
    others = tuple(stage for stage in stages if not isinstance(stage, Download))
    given = next((stage for stage in stages if isinstance(stage, Download)), Download())
    shared = {name: getattr(ingest, name) for name in SHARED_WITH_INGEST}
    download = given.model_copy(update=shared)
    return (download, *others) if download.finds_lists(ingest.format) else others


def _find(name: str) -> tuple[str, str]:
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return name, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{name}: must be a readable pipeline file; {_why_unread(error)}. Correct the path."
            ) from error
    shipped = shipped_pipelines()
    if name not in shipped:
        near = nearest(name, shipped) or " Name one of them, or a YAML file."
        got = "a folder" if path.is_dir() else "neither"
        raise ConfigError(
            f"{name}: must be a pipeline, a file or one of {', '.join(shipped)}; got {got}.{near}"
        )
    return name, resources.files("curate.pipelines").joinpath(f"{name}.yaml").read_text("utf-8")


def _check_stage(where: str, stage: Any) -> None:
    if stage not in STAGES:
        near = nearest(str(stage), STAGES)
        raise ConfigError(f"{where}: {stage!r} must be a stage ({', '.join(STAGES)}).{near}")


def _build(where: str, stage: str, fields: Mapping[str, Any]) -> Stage:
    kind = STAGES[stage]
    for name in fields:
        if name not in kind.model_fields:
            near = nearest(str(name), kind.model_fields)
            near = near or f" Choose among {', '.join(kind.model_fields)}."
            raise ConfigError(f"{where}: {stage} has no parameter {name!r}.{near}")
    try:
        return kind(**fields)
    except ValidationError as error:
        loc = error.errors()[0]["loc"]
        described = kind.model_fields.get(str(loc[0])) if loc else None
        help_text = f" ({described.description})" if described and described.description else ""
        raise ConfigError(f"{where}: {describe_fault(error, stage)}.{help_text}") from error


def describe_fault(error: ValidationError, stage: str) -> str:
    """Say in words what the first fault of a stage's parameters is: what must hold, what came."""
    first = error.errors()[0]
    # Parts such as "literal['a','b']" and names of classes say how pydantic tried.
    parts = [str(part) for part in first["loc"]]
    place = [part for part in parts if "[" not in part and not part[:1].isupper()]
    if first["type"] == "extra_forbidden":
        return f"{'.'.join([stage, *place[:-1]])} has no field {place[-1]!r}"
    wanted = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    wanted = _PLAIN_KINDS.get(first["type"], wanted)
    got = "nothing" if first["input"] is None else repr(first["input"])
    shown = "" if first["type"] == "value_error" else f"; got {got}"
    return f"{'.'.join([stage, *place])} must be {wanted}{shown}"


def _check_columns(where: str, stages: Sequence[Stage]) -> None:
    """Every column has one writer, and it comes before every reader."""
    writers: dict[str, str] = {}
    seen: set[str] = set()
    for position, stage in enumerate(stages):
        if position == 0 and isinstance(stage, Download):
            continue
        if isinstance(stage, Download):
            raise ConfigError(f"{where}: download must come before ingest. Move it up.")
        if not seen and not isinstance(stage, Ingest):
            raise ConfigError(f"{where}: the first stage must be ingest; got {stage.name}. Add it.")
        if stage.name in seen:
            raise ConfigError(
                f"{where}: stage {stage.name} must occur once; it occurs twice. Remove one."
            )
        seen.add(stage.name)
        for column in stage.reads():
            if column not in writers:
                advice = _advise_writer(column, seen)
                raise ConfigError(
                    f"{where}: {stage.name} reads the column {column}, which no earlier stage "
                    f"writes.{advice}"
                )
        for column in stage.writes():
            if column in writers:
                raise ConfigError(
                    f"{where}: {stage.name} writes {column}, which {writers[column]} already "
                    "writes. Remove one of them."
                )
            writers[column] = stage.name
    if not seen:
        raise ConfigError(f"{where}: there must be a stage ingest; there is none. Add it.")


def _advise_writer(column: str, present: Iterable[str]) -> str:
    """Say what to add so that a column is written; nothing if nobody could."""
    from curate.plugins import find_writer
    from curate.schema import COLUMNS

    plugin = find_writer(column)
    if plugin is not None and "embed" in present:
        return f" Add {plugin} to embed.plugins."
    owner = COLUMNS[column].stage if column in COLUMNS else None
    return f" Add {owner} before it." if owner in STAGES else ""


def _without_paths(chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Leave out what is not part of the recipe: where this run's input lies."""
    kept = {stage: dict(fields) for stage, fields in chosen.items()}
    for fields in kept.values():
        for name in ("inputs", "root", "spool"):
            fields.pop(name, None)
        for name in ("lists", "score_tables"):
            if isinstance(fields.get(name), list):
                fields[name] = [_by_name(one) for one in fields[name]]
    return kept


def _by_name(one: Mapping[str, Any]) -> dict[str, Any]:
    """Name a file from outside as rules and reasons do, and not by where it lies."""
    return {**one, "path": PurePosixPath(str(one["path"])).name}


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the end of a message that names the known word most like `word`, if one is."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {found[0]}?" if found else ""


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
