"""Judge scores by eye: contact sheets of a run's unplanted pairs, and what judges said of them.

`python -m benchmarks.labels sheets OUT TRUTH FOLDER` draws pairs of a finished run on a corpus
without planted faults, in strata of `mismatch_probability` or `--even`, and lays them out without
any score, in random order. Each judge gives every number on the sheets one of `LABELS`, as lines
"number,label". `python -m benchmarks.labels merge FOLDER JUDGE1 JUDGE2 LABELS.csv` keeps both
judgements beside the picture's source. `python -m benchmarks.labels judge OUT TRUTH LABELS.csv`
prints one JSON line.

`right`: the caption names what is shown, or a good part of it. `loose`: it has to do with the
picture, but does not name it. `uninformative`: it says nothing about this picture that would not
fit hundreds of others (boilerplate, numbers, an author's name). `wrong`: it names something else.
"""

import csv
import io
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import average_precision_score, cohen_kappa_score, roc_auc_score

from benchmarks.parts import find_titles
from curate.memorization.folds import hash_unit

__all__ = ["LABELS", "rank_quality", "read_judged"]

Array = np.ndarray[Any, Any]

LABELS = ("right", "loose", "uninformative", "wrong")

#: Ranks by mismatch probability, from the top, at which strata end, and pairs drawn of each.
_STRATA = ((200, 200), (600, 0.2), (1600, 0.2), (None, 0.4))

#: `select.min_caption_information` as README names it.
_LEAST_INFORMATION = 0.3

#: Samples of the bootstrap.
_BOOTSTRAPS = 500

_COLUMNS, _LINES = 4, 5
_CELL = (290, 268)
_PICTURE_PX = 144
_TEXT_WIDTH, _TEXT_LINES = 40, 7


def read_judged(out: Path, truth: Path) -> pa.Table:
    """Return pairs that no rule but mismatch drops, with source, scores and thumbnail."""
    columns = ["uid", "key", "caption", "reason", "cluster_id"]
    columns += ["mismatch_probability", "caption_information"]
    decisions = pq.read_table(out / "decisions", columns=columns)
    reasons = decisions["reason"].to_pylist()
    usable = [reason in (None, "mismatched") for reason in reasons]
    decisions = decisions.filter(pa.array(usable))
    decisions = decisions.filter(pc.is_valid(decisions["mismatch_probability"]))
    (folder,) = (out / "stages").glob("embed.thumbnails-*")
    table = decisions.join(pq.read_table(folder / "shards"), "uid")
    planted = pq.read_table(truth, columns=["key", "source", "kind"])
    return table.join(planted, "key").sort_by("uid")


def draw_strata(probability: Array, sources: list[str], count: int, seed: int) -> Array:
    """Choose pairs by strata of their rank.

    Parameters
    ----------
    probability : (N,) floating
    sources : list of str, length N
    count : int
        Pairs beyond the first stratum, which is taken whole.
    seed : int

    Returns
    -------
    (N,) float64
        How many pairs each chosen one stands for; 0 for the others.
    """
    order = np.argsort(-probability, kind="stable")
    drawn = hash_unit(sources, seed, "labels")
    stands_for = np.zeros(len(order))
    first = 0
    for end, share in _STRATA:
        rows = order[first:end]
        wanted = len(rows) if isinstance(share, int) else round(share * count)
        chosen = rows[np.argsort(drawn[rows], kind="stable")[:wanted]]
        stands_for[chosen] = len(rows) / max(len(chosen), 1)
        first = end or len(order)
    return stands_for


def draw_titles(table: pa.Table, count: int, seed: int) -> Array:
    """Choose pairs evenly among those whose captions say something, one of each title.

    A series of pictures under one wrong title is one cause: drawn by rank it fills the sample.

    Parameters
    ----------
    table : pyarrow.Table of N rows
        See `read_judged`.
    count : int
    seed : int

    Returns
    -------
    (N,) float64
        How many such titles each chosen pair stands for; 0 for the others.
    """
    sources, captions = table["source"].to_pylist(), table["caption"].to_pylist()
    titles = [title.lower() for title in find_titles(captions, table["cluster_id"].to_pylist())]
    information = table["caption_information"].to_numpy()
    first: dict[str, int] = {}
    for row in np.argsort(hash_unit(sources, seed, "titles"), kind="stable"):
        if information[row] >= _LEAST_INFORMATION:
            first.setdefault(titles[row], int(row))
    stands_for = np.zeros(len(table))
    chosen = list(first.values())[:count]
    stands_for[chosen] = len(first) / max(len(chosen), 1)
    return stands_for


def _font() -> Any:
    try:
        return ImageFont.truetype("DejaVuSans.ttf", 13)  # captions in many alphabets
    except OSError:
        return ImageFont.load_default(13)


def draw_sheet(numbers: list[int], thumbnails: list[bytes], captions: list[str]) -> Image.Image:
    """Lay out up to 20 numbered pairs."""
    sheet = Image.new("RGB", (_COLUMNS * _CELL[0], _LINES * _CELL[1]), "white")
    draw, font = ImageDraw.Draw(sheet), _font()
    for place, (number, data, caption) in enumerate(
        zip(numbers, thumbnails, captions, strict=True)
    ):
        x, y = (place % _COLUMNS) * _CELL[0], (place // _COLUMNS) * _CELL[1]
        draw.rectangle((x, y, x + _CELL[0] - 1, y + _CELL[1] - 1), outline="gray")
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        ratio = _PICTURE_PX / max(picture.size)
        picture = picture.resize([max(1, round(side * ratio)) for side in picture.size])
        sheet.paste(picture, (x + 70, y + 4))
        draw.text((x + 5, y + 4), str(number), fill="red", font=font)
        text = "\n".join(textwrap.wrap(caption, _TEXT_WIDTH)[:_TEXT_LINES])
        draw.multiline_text((x + 5, y + _PICTURE_PX + 6), text, fill="black", font=font, spacing=2)
    return sheet


@click.group()
def main() -> None:
    """Judge scores by eye."""


@main.command()
@click.argument("out", type=click.Path(exists=True, path_type=Path))
@click.argument("truth", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--count", default=400, show_default=True, help="Pairs beside the top 200.")
@click.option("--seed", default=0, show_default=True)
@click.option("--known", type=click.Path(exists=True, path_type=Path), help="Labels to leave out.")
@click.option("--even", is_flag=True, help="One pair a title, evenly from what says something.")
def sheets(
    out: Path, truth: Path, folder: Path, count: int, seed: int, known: Path | None, even: bool
) -> None:
    """Draw pairs and lay them out in FOLDER."""
    table = read_judged(out, truth)
    sources = table["source"].to_pylist()
    if even:
        stands_for = draw_titles(table, count, seed)
    else:
        probability = table["mismatch_probability"].to_numpy()
        stands_for = draw_strata(probability, sources, count, seed)
    if known:
        judged = {row["source"] for row in _read_csv(known)}
        stands_for[[source in judged for source in sources]] = 0
    rows = np.flatnonzero(stands_for)
    rows = rows[np.argsort(hash_unit([sources[row] for row in rows], seed, "order"))]
    folder.mkdir(parents=True)
    per_sheet = _COLUMNS * _LINES
    for start in range(0, len(rows), per_sheet):
        part = table.take(pa.array(rows[start : start + per_sheet]))
        sheet = draw_sheet(
            list(range(start, start + len(part))),
            part["thumbnail"].to_pylist(),
            part["caption"].to_pylist(),
        )
        sheet.save(folder / f"sheet-{start // per_sheet:02d}.png")
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "source", "stands_for"])
        for number, row in enumerate(rows):
            writer.writerow([number, sources[row], round(float(stands_for[row]), 3)])
    click.echo(json.dumps({"pairs": len(rows), "sheets": -(-len(rows) // per_sheet)}))


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _read_judge(path: Path) -> dict[int, str]:
    labels = {}
    for line in path.read_text().splitlines():
        number, _, label = line.partition(",")
        if number.strip().isdigit():
            if label.strip() not in LABELS:
                raise click.ClickException(
                    f"{path}: labels must be one of {', '.join(LABELS)}; got {line!r}. Correct it."
                )
            labels[int(number)] = label.strip()
    return labels


@main.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.argument("judges", nargs=2, type=click.Path(exists=True, path_type=Path))
@click.argument("labels", type=click.Path(path_type=Path))
def merge(folder: Path, judges: tuple[Path, Path], labels: Path) -> None:
    """Append both judgements of the pairs in FOLDER to LABELS."""
    first, second = map(_read_judge, judges)
    new = not labels.exists()
    with labels.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["source", "stands_for", "first", "second"])
        for row in _read_csv(folder / "pairs.csv"):
            number = int(row["number"])
            writer.writerow([row["source"], row["stands_for"], first[number], second[number]])


@main.command()
@click.argument("out", type=click.Path(exists=True, path_type=Path))
@click.argument("truth", type=click.Path(exists=True, path_type=Path))
@click.argument("labels", type=click.Path(exists=True, path_type=Path))
def judge(out: Path, truth: Path, labels: Path) -> None:
    """Compare OUT's scores with LABELS; where judges differ, a pair counts half for each."""
    table = read_judged(out, truth)
    place = {source: row for row, source in enumerate(table["source"].to_pylist())}
    rows = [row for row in _read_csv(labels) if row["source"] in place]
    both = [(row["first"], row["second"]) for row in rows]
    picked = np.array([place[row["source"]] for row in rows])
    weight = np.array([float(row["stands_for"]) for row in rows])
    probability = table["mismatch_probability"].to_numpy()
    order = np.argsort(-probability, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    wrong, bad = (
        np.array([[label in kinds for label in pair] for pair in both]).mean(1)
        for kinds in (("wrong",), ("wrong", "uninformative"))
    )
    top = rank[picked] < 100
    report: dict[str, Any] = {
        "labelled": len(rows),
        "agreement": round(float(np.mean([a == b for a, b in both])), 3),
        "kappa": round(float(cohen_kappa_score(*zip(*both, strict=True))), 3),
        "top_100": {"labelled": int(top.sum()), "wrong": _mean(wrong[top]), "bad": _mean(bad[top])},
        "all": {"wrong": _mean(wrong, weight), "bad": _mean(bad, weight)},
        "mean_probability": _mean(probability[picked], weight),
    }
    said = -table["caption_information"].to_numpy()
    captions = np.array(table["caption"].to_pylist())[picked]
    for name, kind, values in (
        ("wrong_by_probability", wrong, probability),
        ("bad_by_probability", bad, probability),
        ("uninformative_by_information", bad - wrong, said),
    ):
        report[name] = rank_quality(kind, values[picked], weight, captions)
    report["by_rank"] = [
        {
            "ranks": [first, last],
            "labelled": int(inside.sum()),
            "probability": _mean(probability[picked][inside], weight[inside]),
            "wrong": _mean(wrong[inside], weight[inside]),
            "bad": _mean(bad[inside], weight[inside]),
        }
        for first, last in ((0, 50), (50, 100), (100, 200), (200, 600), (600, 1600), (1600, None))
        for inside in [(rank[picked] >= first) & (rank[picked] < (last or len(rank)))]
    ]
    click.echo(json.dumps(report))


def rank_quality(kind: Array, values: Array, weight: Array, groups: Array) -> dict[str, Any]:
    """Tell how well a score finds pairs of one kind in the corpus that they were drawn from.

    Parameters
    ----------
    kind : (N,) floating, [0, 1]
        Share of the judges who said so: a pair counts so much for, the rest against.
    values : (N,) floating
        Higher is to be of the kind.
    weight : (N,) floating
        How many pairs each stands for.
    groups : (N,)
        Pairs of equal group are one observation, such as those of one caption.

    Returns
    -------
    dict
        `auroc` with its `interval` (95 %, bootstrap over groups), `average_precision`, and
        `effective`: so many equal weights would be as sure as those of the kind's pairs.
    """
    kinds, doubled = np.r_[np.ones(len(kind)), np.zeros(len(kind))], np.tile(values, 2)

    def measure(score: Callable[..., float], weight: Array) -> float:
        weights = np.r_[kind * weight, (1 - kind) * weight]
        return float(score(kinds, doubled, sample_weight=weights))

    rng = np.random.default_rng(0)
    _, places = np.unique(groups, return_inverse=True)
    number = places.max() + 1
    draws = (rng.multinomial(number, np.full(number, 1 / number)) for _ in range(_BOOTSTRAPS))
    drawn = [weight * draw[places] for draw in draws]
    spread = [
        measure(roc_auc_score, part)
        for part in drawn
        if (kind * part).sum() > 0 and ((1 - kind) * part).sum() > 0
    ]
    own = kind * weight
    return {
        "auroc": round(measure(roc_auc_score, weight), 4),
        "interval": [round(float(end), 3) for end in np.quantile(spread, (0.025, 0.975))],
        "average_precision": round(measure(average_precision_score, weight), 4),
        "effective": round(float(own.sum() ** 2 / (own**2).sum()), 1),
    }


def _mean(values: Array, weight: Array | None = None) -> float | None:
    return round(float(np.average(values, weights=weight)), 4) if len(values) else None


if __name__ == "__main__":
    main()
