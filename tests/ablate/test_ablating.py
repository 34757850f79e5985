"""`curate ablate` on a written run: what it finds, what it refuses, and what a kill costs."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curate import storage
from curate.ablate import rounds as rounds_module
from curate.ablate.ablating import Request, ablate, describe_cost
from curate.ablate.grid import Setting, decide_all, open_select, propose, read_grid
from curate.ablate.labels import read_uids
from curate.ablate.pairs import choose_pairs
from curate.ablate.rounds import Rounds, plan_lines
from curate.ablate.students import (
    MODELS,
    SHAPES,
    Budget,
    commit_data,
    draw_captions,
    draw_order,
)
from curate.cli import main
from curate.engine.finished import read_finished
from curate.errors import ConfigError, InputError, OutputError
from curate.models.clip_proxy import ClipShape, build_clip
from curate.report.ablate_words import describe_ablation, tell_recommendation
from tests.ablate.finished import COUNT, FIRST_COPY, SWAPPED, uid_of, write_run
from tests.exports import Here, Silent
from tests.support import call, curate, list_tree, only_error

GRID = "- {select.max_mismatch_rate: null}\n- {select.max_mismatch_rate: 0.04}\n"


class Local(Here):
    """Trains in this process, and counts."""

    def __init__(self, most: int = 1000) -> None:
        self.trained: list[str] = []
        self._most = most

    def planned(self) -> int:
        return 1

    def map(
        self, function: Callable[..., Any], tasks: Sequence[str], *arguments: Any
    ) -> Iterator[tuple[str, Any]]:
        for task, result in super().map(function, tasks, *arguments):
            self.trained.append(task)
            yield task, result
            if len(self.trained) >= self._most:
                raise KeyboardInterrupt


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("written"))


@pytest.fixture
def out(written: Path, tmp_path: Path) -> Path:
    """A run of the test's own."""
    return shutil.copytree(written, tmp_path / "out")


def grid(tmp_path: Path, text: str = GRID) -> str:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return str(path)


def request(out: Path, grid: str | None, **changes: Any) -> Request:
    given = {"model": "heads", "seeds": 2, "held_out": 0.2, "epochs": 4.0, **changes}
    return Request(str(out), grid, **given)


def test_captions_that_are_wrong_are_dropped(out: Path, tmp_path: Path) -> None:
    before = {name: (out / name).read_bytes() for name in list_tree(out)}
    report = ablate(request(out, grid(tmp_path)), Local(), Silent())
    found = report["recommended"]
    assert found["options"] == "--set select.max_mismatch_rate=0.04"
    assert found["is_better"]
    # Of copies the better one stays, so that fewer than a third are left to drop.
    assert found["share_dropped"] == pytest.approx(1 / SWAPPED, abs=0.07)
    assert [row["kind"] for row in report["lines"]] == ["setting", "setting", "random", "cosine"]
    sizes = {row["trained_on"] for row in report["lines"][1:]}
    assert len(sizes) == 1
    assert report["lines"][1]["figures"].keys() == {"all", "rare", "rest"}
    assert json.loads((out / "ablate" / "ablate.json").read_text()) == report
    after = {name: (out / name).read_bytes() for name in before}
    assert after == before
    told = describe_ablation(report, "page")
    assert "Recommended: --set select.max_mismatch_rate=0.04" in told
    assert "95 %" in told
    page = (out / "ablate" / "index.html").read_text()
    assert page.count("<svg") == 5
    assert "--set select.max_mismatch_rate=0.04" in page
    assert "<script" not in page
    assert (out / "ablate" / "report.css").exists()
    left = [name for name in list_tree(out / "ablate") if name.startswith("work-")]
    assert all("/students/" in name for name in left)


def test_a_kill_costs_one_student_and_changes_nothing(
    written: Path, out: Path, tmp_path: Path
) -> None:
    asked = request(out, grid(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        ablate(asked, Local(most=3), Silent())
    rest = Local()
    report = ablate(asked, rest, Silent())
    assert len(rest.trained) == report["plan"]["students"] - 3
    other = shutil.copytree(written, tmp_path / "other")
    whole = ablate(request(other, asked.grid), Local(), Silent())
    assert report["lines"] == whole["lines"]
    idle = Local()
    again = ablate(asked, idle, Silent())
    assert idle.trained == []
    assert again["lines"] == whole["lines"]


def test_a_plan_is_all_that_was_asked_for(out: Path, tmp_path: Path) -> None:
    idle = Local()
    plan = ablate(request(out, grid(tmp_path), plan=True), idle, Silent())["plan"]
    assert idle.trained == []
    assert (plan["students"], plan["missing"]) == (8, 8)
    assert plan["seconds_each"] > 0
    assert describe_cost(plan).startswith("8 students of ")
    assert not [name for name in list_tree(out) if name.startswith("ablate/")]


def test_a_share_that_seeds_cannot_have_is_told(out: Path, tmp_path: Path) -> None:
    options = ["--grid", grid(tmp_path), "--model", "heads", "--seeds", "3", "--plan"]
    told = call("ablate", out, *options, "--held-out", "0.5").splitlines()
    assert told[0].startswith("12 students of ")
    assert told[1:] == [
        "Warning: --held-out 0.5 is lowered to 0.333: each of 3 seeds holds out clusters that no "
        "other does"
    ]
    path = tmp_path / "judges.csv"
    path.write_text("\n".join(["uid", *map(uid_of, range(150))]))
    for asked in ({"held_out": 0.5}, {"held_out": 0.9, "held_out_list": str(path)}):
        plan = ablate(request(out, options[1], plan=True, **asked), Local(), Silent())["plan"]
        assert plan["warnings"] == []


def test_the_command_gives_the_same_on_any_workers(
    written: Path, out: Path, tmp_path: Path
) -> None:
    options = ["--grid", grid(tmp_path), "--model", "heads", "--seeds", "2", "--epochs", "1",
               "--held-out", "0.2", "--no-controls"]  # fmt: skip
    done = curate("ablate", out, *options, "--workers", "2", "--json")
    assert done.returncode == 0, done.stderr
    other = shutil.copytree(written, tmp_path / "other")
    here = ablate(request(other, options[1], epochs=1.0, controls=False), Local(), Silent())
    assert json.loads(done.stdout)["lines"] == here["lines"]


def test_small_clips_learn_from_thumbnails_and_know_classes(out: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    rows = [f"{uid_of(number)},{('even', 'odd')[number // 2 % 2]}" for number in range(COUNT)]
    labels.write_text("\n".join(["uid,label", *rows]))
    changes = (
        "",
        ", mitigation.noise: 0.1",
        ", mitigation.text_mask: 0.5",
        ", load.weighted: true",
    )
    text = "".join(f"- {{mitigation.captions: 2{change}}}\n" for change in changes)
    asked = request(
        out, grid(tmp_path, text), model="small", epochs=0.2, labels=str(labels), controls=False
    )
    report = ablate(asked, Local(), Silent())
    assert all(0 <= row["figures"]["zero_shot"]["mean"] <= 1 for row in report["lines"])
    rows = report["lines"]
    assert len({row["trained_on"] for row in rows}) == 1
    assert len({json.dumps(row["figures"]) for row in rows}) == len(rows)


def test_larger_clips_see_pictures_twice_as_wide(out: Path, tmp_path: Path) -> None:
    room = open_select(str(out), read_finished(str(out)))
    pairs = choose_pairs(room, 0.3, 600, 0, 2)
    lines = plan_lines(decide_all(room, read_grid(grid(tmp_path))), pairs, False, False, 2)
    folder = str(tmp_path / "work")
    commit_data(room, pairs, Budget("larger", steps=2, batch=16, retries=0), None, folder)
    assert storage.read_array(f"{folder}/pixels.npy").shape == (len(pairs), 3, 64, 64)
    Rounds(lines, pairs, folder, seeds=2).run(Local(), Silent())
    for seed in (0, 1):
        hits = [line.scores()[seed] for line in lines]
        assert all(one.shape == pairs.held(seed).shape for one in hits)
        assert 0 < np.mean(hits) < 1


def test_the_command_knows_all_models_and_each_is_larger_than_the_one_before() -> None:
    option = next(one for one in main.commands["ablate"].params if one.name == "model")
    assert list(option.type.choices) == list(MODELS)
    models = [build_clip(ClipShape(2000, **shape)) for shape in SHAPES.values()]
    small, large, larger = (sum(p.numel() for p in model.parameters()) for model in models)
    assert large > 2 * small
    assert larger == pytest.approx(4 * large, rel=0.05)


def test_the_default_grid_drops_from_nothing_to_two_fifths(out: Path) -> None:
    room = open_select(str(out), read_finished(str(out)))
    settings = propose(room)
    decided = decide_all(room, settings)
    kept = [int(one.keep.sum()) for one in decided]
    assert kept == sorted(kept, reverse=True)
    assert settings[0].values == {"select.max_mismatch_rate": None}
    assert kept[-1] / kept[0] == pytest.approx(0.6, abs=0.02)


def test_a_stricter_cosine_walks_fewer_edges(out: Path, tmp_path: Path) -> None:
    text = "- {dedup.min_cosine: 0.9}\n- {}\n"
    room = open_select(str(out), read_finished(str(out)))
    stricter, own = decide_all(room, read_grid(grid(tmp_path, text)))
    copies = (COUNT - FIRST_COPY) // 2
    assert int(own.keep.sum()) == COUNT - copies
    assert int(stricter.keep.sum()) == COUNT - copies // 2


def test_held_out_clusters_are_not_trained_on(out: Path) -> None:
    room = open_select(str(out), read_finished(str(out)))
    pairs = choose_pairs(room, 0.2, 20_000, 0, 3)
    clusters = pairs.codes[:, 0]
    parts = [pairs.held(seed) for seed in range(3)]
    for seed, held in enumerate(parts):
        assert not set(clusters[held]) & set(clusters[pairs.trainable(seed)])
        assert len(set(clusters[held])) == len(held)
        assert len(set(clusters)) * 0.15 < len(held) < len(set(clusters)) * 0.25
    judged = np.concatenate(parts)
    assert len(set(judged)) == len(judged)
    assert pairs.apart
    # More seeds hold out smaller parts where they must, and the same where not.
    more = choose_pairs(room, 0.2, 20_000, 0, 5)
    assert (more.held(2) == parts[2]).all()
    many = choose_pairs(room, 0.2, 20_000, 0, 7)
    every = np.concatenate([many.held(seed) for seed in range(7)])
    assert sorted(every) == np.flatnonzero(many.judges).tolist()
    assert len(set(clusters)) / 7 * 0.7 < len(many.held(0)) < len(set(clusters)) / 7 * 1.3
    smaller = choose_pairs(room, 0.4, 800, 0, 2)
    assert 790 < len(smaller) <= 800


def test_a_caption_that_many_share_is_asked_once(tmp_path: Path) -> None:
    out = write_run(tmp_path / "out", swapped=False)
    (folder,) = (out / "stages").glob("ingest-*")
    for path in (folder / "shards").glob("*.parquet"):
        table = storage.read_table(str(path))
        captions = table["caption"].to_pylist()
        captions[::2] = ["Part of a Collection", "part of a  collection"] * 100
        at = table.schema.get_field_index("caption")
        storage.commit_table(str(path), table.set_column(at, "caption", pa.array(captions)))
    room = open_select(str(out), read_finished(str(out)))
    pairs = choose_pairs(room, 0.3, 20_000, 0, 3)
    texts = np.array(pairs.captions)
    for seed in range(3):
        held = pairs.held(seed)
        assert len(set(pairs.codes[held, 1])) == len(held)
        assert len(set(pairs.codes[held, 0])) == len(held)
        assert sum("ollection" in text for text in texts[held]) == 1
        assert sum("ollection" in text for text in texts[pairs.held_by == seed]) > 90
        assert len(held) > 90


def test_named_pairs_judge_and_nothing_of_their_clusters_is_trained_on(
    out: Path, tmp_path: Path
) -> None:
    named = [uid_of(number) for number in (*range(150), *range(FIRST_COPY, FIRST_COPY + 80, 2))]
    path = tmp_path / "judges.csv"
    path.write_text("\n".join(["uid", *named, "of-no-sample"]))
    room = open_select(str(out), read_finished(str(out)))
    pairs = choose_pairs(room, 0.2, 800, 0, 3, read_uids(str(path)))
    clusters = pairs.codes[:, 0]
    for seed in range(3):
        held, trainable = pairs.held(seed), pairs.trainable(seed)
        assert {pairs.uids[place] for place in held} == set(named)
        assert not set(clusters[held]) & set(clusters[trainable])
        assert (~trainable).sum() == len(named) + 40  # with the copies of some
    assert not pairs.apart
    assert len(pairs) <= 800
    path.write_text("\n".join(["uid", *named[:99]]))
    with pytest.raises(InputError, match="--held-out-list: must leave every seed at least 100"):
        choose_pairs(room, 0.2, 800, 0, 3, read_uids(str(path)))


def test_captions_are_drawn_from_those_of_dropped_copies(out: Path, tmp_path: Path) -> None:
    text = "- {mitigation.captions: 2}\n- {}\n- {load.weighted: true}\n"
    room = open_select(str(out), read_finished(str(out)))
    pairs = choose_pairs(room, 0.2, 20_000, 0, 3)
    decided = decide_all(room, read_grid(grid(tmp_path, text)))
    lines = plan_lines(decided, pairs, False, False, 3)
    known = next(line.training.captions for line in lines if "captions" in line.name)
    assert (pairs.codes[known[:, 0], 0] == pairs.codes[known[:, 1], 0]).all()
    samples, counts = np.unique(known[:, 0], return_counts=True)
    assert set(samples) == set(lines[0].training.places)
    assert set(counts) == {1, 2}
    twice = samples[counts == 2]
    drawn = draw_captions(np.repeat(twice, 200), known, 0).reshape(-1, 200)
    assert (drawn == twice[:, None]).mean() == pytest.approx(0.5, abs=0.01)
    assert (draw_captions(samples[counts == 1], known, 0) == samples[counts == 1]).all()
    report = ablate(request(out, grid(tmp_path, text), controls=False), Local(), Silent())
    assert len({row["trained_on"] for row in report["lines"]}) == 1
    assert len({row["figures"]["all"]["mean"] for row in report["lines"]}) == 3


def test_what_is_done_in_training_is_told_apart() -> None:
    values = {"select.max_mismatch_rate": 0.04, "mitigation.noise": 0.1, "load.weighted": True}
    setting = Setting(values)
    assert setting.options == "--set select.max_mismatch_rate=0.04"
    assert setting.training == "mitigation.noise=0.1 load.weighted=true"
    rival = {"name": "x", "mean": 0.004, "low": -0.002, "high": 0.01, "needed": 0.005}
    found = {
        "options": setting.options, "training": setting.training, "is_better": False,
        "comparisons": 8, "rival": rival,
    }  # fmt: skip
    told = tell_recommendation({"recommended": found})
    assert told[2].startswith("No setting is better than the loosest beyond noise")
    assert told[3] == (
        "The best of the 8 others, x, has a held-out R@10 higher by +0.0040 (95 %: -0.0020 to "
        "+0.0100, as the best of 8). A gain would have to be about 0.0050 to be told from noise "
        "here; with more held-out pairs or more --seeds, less."
    )
    assert told[1] == (
        "While training: mitigation.noise=0.1 load.weighted=true, by curate.load and "
        "curate.mitigation."
    )


def test_a_student_sees_samples_as_often_as_they_weigh() -> None:
    order = draw_order(np.array([3, 5, 9]), np.array([1.0, 2.0, 0.0]), 300, 4)
    counts = {place: int((order == place).sum()) for place in (3, 5, 9)}
    assert counts == {3: 100, 5: 200, 9: 0}
    assert (order == draw_order(np.array([3, 5, 9]), np.array([1.0, 2.0, 0.0]), 300, 4)).all()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- {select.max_mismatch_rate: 0.04}\n", "at least two settings"),
        (GRID.replace("null", "0.04"), "at least two settings"),
        ("- {select.max_mismach_rate: 1}\n- {}\n", "Did you mean select.max_mismatch_rate"),
        ("- {embed.encoder: x}\n- {}\n", "no parameter that can be compared"),
        ("- {select.max_mismatch_rate: 7}\n- {}\n", "max_mismatch_rate must be"),
        ("- {dedup.min_cosine: 0.5}\n- {}\n", "must be at least 0.7, from which the run looked"),
        ("- {dedup.min_cosine: high}\n- {}\n", "dedup.min_cosine must be in [0, 1]"),
        ("- {select.max_nsfw_probability: 0.5}\n- {}\n", "nsfw_probability must be a column"),
        ("- {select.min_caption_chars: 1}\n- {}\n", "all keep the same"),
        ("- {select.min_caption_chars: 999}\n- {}\n", "must keep something to train on"),
        ("a: 1\n", "must be a list of settings"),
        ("- {select.max_mismatch_rate: 2020-01-01}\n- {}\n", "must hold numbers, texts"),
        ("- &a {select.max_mismatch_rate: *a}\n- {}\n", "must hold numbers, texts"),
        ("- {mitigation.noise: 0.1}\n- {}\n", "knows no mitigation.noise"),
        ("- {mitigation.text_mask: 0.1}\n- {}\n", "knows no mitigation.text_mask"),
        ("- {mitigation.captions: 2.5}\n- {}\n", "captions must be a whole number in [1, 100]"),
        ("- {load.weighted: 1}\n- {}\n", "load.weighted must be true or false"),
        ("- {dedup.min_cosine: 1, mitigation.captions: 2}\n- {}\n", "this run has none"),
    ],
)
def test_grids_that_compare_nothing(out: Path, tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ablate(request(out, grid(tmp_path, text)), Local(), Silent())
    assert told in str(caught.value)


def test_what_else_a_user_can_do_wrong(out: Path, tmp_path: Path) -> None:
    good = grid(tmp_path)
    labels = tmp_path / "labels.csv"
    labels.write_text("uid,class\na,b\n")
    few = tmp_path / "few.csv"
    few.write_text(f"uid,label\n{uid_of(1)},a\n")
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n")
    rare = tmp_path / "rare.csv"
    rare.write_text(f"uid,label\n{uid_of(1)},a\n{uid_of(2)},b\n")
    cases: list[tuple[Request, type[Exception], str]] = [
        (request(tmp_path / "none", good), OutputError, "must hold a finished run"),
        (request(out, str(tmp_path / "no.yaml")), ConfigError, "must be a readable YAML file"),
        (request(out, good, held_out=0.01), InputError, "at least 100 pairs"),
        (request(out, good, seeds=1), ConfigError, "--seeds: must be at least 2"),
        (request(out, good, labels=str(tmp_path / "no.csv")), InputError, "no such path"),
        (request(out, good, labels=str(labels)), InputError, "must have the column label"),
        (request(out, good, labels=str(few)), InputError, "at least two classes"),
        (request(out, good, labels=str(tmp_path)), InputError,
         "^--labels .*: must be a table of uid and label; it is a folder. Name a file"),
        (request(out, good, labels=str(picture)), InputError, "^--labels .* cannot be read: 'utf"),
        (request(out, good, held_out_list=str(tmp_path)), InputError,
         "^--held-out-list .*: must be a table of uid; it is a folder"),
        (request(out, good, labels=str(rare)), InputError, "at least two of the pairs that judge"),
        (request(out, good, held_out_list=str(tmp_path / "no.csv")), InputError, "no such path"),
        (request(write_run(tmp_path / "t", thumbnail=False), good), InputError, "thumbnail"),
        (request(write_run(tmp_path / "s", mismatch_probability=False), None), ConfigError,
         "no probabilities of mismatch"),
    ]  # fmt: skip
    for asked, kind, told in cases:
        with pytest.raises(kind, match=told):
            ablate(asked, Local(), Silent())
    twice = tmp_path / "twice.csv"
    twice.write_text(f"uid,uid,label\n{uid_of(1)},x,a\n")
    with pytest.raises(InputError, match="must have the column uid once"):
        ablate(request(out, good, labels=str(twice)), Local(), Silent())
    for option in ("--held-out", "--epochs"):
        assert "is not a finite number" in call("ablate", out, option, "nan", exit_code=2)
    for option in ("--epochs", "--seeds"):
        assert "is not in the range" in call("ablate", out, option, str(10**12), exit_code=2)
    done = curate("ablate", tmp_path / "none")
    assert done.returncode == 2
    assert "must hold a finished run" in only_error(done.stderr)


def test_losers_get_no_further_seeds(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def is_behind(scores: Any, name: str, loosest: str, apart: bool) -> bool:
        assert apart
        seen.append(name)
        return name != loosest

    monkeypatch.setattr(rounds_module, "is_loser", is_behind)
    report = ablate(request(out, grid(tmp_path), seeds=3, epochs=0.5), Local(), Silent())
    assert seen
    assert [row["seeds"] for row in report["lines"]] == [3, 2, 2, 2]
    assert [row["stopped"] for row in report["lines"]] == [False, True, True, True]
    assert "stopped: clearly behind" in describe_ablation(report, "page")
