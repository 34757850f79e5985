"""What a stage is: a frozen value that names its tables and the steps that fill them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

import pyarrow as pa
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from curate import storage
from curate.formats import Vectors
from curate.schema import COLUMNS

__all__ = [
    "OneOrMore",
    "Room",
    "Stage",
    "Step",
    "Table",
    "execution_only",
    "one_task",
    "shard_tasks",
]

_Kind = TypeVar("_Kind", bound="Stage")
#: Texts, of which one alone need not be written as a list.
OneOrMore = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]


def execution_only(default: Any, description: str, **limits: Any) -> Any:
    """Declare a field that cannot change the result and is therefore not hashed."""
    extra: dict[str, Any] = {"execution_only": True}
    return Field(default, description=description, json_schema_extra=extra, **limits)


@dataclass(frozen=True)
class Table:
    """An aligned side table: the columns it adds and the fields its content depends on.

    `fields` None means all hashed fields of the stage. Tables of one stage have folders and
    fingerprints of their own, so that changing what one depends on leaves the others valid.
    """

    name: str
    columns: tuple[str, ...]
    fields: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Room:
    """Where one stage of one run works: everything a step may know besides its task's name.

    Parameters
    ----------
    stage : Stage
    folders : dict of str to str
        Folder of every table of this stage and of the stages before it.
    origins : dict of str to str
        Table in which each earlier column lies.
    missing : frozenset of str
        Tables of this stage that are still to be made.
    threads : int
        Cores that one task may use.
    pipeline : tuple of Stage
        All stages: `ingest` alone knows where the sources lie.
    """

    stage: "Stage"
    folders: dict[str, str]
    origins: dict[str, str]
    missing: frozenset[str]
    threads: int = 1
    pipeline: "tuple[Stage, ...]" = ()

    def find(self, kind: type[_Kind]) -> _Kind:
        """Return the run's stage of a kind, which a step of another may ask for."""
        return next(one for one in (self.stage, *self.pipeline) if isinstance(one, kind))

    def source(self) -> "Stage":
        """Return the stage that made the index."""
        return next(stage for stage in self.pipeline if stage.name == "ingest")

    def open_images(self, index: pa.Table) -> Iterator[bytes | None]:
        """Yield the original bytes of index rows, in order; None where there is no image."""
        return self.source().open(index, self.folders["ingest"])

    def layout(self) -> dict[str, Any]:
        """What `ingest` found and decided: `samples`, `format`, `shards`, widths of `vectors`."""
        found: dict[str, Any] = storage.read_json(
            storage.join(self.folders["ingest"], "layout.json")
        )
        return found

    def has_source_vectors(self) -> bool:
        """Tell whether the source supplies vectors, and therefore no images."""
        try:
            layout = self.layout()
        except FileNotFoundError:  # nothing has run yet
            return self.source().supplies_vectors()
        return layout.get("vectors") is not None

    def read_source_vectors(self, index: pa.Table) -> Vectors:
        """Return the vectors that the source supplies for index rows, in order."""
        return self.source().open_vectors(index, self.layout())

    def path(self, *names: str, table: str | None = None) -> str:
        """Location of a file in a table's folder, by default that of the stage's first table."""
        return storage.join(self.folders[table or self.stage.tables()[0].name], *names)

    def shard_path(self, table: str, shard: str) -> str:
        """Location of one shard of a table."""
        return storage.join(self.folders[table], "shards", f"{shard}.parquet")

    def further(self) -> list[str]:
        """Columns of earlier stages that `curate` itself does not know: those of plug-ins."""
        return [column for column in self.origins if column not in COLUMNS]

    def has(self, column: str) -> bool:
        """Tell whether an earlier stage writes `column`."""
        return column in self.origins

    def shards(self) -> list[str]:
        """Names of all shards, in order."""
        return [shard["name"] for shard in self.layout()["shards"]]

    def read(self, shard: str, columns: Sequence[str]) -> pa.Table:
        """Return `uid` and the named earlier columns of one shard, checked to be aligned."""
        by_table: dict[str, list[str]] = {}
        for column in columns:
            if column != "uid":
                by_table.setdefault(self.origins[column], []).append(column)
        paths = [(self.shard_path(t, shard), c) for t, c in (by_table or {"ingest": []}).items()]
        return storage.join_aligned((p, storage.read_table(p, ["uid", *c])) for p, c in paths)

    def commit_shard(self, table: str, shard: str, content: pa.Table) -> None:
        """Commit one shard of one of this stage's tables."""
        fingerprint = self.folders[table].rsplit("-", 1)[-1]
        path = self.shard_path(table, shard)
        storage.commit_table(path, content, {"curate.fingerprint": fingerprint})


@dataclass(frozen=True)
class Step:
    """One function mapped over task names.

    Parameters
    ----------
    name : str
    run : callable
        `run(room, task)` commits the task's files and returns counts to be summed into
        `run.json` (`samples` gives the rate that is shown).
    tasks : callable
        `tasks(room)`: the names, once all earlier steps are complete.
    tables : tuple of str, optional
        Run the step only if one of these tables is missing; default: any of the stage's.
    run_together : callable, optional
        `run_together(room, tasks)` does what `run` does for each of several tasks, and returns the
        counts of each, where a GPU takes less time for them together than one after the other.
    """

    name: str
    run: Callable[[Room, str], dict[str, float]]
    tasks: Callable[[Room], list[str]]
    tables: tuple[str, ...] | None = None
    run_together: Callable[[Room, Sequence[str]], list[dict[str, float]]] | None = None


def shard_tasks(room: Room) -> list[str]:
    """One task per shard."""
    return room.shards()


def one_task(room: Room) -> list[str]:
    """A single task."""
    return ["all"]


class Stage(BaseModel):
    """Base of all stages. Fields are parameters; each is described once, where it is declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    #: Raised by whoever changes what the stage computes from the same inputs and parameters.
    version: ClassVar[int] = 1
    #: Whether results depend on how many threads add up a sum, so that a task has one.
    single_threaded: ClassVar[bool] = False
    #: Folders within the first table's folder that become OUT/<name> when the run ends.
    publishes: ClassVar[tuple[str, ...]] = ()
    #: Whether it also reads the columns of all plug-ins of other packages (`Room.further`).
    reads_further: ClassVar[bool] = False
    #: What later stages read from outside is known only once this one is complete.
    makes_input: ClassVar[bool] = False

    def reads(self) -> tuple[str, ...]:
        """Columns that an earlier stage must write."""
        return ()

    def wants(self) -> tuple[str, ...]:
        """Columns that are used if an earlier stage writes them."""
        return ()

    def tables(self) -> tuple[Table, ...]:
        """Tables that the stage fills."""
        raise NotImplementedError

    def steps(self) -> tuple[Step, ...]:
        """Steps that fill them, in order."""
        raise NotImplementedError

    def writes(self) -> tuple[str, ...]:
        """Columns of all tables."""
        return tuple(column for table in self.tables() for column in table.columns)

    def hashed_fields(self) -> dict[str, Any]:
        """Parameters that can change the result, as plain values."""
        values = self.model_dump(mode="json")
        for name, declared in type(self).model_fields.items():
            extra = declared.json_schema_extra
            if isinstance(extra, dict) and extra.get("execution_only"):
                values.pop(name)
        return values

    def sources(self) -> list[dict[str, Any]]:
        """Identity of everything read from outside OUT; part of the fingerprint."""
        return []

    def placed(self, folders: dict[str, str]) -> "Stage":
        """Return the stage as it works where earlier tables lie in `folders`."""
        return self

    def prepare(self) -> None:
        """Wait for what is read from outside, before a run begins."""

    def asks_more(self, folder: str) -> bool:
        """Tell whether a complete table is to be taken up again."""
        return False

    def imports(self, room: Room) -> tuple[str, ...]:
        """Modules that the tasks need and that take seconds to import."""
        return ()

    def warm(self, room: Room) -> None:
        """Load what the tasks will need; called in the workers' background while others run."""

    def facts(self, room: Room) -> dict[str, Any]:
        """Figures of the finished stage for `run.json`."""
        return {}

    def release(self, room: Room) -> None:
        """Let go, on this machine, of what no stage after this one asks for."""

    def open(self, table: pa.Table, folder: str) -> Iterator[bytes | None]:
        """Yield the bytes of index rows; only the stage that made the index, `folder`, can."""
        raise NotImplementedError

    def supplies_vectors(self) -> bool:
        """Tell, before anything ran, whether `open_vectors` will give any."""
        return False

    def open_vectors(self, table: pa.Table, layout: dict[str, Any]) -> Vectors:
        """Return the vectors of index rows; only the stage that made the index can."""
        raise NotImplementedError
