"""`curate audit`: what one model, or each checkpoint of a training, memorized."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from curate import storage
from curate.audit.measures import Embeddings, Measures, measure
from curate.audit.models import list_checkpoints, number_steps
from curate.audit.panel import naming
from curate.audit.recall import Recall, measure_recall
from curate.audit.sources import Known, Request, open_source
from curate.engine.runner import Progress
from curate.errors import (
    ConfigError,
    InputError,
    LimitExceededError,
    OutputError,
)
from curate.memorization.rarity import RARE
from curate.report.audit_page import render_audit
from curate.report.plain import read_style

if TYPE_CHECKING:
    pass

__all__ = ["EXPOSURES", "audit", "check_limits", "figures"]

Array = np.ndarray[Any, Any]

#: Copies in the training data, from and up to.
EXPOSURES = {"seen once": (1, 1), "seen 2-4 times": (2, 4), "seen 5+ times": (5, np.inf)}
#: From this probability of mismatch on a caption counts as wrong, as in `memorization_kind`.
_WRONG = 0.5


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
    source = open_source(request, paths, progress)
    known = source.known
    if request.max_harmful is not None and "mismatch_probability" not in known.columns:
        raise ConfigError(
            "--max-harmful: needs to know which captions are wrong; give the run that judged the "
            "candidates, with its scores: --run OUT."
        )
    reference = None
    if request.reference:
        with naming("--reference"):
            reference = source.load(request.reference)
    results, tables = [], []
    progress.begin("audit", "checkpoints", len(paths), 0)
    for step, path in zip(number_steps(paths), paths, strict=True):
        try:
            model = source.load(path)
            found = measure(model, reference, known.clusters.tolist())
        except InputError as error:
            where = "" if str(error).startswith(path) else f"{path}: "
            raise InputError(f"{where}{error}") from error
        recall = _recall(known, model, reference)
        results.append(_summarize(path, step, found, known, recall))
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


def _recall(known: Known, model: Embeddings, reference: Embeddings | None) -> Recall | None:
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


def _parts(known: Known) -> dict[str, dict[str, Array]]:
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
    path: str, step: int, found: Measures, known: Known, recall: Recall | None
) -> dict[str, Any]:
    split = {name: found.split(known.clusters, parts) for name, parts in _parts(known).items()}
    wrong = known.columns.get("mismatch_probability")
    harmful = None if wrong is None else float((found.memorized & (wrong >= _WRONG)).mean())
    return {
        "name": path,
        "step": step,
        "estimates": {name: asdict(one) for name, one in found.estimates.items()},
        "auc": found.auc,
        "auc_p_value": found.auc_p_value,
        "memorized": float(found.memorized.mean()),
        "harmful": harmful,
        "split": split,
        "recall": recall and {"against": recall.against, "k": recall.k, **recall.gaps},
        "warnings": found.warnings,
    }


def _table(path: str, found: Measures, known: Known, recall: Recall | None) -> pa.Table:
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
