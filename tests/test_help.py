"""What somebody sees who does not know the command yet."""

import io
import re

import click
import pytest
from click.testing import CliRunner

from curate.cli import main
from curate.engine.summary import print_plan
from tests.support import launch

COMMANDS = sorted(main.commands)


def help_of(*arguments: str) -> str:
    done = CliRunner().invoke(main, [*arguments, "--help"], terminal_width=80)
    assert done.exit_code == 0
    return done.output


def test_the_help_fits_a_screen() -> None:
    lines = help_of().splitlines()
    assert len(lines) <= 24
    assert all(len(line) <= 80 for line in lines)
    assert not [line for line in lines[1:] if line.rstrip().endswith("...")], "a summary is cut"
    assert {line.split()[0] for line in lines if line.startswith("  ")} >= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    command = main.commands[name]
    assert command.help
    for option in command.params:
        assert isinstance(option, click.Argument) or getattr(option, "help", None), option.name
    assert all(len(line) <= 80 for line in help_of(name).splitlines())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    done = launch(_CURATE_COMPLETE=f"{shell}_source")
    assert done.returncode == 0
    assert "_CURATE_COMPLETE" in done.stdout
    words = {"COMP_WORDS": "curate re", "COMP_CWORD": "1" if shell != "fish" else "re"}
    offered = launch(_CURATE_COMPLETE=f"{shell}_complete", **words)
    assert "report" in offered.stdout


ROWS = [
    {"stage": "ingest", "table": "ingest", "state": "done", "why": "complete", "steps": []},
    {
        "stage": "embed",
        "table": "embed.thumbnails",
        "state": "resume",
        "why": "was begun and not finished",
        "steps": [
            {"step": "shards", "tasks": 16, "done": 3},
            {"step": "late", "tasks": None, "done": 0},
        ],
    },
]


class Terminal(io.StringIO):
    """A stream that says that people look at it."""

    def isatty(self) -> bool:
        return True


def test_a_plan_in_a_pipe_is_plain() -> None:
    stream = io.StringIO()
    print_plan(ROWS, 1_500_000, stream)
    assert stream.getvalue().splitlines() == [
        "done    ingest            complete",
        "resume  embed.thumbnails  was begun and not finished",
        "                          shards: 3 of 16 tasks done",
        "                          late: 0 of ? tasks done",
        "2 tables: 1 done, 1 resume. Disk needed at most: about 2 MB",
    ]


@pytest.mark.parametrize("columns", [30, 80, 200])
def test_a_plan_on_a_terminal_is_a_table(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    print_plan(ROWS, 1_500_000, stream)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    lines = shown.splitlines()
    assert all(len(line) <= columns for line in lines)
    assert lines[0].split() == ["table", "state", "tasks", "why"]
    whole = "".join("".join(lines).split())
    assert "2tables:1done,1resume." in whole
    if columns >= 80:
        assert "3 of 16+ done" in shown
        assert "was begun and not finished" in shown
