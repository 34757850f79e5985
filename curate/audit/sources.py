"""What `curate audit` measures: embeddings that others made, or models and samples to embed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.audit.copies import Looks, find_copies, look_at
from curate.audit.measures import Embeddings
from curate.audit.models import find_equal, is_named, read_folder
from curate.audit.panel import Panel, embed_panel, finished_run, join_run, list_samples, naming
from curate.audit.recall import name_objects
from curate.engine.finished import read_finished
from curate.engine.runner import Progress
from curate.errors import ConfigError, InputError, MissingWeightsError
from curate.formats.sources import find_root, list_files
from curate.memorization.folds import hash_unit

if TYPE_CHECKING:
    from curate.models.encoders import Encoder

__all__ = ["Checkpoints", "Folders", "Known", "Request", "open_source"]

Array = np.ndarray[Any, Any]

#: Samples that are measured, where the request does not say.
_MOST = 10_000
_SEED_PUBLIC = 0


@dataclass(frozen=True)
class Request:
    """What to audit.

    Parameters
    ----------
    checkpoints : tuple of str
        Files or patterns; `open_clip:MODEL/PRETRAINED`, see `encoders.load_named`; or folders of
        embeddings, see `models.read_folder`.
    model : str or None
        open_clip's name of the files' architecture, or a .json file that describes it.
    candidates, held_out : tuple of str
        As `curate run` takes inputs. A finished OUT stands for what it kept.
    reference : str or None
        A checkpoint, name or folder of a model that did not see the candidates.
    run : str or None
        A finished run whose decisions tell of the candidates; default: theirs.
    output : str or None
    limit : int or None
        Candidates, and held-out pairs, that are measured at most; default: 10 000. Not of folders
        of embeddings, which are measured as they are.
    seed : int or None
        Draws them; default: 0.
    search : bool
        Look for copies, of held-out pairs among the candidates and of candidates, and test for
        deja vu; else only the models themselves are run.
    drop_overlap : bool
        Leave out held-out pairs that are among the candidates, instead of refusing.
    max_memorization : float or None
        Limit of mean memorization.
    max_harmful : float or None
        Limit of the share of candidates that are memorized and wrong.
    """

    checkpoints: tuple[str, ...]
    model: str | None = None
    candidates: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    reference: str | None = None
    run: str | None = None
    output: str | None = None
    limit: int | None = None
    seed: int | None = None
    search: bool = True
    drop_overlap: bool = False
    max_memorization: float | None = None
    max_harmful: float | None = None


@dataclass
class Known:
    """What is known of the candidates, whatever the model."""

    uids: list[str]
    clusters: Array
    columns: dict[str, Array] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    #: For the deja vu test.
    objects: tuple[Array, Array] | None = None
    texts: tuple[Array, Array] | None = None
    public: Array | None = None


def open_source(
    request: Request, paths: Sequence[str], progress: Progress
) -> "Folders | Checkpoints":
    """Make ready what all of the paths are: folders of embeddings, or models.

    Raises
    ------
    CurateError
        One line on what is wrong with the request or its files.
    """
    folders = [Path(path).is_dir() for path in paths]
    if any(folders) != all(folders):
        raise InputError(
            f"{paths[folders.index(False)]}: must be a folder of embeddings, as "
            f"{paths[folders.index(True)]} is; it is a file. Audit them apart."
        )
    return Folders(request, paths) if folders[0] else Checkpoints(request, paths, progress)


class Folders:
    """Embeddings that others made."""

    def __init__(self, request: Request, paths: Sequence[str]) -> None:
        given = {
            "--candidates": bool(request.candidates), "--held-out": bool(request.held_out),
            "--model": bool(request.model), "--limit": request.limit is not None,
            "--seed": request.seed is not None, "--no-search": not request.search,
        }  # fmt: skip
        for name, is_given in given.items():
            if is_given:
                raise ConfigError(
                    f"{name}: must not be given with folders of embeddings, which {paths[0]} is. "
                    "Leave it out."
                )
        if request.reference and not Path(request.reference).is_dir():
            kind = "it is a file" if Path(request.reference).exists() else "there is no such folder"
            raise InputError(
                f"--reference {request.reference}: must be a folder of embeddings, as {paths[0]} "
                f"is; {kind}. Embed the same samples with the reference, or leave it out."
            )
        first = read_folder(paths[0])
        number = np.shape(next(iter(first.candidates.values())))[-2]
        names = Path(paths[0], "candidates", "uids.txt")
        uids = _read_uids(names) if names.is_file() else list(map(str, range(number)))
        if len(set(uids)) != number or len(uids) != number:
            raise InputError(
                f"{names}: must hold {number} uids, one a line and none twice; got {len(uids)}, "
                f"{len(set(uids))} of them different."
            )
        self.known = Known(uids, np.array(uids, str))
        self.known.warnings.append(
            "held-out samples were compared with the candidates by equal embeddings alone"
        )
        self._count = np.shape(next(iter(first.held_out.values())))[-2]
        shared, repeated = find_equal(first)
        if len(shared):
            self._refuse(paths[0], shared, request)
        self._left_out = np.union1d(shared, repeated)
        if len(repeated):
            self._count_once(paths[0], len(repeated))
        if request.run:
            _take_run(self.known, request.run)

    def _refuse(self, path: str, shared: Array, request: Request) -> None:
        if not request.drop_overlap:
            raise InputError(
                f"{path}: held_out must hold nothing that is among the candidates; "
                f"{len(shared)} of {self._count} samples are (by equal embeddings), the "
                f"first in row {shared[0]}. Leave them out with --drop-overlap, or write "
                "others."
            )
        self.known.warnings.append(
            f"{len(shared)} held-out samples are among the candidates (by equal embeddings): "
            "left out"
        )

    def _count_once(self, path: str, repeated: int) -> None:
        """Tell that one of equal samples is left, as copies would pass for evidence of their own.

        `repeated` of the held-out samples have the embeddings of earlier ones.
        """
        if self._count - len(self._left_out) < 2:
            raise InputError(
                f"{path}: held_out must be of at least 2 different samples; got 1 (by equal "
                "embeddings). Write others."
            )
        self.known.warnings.append(
            f"{repeated} held-out samples have the embeddings of others of them: left out"
        )

    def load(self, path: str) -> Embeddings:
        """Read one folder."""
        found = read_folder(path)
        names = found.held_out
        count = np.shape(next(iter(names.values())))[-2]
        if count != self._count:
            raise InputError(
                f"{path}: must hold the {self._count} held-out samples of the first folder; got "
                f"{count}. Embed the same with all models."
            )
        if not len(self._left_out):
            return found
        rest = {name: np.delete(rows, self._left_out, axis=-2) for name, rows in names.items()}
        return Embeddings(found.candidates, rest)


def _read_uids(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8; {error}. Write it anew.") from error


class Checkpoints:
    """Models of open_clip, and the samples that they embed."""

    def __init__(self, request: Request, paths: Sequence[str], progress: Progress) -> None:
        files = [path for path in (*paths, request.reference) if path and not is_named(path)]
        for name, value in (("--model", request.model or not files),
                            ("--candidates", request.candidates),
                            ("--held-out", request.held_out)):  # fmt: skip
            if not value:
                which = files[0] if name == "--model" else paths[0]
                raise ConfigError(f"{name}: must be given, to embed with {which}. Add it.")
        if request.model and not files:
            raise ConfigError(
                f"--model: says nothing of {paths[0]}, which names its own. Leave it out."
            )
        # What is soon known before what takes a while.
        if request.reference in files and not Path(request.reference).is_file():
            kind = "it is a folder" if Path(request.reference).is_dir() else "no such file"
            raise InputError(
                f"--reference {request.reference}: must be a checkpoint; {kind}. Correct it."
            )
        if request.run:
            read_finished(request.run)
        for name, inputs in (("--candidates", request.candidates),
                             ("--held-out", request.held_out)):  # fmt: skip
            with naming(name):
                list_files(inputs, find_root(inputs))
        from curate.models.precision import pick_device

        self._device, self._model = pick_device(), request.model or ""
        # Before hours of work on the samples: the first tells whether the architecture is right.
        self._loaded = (paths[0], self._encoder(paths[0]))
        if request.reference:
            with naming("--reference"):
                self._encoder(request.reference)
        self._prepare(request, progress)

    def _encoder(self, path: str) -> "Encoder":
        from curate.models.encoders import load_checkpoint, load_named

        if is_named(path):
            return load_named(path, self._device)
        return load_checkpoint(self._model, path, self._device)

    def _prepare(self, request: Request, progress: Progress) -> None:
        run = request.run or finished_run(request.candidates)
        dataset = _dataset_of(run) if run else ""
        everything = list_samples(request.candidates, "--candidates", dataset)
        most, seed = _MOST if request.limit is None else request.limit, request.seed or 0
        held_out = list_samples(request.held_out, "--held-out").draw(most, seed)
        panel = everything.draw(most, seed)
        warnings: list[str] = []
        judge = _load_judge(warnings) if request.search else None
        panel, looks = _usable(panel, judge, "--candidates")
        held_out, held_looks = _usable(held_out, judge, "--held-out")
        known = Known(panel.uids, np.array(panel.uids, str), warnings=warnings)
        # What is measured was decoded anyway, so that equal bytes and pixels cost nothing.
        among = everything if request.search else panel
        progress.begin("audit", "copies", -(-len(among) // 1024), 0)
        copies = find_copies(
            among,
            (panel, looks),
            (held_out, held_looks),
            judge,
            lambda samples: progress.advance({"samples": samples}),
        )
        progress.end()
        held_out, rest = _without(held_out, copies.overlap, request, known.warnings)
        held_looks = held_looks.take(rest)
        held_out, held_looks = _once_each(held_out, held_looks, judge, known.warnings)
        known.clusters = copies.clusters
        if request.search:
            known.columns["seen"] = copies.seen.astype(float)
        else:
            known.warnings.append(
                "copies were looked for among what is measured, by bytes and pixels alone; deja vu "
                "was not tested"
            )
        if run:
            _take_run(known, run)
        self.panel, self.held_out, self.known = panel, held_out, known
        if judge is not None:
            self._prepare_recall(judge, looks, held_looks)

    def _prepare_recall(self, judge: "Encoder", looks: Looks, held_looks: Looks) -> None:
        """Objects, and what a text embedder makes of captions."""
        from curate.models.encoders import Precision, embed_captions

        public = hash_unit(self.held_out.uids, _SEED_PUBLIC, "public") < 0.5
        if looks.vectors is None or held_looks.vectors is None or public.all() or not public.any():
            return
        both = [name_objects(judge, one) for one in (looks.vectors, held_looks.vectors)]
        if both[0] is None or both[1] is None:
            return
        self.known.objects, self.known.public = (both[0], both[1]), public
        sides = (self.panel.captions, self.held_out.captions)
        texts = [embed_captions(judge, side, 64, Precision())[0] for side in sides]
        self.known.texts = (texts[0], texts[1])

    def load(self, path: str) -> Embeddings:
        """Embed candidates and held-out pairs by one model."""
        if self._loaded[0] != path:
            self._loaded = (path, self._encoder(path))
        encoder = self._loaded[1]
        parts = [embed_panel(encoder, one)[0] for one in (self.panel, self.held_out)]
        return Embeddings(parts[0], parts[1])


def _dataset_of(run: str) -> str:
    stages = read_finished(run)["stages"]
    return str(stages.get("ingest", {}).get("parameters", {}).get("dataset", ""))


def _load_judge(warnings: list[str]) -> "Encoder | None":
    """Load the packaged encoder, which finds copies and names objects."""
    from curate.models.encoders import load_encoder
    from curate.models.precision import pick_device

    try:
        return load_encoder("offline", pick_device())
    except MissingWeightsError as error:
        warnings.append(f"near-duplicates and deja vu are not measured: {error}")
        return None


def _usable(panel: Panel, judge: "Encoder | None", where: str) -> tuple[Panel, Looks]:
    """Leave out what cannot be decoded."""
    looks = look_at(panel, judge)
    rows = np.flatnonzero(looks.valid)
    if len(rows) < 2:
        raise InputError(
            f"{where}: must be at least 2 samples whose images decode, for an interval; got "
            f"{len(rows)} of {len(panel)}. Name more."
        )
    return panel.take(rows), looks.take(rows)


def _without(
    held_out: Panel, overlap: dict[int, str], request: Request, warnings: list[str]
) -> tuple[Panel, Array]:
    """Refuse held-out pairs that are among the candidates, or leave them out."""
    rest = np.setdiff1d(np.arange(len(held_out)), list(overlap))
    if not overlap:
        return held_out, rest
    kinds = list(overlap.values())
    how = ", ".join(f"{kinds.count(kind)} by {kind}" for kind in dict.fromkeys(kinds))
    first = held_out.index["key"][next(iter(overlap))].as_py()
    if not request.drop_overlap:
        raise InputError(
            f"--held-out: must hold nothing that is among the candidates; {len(overlap)} of "
            f"{len(held_out)} pairs are ({how}), the first with key {first!r}. Leave them out with "
            "--drop-overlap, or name others."
        )
    if len(rest) < 2:
        raise InputError(
            f"--held-out: must keep at least 2 pairs that are not among the candidates; got "
            f"{len(rest)}. Name others."
        )
    warnings.append(f"{len(overlap)} held-out pairs are among the candidates ({how}): left out")
    return held_out.take(rest), rest


def _once_each(
    held_out: Panel, looks: Looks, judge: "Encoder | None", warnings: list[str]
) -> tuple[Panel, Looks]:
    """Leave one of each held-out picture, as copies would pass for evidence of their own."""
    none = np.zeros(0, np.int64)
    copies = find_copies(
        held_out, (held_out, looks), (held_out.take(none), looks.take(none)), judge
    )
    first = np.sort(np.unique(copies.clusters, return_index=True)[1])
    if len(first) < 2:
        raise InputError(
            "--held-out: must be of at least 2 different pictures; got 1. Name others."
        )
    if len(first) < len(held_out):
        warnings.append(
            f"{len(held_out) - len(first)} held-out pairs show what others of them show: left out"
        )
    return held_out.take(first), looks.take(first)


def _take_run(known: Known, run: str) -> None:
    found = join_run(run, known.uids)
    known.clusters = found.pop("cluster_id")
    sizes = found.pop("cluster_size")
    if "seen" not in known.columns:
        # Of what the run kept one of each cluster was left to train on.
        kept = (found["kept"] == 1).all()
        known.columns["seen"] = np.where(np.isfinite(sizes) & ~kept, sizes, 1.0)
    for name, values in found.items():
        if np.isfinite(values).any():
            known.columns[name] = values
