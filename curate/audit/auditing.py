"""`curate audit`: what one model, or each checkpoint of a training, memorized."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from curate import storage
from curate.audit.copies import Looks, find_copies, look_at
from curate.audit.measures import Embeddings, Measures, measure
from curate.audit.models import find_shared, is_named, list_checkpoints, read_folder, step_of
from curate.audit.panel import Panel, embed_panel, finished_run, join_run, list_samples
from curate.audit.recall import Recall, measure_recall, name_objects
from curate.engine.finished import read_finished
from curate.engine.runner import Progress
from curate.errors import (
    ConfigError,
    InputError,
    LimitExceededError,
    MissingWeightsError,
    OutputError,
)
from curate.formats.sources import find_root, list_files
from curate.memorization.folds import hash_unit
from curate.memorization.rarity import RARE
from curate.report.audit_page import render_audit
from curate.report.plain import read_style

if TYPE_CHECKING:
    from curate.models.encoders import Encoder

__all__ = ["EXPOSURES", "Request", "audit", "check_limits", "figures"]

Array = np.ndarray[Any, Any]

#: Copies in the training data, from and up to.
EXPOSURES = {"seen once": (1, 1), "seen 2-4 times": (2, 4), "seen 5+ times": (5, np.inf)}
#: From this probability of mismatch on a caption counts as wrong, as in `memorization_kind`.
_WRONG = 0.5
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
    limit : int
        Candidates, and held-out pairs, that are measured at most.
    seed : int
        Draws them.
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
    limit: int = 10_000
    seed: int = 0
    search: bool = True
    drop_overlap: bool = False
    max_memorization: float | None = None
    max_harmful: float | None = None


@dataclass
class _Known:
    """What is known of the candidates, whatever the model."""

    uids: list[str]
    clusters: Array
    columns: dict[str, Array] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    #: For the deja vu test.
    objects: tuple[Array, Array] | None = None
    texts: tuple[Array, Array] | None = None
    public: Array | None = None


def audit(request: Request, progress: Progress) -> dict[str, Any]:
    """Measure every checkpoint; write OUT if one is named.

    Parameters
    ----------
    request : Request
    progress : Progress

    Returns
    -------
    dict
        `checkpoints` (in natural order: `name`, `step`, `estimates`, `auc`, `split`, `recall`,
        `harmful`, `warnings`), `warnings`, `candidates`, `held_out`, `reference`. Plain values.

    Raises
    ------
    CurateError
        One line on what is wrong with the request or its files.
    """
    if request.output:
        _check_output(request.output)
    paths = list_checkpoints(request.checkpoints)
    folders = [Path(path).is_dir() for path in paths]
    if any(folders) != all(folders):
        raise InputError(
            f"{paths[folders.index(False)]}: must be a folder of embeddings, as "
            f"{paths[folders.index(True)]} is; it is a file. Audit them apart."
        )
    source = _Folders(request, paths) if folders[0] else _Checkpoints(request, paths, progress)
    known = source.known
    if request.max_harmful is not None and "mismatch_probability" not in known.columns:
        raise ConfigError(
            "--max-harmful: needs to know which captions are wrong; give the run that judged the "
            "candidates, with its scores: --run OUT."
        )
    reference = source.load(request.reference) if request.reference else None
    results, tables = [], []
    progress.begin("audit", "checkpoints", len(paths), 0)
    for number, path in enumerate(paths):
        model = source.load(path)
        found = measure(model, reference, known.clusters.tolist())
        recall = _recall(known, model, reference)
        results.append(_summarize(path, number, found, known, recall))
        if request.output:
            tables.append(_table(path, found, known, recall))
        progress.advance({"samples": len(known.uids)})
    progress.end()
    report = {
        "reference": request.reference,
        "candidates": len(known.uids),
        "held_out": len(found.held_out),
        "clusters": len(set(known.clusters.tolist())),
        "modalities": model.modalities,
        "warnings": list(dict.fromkeys(known.warnings)),
        "checkpoints": results,
    }
    if request.output:
        _write(request.output, report, tables)
    return report


class _Folders:
    """Embeddings that others made."""

    def __init__(self, request: Request, paths: Sequence[str]) -> None:
        given = {"--candidates": request.candidates, "--held-out": request.held_out,
                 "--model": request.model}  # fmt: skip
        for name, value in given.items():
            if value:
                raise ConfigError(
                    f"{name}: must not be given with folders of embeddings, which {paths[0]} is. "
                    "Leave it out."
                )
        first = read_folder(paths[0])
        number = np.shape(next(iter(first.candidates.values())))[-2]
        names = Path(paths[0], "candidates", "uids.txt")
        uids = (
            names.read_text("utf-8").split() if names.is_file() else list(map(str, range(number)))
        )
        if len(uids) != number:
            raise InputError(f"{names}: must hold {number} uids, one a line; got {len(uids)}.")
        self.known = _Known(uids, np.array(uids, str))
        self.known.warnings.append(
            "held-out samples were compared with the candidates by equal embeddings alone"
        )
        self._shared = find_shared(first)
        self._count = np.shape(next(iter(first.held_out.values())))[-2]
        if len(self._shared):
            self._refuse(paths[0], request)
        if request.run:
            _take_run(self.known, request.run)

    def _refuse(self, path: str, request: Request) -> None:
        if not request.drop_overlap:
            raise InputError(
                f"{path}: held_out must hold nothing that is among the candidates; "
                f"{len(self._shared)} of {self._count} samples are (by equal embeddings), the "
                f"first in row {self._shared[0]}. Leave them out with --drop-overlap, or write "
                "others."
            )
        self.known.warnings.append(
            f"{len(self._shared)} held-out samples are among the candidates (by equal embeddings): "
            "left out"
        )

    def load(self, path: str) -> Embeddings:
        found = read_folder(path)
        names = found.held_out
        if not len(self._shared) or np.shape(next(iter(names.values())))[-2] != self._count:
            return found
        rest = {name: np.delete(rows, self._shared, axis=-2) for name, rows in names.items()}
        return Embeddings(found.candidates, rest)


class _Checkpoints:
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
            raise InputError(
                f"--reference {request.reference}: must be a checkpoint; no such file. Correct it."
            )
        if request.run:
            read_finished(request.run)
        for inputs in (request.candidates, request.held_out):
            list_files(inputs, find_root(inputs))
        from curate.models.precision import pick_device

        self._device, self._model = pick_device(), request.model or ""
        # Before hours of work on the samples: the first tells whether the architecture is right.
        self._loaded = (paths[0], self._encoder(paths[0]))
        if request.reference:
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
        held_out = list_samples(request.held_out, "--held-out").draw(request.limit, request.seed)
        panel = everything.draw(request.limit, request.seed)
        warnings: list[str] = []
        judge = _load_judge(warnings) if request.search else None
        panel, looks = _usable(panel, judge, "--candidates")
        held_out, held_looks = _usable(held_out, judge, "--held-out")
        known = _Known(panel.uids, np.array(panel.uids, str), warnings=warnings)
        if request.search:
            progress.begin("audit", "copies", -(-len(everything) // 1024), 0)
            copies = find_copies(
                everything,
                (panel, looks),
                (held_out, held_looks),
                judge,
                lambda samples: progress.advance({"samples": samples}),
            )
            progress.end()
            held_out, rest = _without(held_out, copies.overlap, request, known.warnings)
            held_looks = held_looks.take(rest)
            known.clusters = copies.clusters
            known.columns["seen"] = copies.seen.astype(float)
        else:
            known.warnings.append("neither copies nor deja vu were looked for")
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


def _take_run(known: _Known, run: str) -> None:
    found = join_run(run, known.uids)
    known.clusters = found.pop("cluster_id")
    sizes = found.pop("cluster_size")
    seen = known.columns.get("seen", np.ones(len(sizes)))
    known.columns["seen"] = np.where(np.isfinite(sizes), sizes, seen)
    for name, values in found.items():
        if np.isfinite(values).any():
            known.columns[name] = values


def _recall(known: _Known, model: Embeddings, reference: Embeddings | None) -> Recall | None:
    if known.objects is None or known.texts is None or known.public is None:
        return None
    sides = []
    for one in (model, reference):
        if one is not None:
            text, rest, images = one.candidates["text"], one.held_out["text"], one.held_out["image"]
            sides.append((text, rest, images))
    if reference is None:
        sides.append((*known.texts, known.texts[1]))
    against = "text embedder" if reference is None else "reference"
    if not known.objects[1][~known.public].any():
        return None
    return measure_recall(sides[0], sides[1], against, known.objects, known.clusters, known.public)


def _parts(known: _Known) -> dict[str, dict[str, Array]]:
    """Parts of the candidates by what is known of them."""
    parts: dict[str, dict[str, Array]] = {}
    columns = known.columns
    if "seen" in columns:
        seen = columns["seen"]
        parts["exposure"] = {
            name: (seen >= low) & (seen <= high) for name, (low, high) in EXPOSURES.items()
        }
    kinds = {}
    if "rarity" in columns:
        kinds["rarity"] = {
            "rare": columns["rarity"] >= RARE,
            "common": columns["rarity"] < RARE,
        }
    if "mismatch_probability" in columns:
        kinds["verdict"] = {
            "wrong": columns["mismatch_probability"] >= _WRONG,
            "right": columns["mismatch_probability"] < _WRONG,
        }
    parts |= kinds
    if len(kinds) == 2:
        parts["rarity and verdict"] = {
            f"{rare} and {verdict}": one & other
            for rare, one in kinds["rarity"].items()
            for verdict, other in kinds["verdict"].items()
        }
    if "kept" in columns:
        parts["decision"] = {"kept": columns["kept"] == 1, "dropped": columns["kept"] == 0}
    return parts


def _summarize(
    path: str, number: int, found: Measures, known: _Known, recall: Recall | None
) -> dict[str, Any]:
    split = {name: found.split(known.clusters, parts) for name, parts in _parts(known).items()}
    wrong = known.columns.get("mismatch_probability")
    harmful = None if wrong is None else float((found.memorized & (wrong >= _WRONG)).mean())
    step = step_of(path)
    return {
        "name": path,
        "step": number if step is None else step,
        "estimates": {name: asdict(one) for name, one in found.estimates.items()},
        "auc": found.auc,
        "auc_p_value": found.auc_p_value,
        "memorized": float(found.memorized.mean()),
        "harmful": harmful,
        "split": split,
        "recall": recall and {"against": recall.against, "k": recall.k, **recall.gaps},
        "warnings": found.warnings,
    }


def _table(path: str, found: Measures, known: _Known, recall: Recall | None) -> pa.Table:
    """One row per candidate: its measures, and what is known of it."""
    number = len(known.uids)
    columns: dict[str, Any] = {"checkpoint": [path] * number, "uid": known.uids}
    columns["cluster_id"] = known.clusters
    columns |= {name: values.astype(np.float32) for name, values in found.scores.items()}
    columns["memorized"] = found.memorized
    if recall is not None:
        columns["deja_vu_precision"] = recall.precision.astype(np.float32)
        columns["deja_vu_precision_reference"] = recall.reference_precision.astype(np.float32)
    columns |= {name: values.astype(np.float32) for name, values in known.columns.items()}
    return pa.table({name: pa.array(v, from_pandas=True) for name, v in columns.items()})


def _check_output(out: str) -> None:
    names = storage.list_names(out)
    if names and "audit.json" not in names:
        raise OutputError(
            f"{out}: must be empty or hold an earlier audit; it holds {names[0]}. Choose another "
            "--output."
        )


def _write(out: str, report: dict[str, Any], tables: list[pa.Table]) -> None:
    storage.make_folder(out)
    storage.commit_table(storage.join(out, "samples.parquet"), pa.concat_tables(tables))
    storage.commit_bytes(storage.join(out, "report.css"), read_style())
    storage.commit_bytes(storage.join(out, "index.html"), render_audit(report))
    storage.commit_json(storage.join(out, "audit.json"), report)


def figures(result: dict[str, Any]) -> dict[str, float]:
    """Return a checkpoint's figures by name, for a tracker."""
    found: dict[str, float | None] = {
        "memorized": result["memorized"],
        "harmful": result["harmful"],
        "auc": result["auc"],
    }
    for name, one in result["estimates"].items():
        found |= {name: one["mean"], f"{name}.low": one["low"], f"{name}.high": one["high"]}
    for kind in result["split"].values():
        for name, one in kind.items():
            mean = one["memorization"]
            found[f"memorization.{name.replace('+', ' or more')}"] = mean and mean["mean"]
    if result["recall"]:
        found |= {name: result["recall"][name] for name in ("ppg", "prg")}
    return {name: float(value) for name, value in found.items() if value is not None}


def check_limits(
    report: dict[str, Any], max_memorization: float | None, max_harmful: float | None
) -> None:
    """Compare what was measured with what is allowed.

    Raises
    ------
    LimitExceededError
        Names the first checkpoint above a limit.
    """
    for one in report["checkpoints"]:
        mean = one["estimates"]["memorization"]
        if max_memorization is not None and mean["mean"] > max_memorization:
            raise LimitExceededError(
                f"{one['name']}: mean memorization must be at most {max_memorization:g} "
                f"(--max-memorization); got {mean['mean']:.4f} ({mean['low']:.4f} to "
                f"{mean['high']:.4f}). Stop earlier, or clean the data and train anew."
            )
        if max_harmful is not None and one["harmful"] > max_harmful:
            raise LimitExceededError(
                f"{one['name']}: the share of candidates that are memorized and wrong must be at "
                f"most {max_harmful:g} (--max-harmful); got {one['harmful']:.4f}. Drop what the "
                "run calls mismatched and train anew."
            )
