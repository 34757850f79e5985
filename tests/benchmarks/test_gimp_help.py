"""Tests of the corpus of pictures in GIMP's manuals."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks.corpora import main
from benchmarks.gimp_help import (
    DECORATIONS,
    MAX_LINKS,
    Figure,
    gimp_help_groups,
    gimp_help_pairs,
    read_alt_texts,
)

PAGE = """<?xml version="1.0" encoding="UTF-8" standalone="no"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN"
 "http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml"><head><title>2.2. Maze</title></head><body>
{}
<p>An <em>unclosed paragraph
</body></html>"""

IMAGES = {
    "images/note.png": "gray",
    "images/filters/maze.png": "red",
    "images/filters/examples/maze.png": "green",
    "images/toolbox/lasso.png": "blue",
}


def make_image(colour: str) -> bytes:
    """Return a PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


def make_manual(
    cache: Path, language: str, pages: dict[str, str], changed: dict[str, str] | None = None
) -> Path:
    """Write an unpacked manual, some of whose images have another colour, and return its folder."""
    help_folder = cache / f"gimp-help-{language}" / "usr" / "share" / "gimp" / "2.0" / "help"
    folder = help_folder / language.replace("-br", "_BR")
    for path, colour in (IMAGES | (changed or {})).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(make_image(colour))
    for name, body in pages.items():
        (folder / name).write_text(PAGE.format(body), encoding="utf-8")
    return folder


def tag(path: str, text: str) -> str:
    """Return an image's tag."""
    return f'<img src="{path}" alt="{text}" />'


def figure(path: str, text: str, digest: str = "", language: str = "en") -> Figure:
    """Return a figure whose image has bytes of its own unless told."""
    return Figure(language, path, Path(path), digest or path, text)


def test_alt_texts(tmp_path: Path) -> None:
    """Alt texts are read from whatever HTML there is, without superfluous white space."""
    page = tmp_path / "page.html"
    page.write_text(
        '<IMG ALT="The &#8220;Maze&#8221;\n  filter &amp; more" SRC="a.png"><img src="b.png">'
        '<img src="c.png" alt=""/><img src="d.png" alt/><img src="e.png" alt=" "/>'
        '<p title="<img alt=1>"><!-- <img src="f.png" alt="hidden"> --><img alt="No source">'
        '<img src="g.png" alt="迷路"',
        encoding="utf-8",
    )
    assert read_alt_texts(page) == [("a.png", "The “Maze” filter & more"), ("", "No source")]


def test_pairs(tmp_path: Path) -> None:
    """Each image has one pair for each of its alt texts, by page and place."""
    body = tag("images/filters/maze.png", "The  Maze\n filter") + "<p>"
    body += tag("images/filters/examples/maze.png", "Example") + "<p>"
    folder = make_manual(
        tmp_path,
        "en",
        {
            "a.html": body,
            "b.html": tag("images/filters/maze.png", "the maze FILTER")
            + tag("images/filters/maze.png", "Options"),
        },
    )
    pairs = gimp_help_pairs(tmp_path)
    assert [pair.caption for pair in pairs] == ["The Maze filter", "Example", "Options"]
    first, second, third = pairs
    assert (first.url, first.source) == (
        "gimp-help:/en/images/filters/maze.png",
        "en/images/filters/maze.png",
    )
    assert (first.title, first.category) == ("The Maze filter", "filters")
    assert first.read() == (folder / "images" / "filters" / "maze.png").read_bytes()
    assert first.name_group == third.name_group == "images/filters/maze.png"
    assert second.category == "filters"
    assert second.name_group == "images/filters/examples/maze.png"


def test_images_that_are_no_pairs(tmp_path: Path) -> None:
    """Decoration and images without text, broken, lying elsewhere or nowhere are left out."""
    outside = tmp_path / "outside.png"
    outside.write_bytes(make_image("black"))
    folder = make_manual(tmp_path, "en", {})
    (folder / "images" / "broken.png").write_bytes(make_image("red")[:50])
    body = "".join(
        [
            tag("images/note.png", "[Note]"),
            tag("images/filters/maze.png", " "),
            '<img src="images/filters/maze.png" />',
            tag("images/broken.png", "Broken"),
            tag("images/missing.png", "Missing"),
            tag("images", "A folder"),
            tag("../../../../../../../outside.png", "Outside"),
            tag(str(outside), "Outside"),
            tag("https://example.org/x.png", "Elsewhere"),
            tag("images/toolbox/lasso.png", "Lasso"),
        ]
    )
    (folder / "a.html").write_text(PAGE.format(body), encoding="utf-8")
    assert (folder / "../../../../../../../outside.png").is_file()
    assert "images/note.png" in DECORATIONS
    assert [pair.caption for pair in gimp_help_pairs(tmp_path)] == ["Lasso"]


def test_languages(tmp_path: Path) -> None:
    """Translations are pairs of their own; what was not translated is not repeated."""
    maze, lasso = "images/filters/maze.png", "images/toolbox/lasso.png"
    pages = {"a.html": tag(maze, "Maze") + tag(lasso, "Lasso")}
    make_manual(tmp_path, "en", pages)
    make_manual(tmp_path, "pt-br", {"a.html": tag(maze, "Labirinto") + tag(lasso, "Lasso")})
    make_manual(tmp_path, "de", pages, {lasso: "white"})
    pairs = gimp_help_pairs(tmp_path, ["en", "pt-br", "de", "en"])
    assert [(pair.url, pair.caption) for pair in pairs] == [
        (f"gimp-help:/en/{maze}", "Maze"),
        (f"gimp-help:/en/{lasso}", "Lasso"),
        (f"gimp-help:/pt_BR/{maze}", "Labirinto"),
        # Another picture than the English one, whatever its text.
        (f"gimp-help:/de/{lasso}", "Lasso"),
    ]
    assert [pair.name_group for pair in pairs] == [maze, lasso, maze, lasso]


def test_groups_follow_paths_bytes_and_texts() -> None:
    """Chains of equal paths, bytes and texts make one group, named after its first path."""
    groups = gimp_help_groups(
        [
            figure("d.png", "Before"),
            figure("c.png", "BEFORE"),
            figure("c.png", "after", digest="localised", language="de"),
            figure("b.png", "Something else", digest="localised", language="de"),
            figure("a.png", "After", language="de"),
            figure("e.png", "Alone"),
        ]
    )
    assert groups == {
        **dict.fromkeys(("a.png", "b.png", "c.png", "d.png"), "a.png"),
        "e.png": "e.png",
    }


def test_boilerplate_joins_nothing() -> None:
    """A text of many images does not make one group of them."""
    few = [figure(f"{index}.png", "Example") for index in range(MAX_LINKS)]
    assert set(gimp_help_groups(few).values()) == {"0.png"}
    many = [*few, figure("other.png", "example")]
    assert gimp_help_groups(many) == {found.path: found.path for found in many}


def test_images_of_many_texts_join_nothing() -> None:
    """An image of many texts does not make one group of their other images."""
    pages = [(f"{index}.png", f"Filter {index}") for index in range(MAX_LINKS + 1)]
    figures = [figure(path, text) for result, text in pages for path in ("original.png", result)]
    assert set(gimp_help_groups(figures[:-2]).values()) == {"0.png"}
    assert gimp_help_groups(figures) == {found.path: found.path for found in figures}


def test_translations_are_not_many_texts() -> None:
    """How many texts an image has is counted in one language."""
    languages = ["en", *(f"language {index}" for index in range(MAX_LINKS))]
    figures = [
        figure(path, f"Filter in {language}", language=language)
        for language in languages
        for path in ("original.png", "changed.png")
    ]
    assert set(gimp_help_groups(figures).values()) == {"changed.png"}


def test_package_without_manual(tmp_path: Path) -> None:
    """A package that holds no manual is an error, not an empty corpus."""
    (tmp_path / "gimp-help-common").mkdir()
    with pytest.raises(FileNotFoundError, match="gimp-help-common left no manual"):
        gimp_help_pairs(tmp_path, ["common"])
    arguments = ["gimp-help", "--cache", f"{tmp_path}", "--output", f"{tmp_path}/out"]
    result = CliRunner().invoke(main, [*arguments, "--language", "common"])
    assert result.exit_code == 1
    assert "left no manual" in result.stderr


@pytest.mark.parametrize(("languages", "originals"), [([], 2), (["en", "de"], 3)])
def test_command(tmp_path: Path, languages: list[str], originals: int) -> None:
    """The command line builds from cached packages, English unless told, and prints one line."""
    maze, lasso = "images/filters/maze.png", "images/toolbox/lasso.png"
    make_manual(tmp_path, "en", {"a.html": tag(maze, "Maze") + tag(lasso, "Lasso")})
    make_manual(tmp_path, "de", {"a.html": tag(maze, "Irrgarten") + tag(lasso, "Lasso")})
    arguments = ["gimp-help", "--cache", f"{tmp_path}", "--output", f"{tmp_path}/out"]
    options = [part for language in languages for part in ("--language", language)]
    result = CliRunner().invoke(main, [*arguments, *options], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert report["originals"] == report["samples"] == originals
    assert len(list((tmp_path / "out" / "shards").glob("*.tar"))) == 1
