"""`curate audit` on checkpoints of a tiny model, and on folders of embeddings."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from curate import storage
from curate.audit import copies, tracking
from curate.audit.auditing import audit, check_limits, figures
from curate.audit.models import is_named
from curate.audit.panel import list_samples
from curate.audit.sources import Request
from curate.audit.tracking import track_series
from curate.engine.tracking import check_tracker
from curate.errors import ConfigError, CurateError, InputError, LimitExceededError, OutputError
from curate.models.encoders import torch_threads
from curate.report.audit_words import describe_audit
from curate.schema import public_columns, select_schema
from tests.audit.checkpoints import Pair, build, pairs, prepare, train, write_config, write_pairs
from tests.exports import KEPT, Silent, expected, make_run
from tests.support import curate, launch, only_error

COUNT = 32


class Trained:
    """A training with three checkpoints, one of a reference, and their data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = write_config(folder)
        self.candidates, self.held_out = pairs(COUNT, 1), pairs(COUNT, 2)
        self.candidates_tar = write_pairs(folder / "candidates.tar", self.candidates)
        self.held_out_tar = write_pairs(folder / "held-out.tar", self.held_out)
        with torch_threads(1):
            self._train()

    def _train(self) -> None:
        model, transform, tokenizer = build(self.config)
        panel = prepare(self.candidates, transform, tokenizer)
        for number, steps in ((2, 0), (9, 10), (10, 30)):
            train(model, panel, steps)
            # As open_clip's trainer writes them from several processes.
            state = {f"module.{name}": value for name, value in model.state_dict().items()}
            held = {"epoch": number, "name": "tiny", "state_dict": state, "optimizer": {}}
            torch.save(held, self.folder / f"epoch_{number}.pt")
        other, transform, tokenizer = build(self.config, 5)
        train(other, prepare(pairs(COUNT, 3), transform, tokenizer), 40)
        save_file(other.state_dict(), self.folder / "reference.safetensors")

    def request(self, checkpoints: str = "epoch_10.pt", **changes: object) -> Request:
        values: dict[str, object] = {
            "checkpoints": (
                checkpoints if is_named(checkpoints) else str(self.folder / checkpoints),
            ),
            "model": str(self.config),
            "candidates": (str(self.candidates_tar),),
            "held_out": (str(self.held_out_tar),),
        }
        return Request(**(values | changes))  # type: ignore[arg-type]

    def options(self) -> list[object]:
        return ["--model", self.config, "--candidates", self.candidates_tar,
                "--held-out", self.held_out_tar]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


def run(request: Request) -> dict:
    return audit(request, Silent())


def test_the_curve_of_a_training(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = curate(
        "audit", trained.folder / "epoch_*.pt", *trained.options(), "--output", out,
        "--reference", trained.folder / "reference.safetensors", "--json",
        "--max-memorization", "0.1",
    )  # fmt: skip
    assert done.returncode == 3
    line = only_error(done.stderr)
    assert "mean memorization must be at most 0.1 (--max-memorization)" in line
    assert "epoch_2.pt" not in line
    report = json.loads(done.stdout)
    assert report == json.loads((out / "audit.json").read_text())
    assert [one["step"] for one in report["checkpoints"]] == [2, 9, 10]
    first, _, last = (one["estimates"]["memorization"] for one in report["checkpoints"])
    assert first["low"] < 0 < first["high"]
    assert last["low"] > 0
    assert last["p_value"] < 1e-3
    assert last["mean"] > first["mean"]
    assert report["checkpoints"][2]["split"]["exposure"]["seen once"]["samples"] == COUNT
    recall = report["checkpoints"][2]["recall"]
    assert recall["against"] == "reference"
    assert -1 <= recall["ppg"] <= 1
    table = pq.read_table(out / "samples.parquet")
    assert len(table) == 3 * COUNT
    assert {"multimem", "clipmem", "memorization", "p_value", "seen"} <= set(table.column_names)
    page = (out / "index.html").read_text()
    assert "What the model memorized" in page
    assert page.count("<svg") == 2
    assert (out / "report.css").exists()


def test_a_limit_of_what_is_memorized_and_wrong(trained: Trained, tmp_path: Path) -> None:
    """The run that judged the candidates tells which are wrong; the first checkpoint is none."""
    uids = list_samples((str(trained.candidates_tar),), "--candidates").uids
    judged = write_run(tmp_path / "run", uids)
    done = curate(
        "audit", trained.folder / "epoch_*.pt", *trained.options(), "--run", judged, "--no-search",
        "--max-harmful", "0.01", "--json",
    )  # fmt: skip
    assert done.returncode == 3
    line = only_error(done.stderr)
    assert "memorized and wrong must be at most 0.01 (--max-harmful); got 0." in line
    report = json.loads(done.stdout)
    harmful = [one["harmful"] for one in report["checkpoints"]]
    assert harmful[0] == 0
    assert 0.01 < harmful[-1] <= 8 / COUNT
    check_limits(report, 9, max(harmful))


def test_without_a_reference_a_text_embedder_stands_for_it(trained: Trained) -> None:
    report = run(trained.request())
    one = report["checkpoints"][0]
    assert one["estimates"]["memorization"]["low"] > 0
    assert one["auc"] > 0.8
    assert one["recall"]["against"] == "text embedder"
    assert one["recall"]["k"] == 1


def test_what_is_wrong_must_be_known_for_its_limit(trained: Trained) -> None:
    with pytest.raises(ConfigError, match="--run OUT"):
        run(trained.request(max_harmful=0.1, search=False))


def test_the_share_memorized_and_wrong_has_a_limit() -> None:
    mean = {"mean": 0.0, "low": 0.0, "high": 0.0}
    report = {"checkpoints": [{"name": "x", "estimates": {"memorization": mean}, "harmful": 0.2}]}
    check_limits(report, None, 0.2)
    with pytest.raises(LimitExceededError, match=r"at most 0.1 \(--max-harmful\); got 0.2000"):
        check_limits(report, None, 0.1)


def overlapping(trained: Trained, path: Path) -> Path:
    """Held-out pairs of which one is a candidate as it is and one smaller."""
    import io

    from PIL import Image

    image, caption = trained.candidates[1]
    smaller = io.BytesIO()
    Image.open(io.BytesIO(image)).save(smaller, "JPEG", quality=85)
    given: list[Pair] = [*trained.held_out, trained.candidates[0], (smaller.getvalue(), caption)]
    return write_pairs(path, given)


def test_held_out_pairs_among_the_candidates_are_refused(trained: Trained, tmp_path: Path) -> None:
    tar = overlapping(trained, tmp_path / "both.tar")
    with pytest.raises(InputError, match=r"2 of 34 pairs are .*1 by bytes.*1 by near-duplicate"):
        run(trained.request(held_out=(str(tar),)))


def test_equal_names_of_other_pictures_are_no_overlap(trained: Trained, tmp_path: Path) -> None:
    for name, given in (("train", trained.candidates), ("val", trained.held_out)):
        (tmp_path / name).mkdir()
        write_pairs(tmp_path / name / "00000.tar", given)
    both = {"candidates": (str(tmp_path / "train"),), "held_out": (str(tmp_path / "val"),)}
    assert run(trained.request(**both))["held_out"] == COUNT
    write_pairs(tmp_path / "val" / "00000.tar", [trained.candidates[0], *trained.held_out[1:]])
    with pytest.raises(InputError, match=r"1 of 32 pairs are \(1 by bytes\)"):
        run(trained.request(**both))


def test_the_surest_evidence_of_an_overlap_is_told(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_CHUNK", 1)
    image, caption = trained.held_out[0]
    tar = tmp_path / "with-copies.tar"
    for more, kind in (([], "pixels"), ([(image, caption)], "bytes")):
        longer = (image + b"\0", caption)  # decodes to the same
        write_pairs(tar, [*trained.candidates[:3], longer, *more])
        with pytest.raises(InputError, match=rf"1 of 32 pairs are \(1 by {kind}\)"):
            run(trained.request(candidates=(str(tar),), search=False))


def test_pairs_that_are_held_out_and_candidates_are_found_without_a_search(
    trained: Trained, tmp_path: Path
) -> None:
    tar = overlapping(trained, tmp_path / "both.tar")
    with pytest.raises(InputError, match=r"1 of 34 pairs are .*1 by bytes"):
        run(trained.request(held_out=(str(tar),), search=False))
    report = run(trained.request(held_out=(str(tar),), search=False, drop_overlap=True))
    assert report["held_out"] == COUNT + 1  # the smaller one takes a search
    assert "1 held-out pairs are among the candidates" in report["warnings"][0]
    assert "by bytes and pixels alone" in report["warnings"][1]


def test_copies_are_counted_and_left_out(trained: Trained, tmp_path: Path) -> None:
    repeated = [*trained.candidates, *[trained.candidates[0]] * 4, trained.candidates[1]]
    tar = write_pairs(tmp_path / "repeated.tar", repeated)
    both = overlapping(trained, tmp_path / "both.tar")
    request = trained.request(candidates=(str(tar),), held_out=(str(both),), drop_overlap=True)
    report = run(request)
    assert report["held_out"] == COUNT
    assert "2 held-out pairs are among the candidates" in report["warnings"][0]
    parts = report["checkpoints"][0]["split"]["exposure"]
    assert [part["samples"] for part in parts.values()] == [COUNT - 2, 2, 5]
    assert report["clusters"] == COUNT


def test_a_held_out_picture_counts_once(trained: Trained, tmp_path: Path) -> None:
    tar = write_pairs(tmp_path / "thrice.tar", [*trained.held_out, *trained.held_out[:9] * 2])
    report = run(trained.request(held_out=(str(tar),)))
    assert report["held_out"] == COUNT
    assert "18 held-out pairs show what others of them show: left out" in report["warnings"]
    tar = write_pairs(tmp_path / "one.tar", trained.held_out[:1] * 3)
    with pytest.raises(InputError, match="--held-out: must be of at least 2 different pictures"):
        run(trained.request(held_out=(str(tar),)))


def test_another_architecture(trained: Trained, tmp_path: Path) -> None:
    wider = write_config(tmp_path, embed_dim=64)
    wider = wider.rename(tmp_path / "tiny-wider.json")
    with pytest.raises(ConfigError, match=r"another architecture: .* of other shapes"):
        run(trained.request(model=str(wider)))
    with pytest.raises(ConfigError, match="Did you mean"):
        run(trained.request(model="ViT-B-33"))


def test_a_model_that_open_clip_names(trained: Trained, tmp_path: Path) -> None:
    """A name with a file is that file and architecture, as a reference too."""
    file = trained.folder / "epoch_10.pt"
    build(trained.config)  # tells open_clip of the architecture
    named = f"open_clip:{trained.config.stem}/{file}"
    same = run(trained.request(named, model=None, search=False))
    assert same["checkpoints"][0]["name"] == named
    assert same["checkpoints"][0]["step"] == 10
    by_file = run(trained.request(search=False, reference=named))["checkpoints"][0]
    # Of the model beyond itself nothing is left.
    assert by_file["estimates"]["multimem"]["mean"] == pytest.approx(0, abs=1e-6)
    alone = run(trained.request(search=False))["checkpoints"][0]
    assert same["checkpoints"][0]["estimates"] == alone["estimates"]
    with pytest.raises(ConfigError, match="--model: says nothing of open_clip:"):
        run(trained.request(named, search=False))
    with pytest.raises(ConfigError, match=r"--model: must be given, to embed with .*epoch_10.pt"):
        run(trained.request(model=None, reference=named))
    with pytest.raises(ConfigError, match=r"^open_clip:ViT-B-33/.* Did you mean ViT-B-32"):
        run(trained.request(f"open_clip:ViT-B-33/{file}", model=None))
    with pytest.raises(ConfigError, match="must hold weights of ViT-S-32-alt; got those of anoth"):
        run(trained.request(f"open_clip:ViT-S-32-alt/{file}", model=None))


def test_a_name_and_a_local_file_through_the_command(trained: Trained, tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-S-32-alt").state_dict(), tmp_path / "small.pt")
    done = curate(
        "audit", f"open_clip:ViT-S-32-alt/{tmp_path}/small.pt", *trained.options()[2:],
        "--no-search", "--limit", "4", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["candidates"], report["held_out"]) == (4, 4)
    assert report["checkpoints"][0]["step"] == 0
    assert "too few for the interval" in report["checkpoints"][0]["warnings"][0]


def test_published_weights_that_cannot_be_had(trained: Trained, tmp_path: Path) -> None:
    # An empty cache and no network, whatever this machine has.
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    name = "open_clip:ViT-B-32/laion2b_s34b_b79k"
    done = launch("audit", name, *trained.options()[2:], **environment)
    assert done.returncode == 1
    line = only_error(done.stderr)
    assert line.startswith(f"Error: {name}: weights 'laion2b_s34b_b79k' of ViT-B-32 cannot be had:")
    assert line.endswith("Give a local checkpoint as open_clip:ViT-B-32/PATH.")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ViT-B-32", "as open_clip:ViT-B-32/PRETRAINED; got ''. open_clip knows openai"),
        ("ViT-B-32/laion3b", "got 'laion3b'. open_clip knows openai"),
        ("ViT-B-33/openai", "must name a model of open_clip; got 'ViT-B-33'. Did you mean ViT-B"),
    ],
)
def test_names_of_no_weights(trained: Trained, name: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run(trained.request(f"open_clip:{name}", model=None))
    assert str(caught.value).startswith(f"open_clip:{name}: must name ")
    assert told in str(caught.value)
    with pytest.raises(InputError, match="published weights as open_clip:MODEL/PRETRAINED"):
        run(Request(("ViT-B-32/openai",)))


def test_a_checkpoint_is_never_executed(trained: Trained, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match="objects that could run code"):
        run(trained.request(str(tmp_path / "bad.pt")))
    assert not (tmp_path / "executed").exists()
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(InputError, match="is no such file"):
        run(trained.request(str(tmp_path / "text.pt")))


def test_what_is_not_there_is_told_before_a_model_is_loaded(
    trained: Trained, tmp_path: Path
) -> None:
    (tmp_path / "text.pt").write_text("no checkpoint")
    request = trained.request(str(tmp_path / "text.pt"))
    none, folder = str(tmp_path / "none"), str(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    for change, told in (
        ({"reference": none}, "--reference .*: must be a checkpoint; no such file"),
        ({"reference": folder}, "^--reference .*folder: must be a checkpoint; it is a folder"),
        ({"candidates": (none,)}, "^--candidates .*none: .* no such path"),
        ({"held_out": (none,)}, "^--held-out .*none: .* no such path"),
        ({"held_out": (folder,)}, "^--held-out .*folder: must hold files; it is empty. Name anot"),
        ({"run": none}, "must hold a finished run; there is no such folder"),
    ):
        with pytest.raises(CurateError, match=told):
            run(replace(request, **change))


def test_a_panel_of_one(trained: Trained, tmp_path: Path) -> None:
    tar = write_pairs(tmp_path / "one.tar", trained.held_out[:1])
    with pytest.raises(InputError, match="--held-out: must be at least 2"):
        run(trained.request(held_out=(str(tar),)))


def test_a_reference_that_has_seen_the_candidates(trained: Trained) -> None:
    """The checkpoint before the last stands for a model that has not; it has."""
    report = run(trained.request(reference=str(trained.folder / "epoch_9.pt"), search=False))
    (line,) = [w for w in report["checkpoints"][0]["warnings"] if "reference" in w]
    assert "it has probably seen them" in line
    assert "sign test, p " in line
    assert f"Warning: {line}" in describe_audit(report)
    for path in (trained.candidates_tar, trained.config):
        with pytest.raises(InputError, match=rf"^--reference {path}: must hold tensors"):
            run(trained.request(reference=str(path), search=False))
    unseen = str(trained.folder / "reference.safetensors")
    report = run(trained.request(reference=unseen, search=False))
    assert not any("reference" in line for line in report["checkpoints"][0]["warnings"])


def test_what_is_missing_is_named(trained: Trained, tmp_path: Path) -> None:
    for name in ("model", "candidates", "held_out"):
        with pytest.raises(ConfigError, match=rf"--{name.replace('_', '-')}: must be given"):
            run(trained.request(**{name: ()}))
    (tmp_path / "mine.txt").touch()
    with pytest.raises(OutputError, match=r"mine.txt"):
        run(trained.request(output=str(tmp_path)))


def write_embeddings(folder: Path, pull: float, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for part, strength in (("candidates", 0.5 + pull), ("held_out", 0.5)):
        (folder / part).mkdir(parents=True)
        core = rng.standard_normal((90, 16))
        for name in ("image", "text", "sound"):
            rows = strength * core + rng.standard_normal(core.shape)
            np.save(folder / part / f"{name}.npy", rows, allow_pickle=False)
    return folder


def test_folders_of_embeddings_of_three_modalities(tmp_path: Path) -> None:
    model = write_embeddings(tmp_path / "model", 1, 0)
    reference = write_embeddings(tmp_path / "reference", 0, 1)
    report = run(Request((str(model),), reference=str(reference)))
    one = report["checkpoints"][0]
    assert report["modalities"] == ["image", "sound", "text"]
    assert one["estimates"]["memorization"]["low"] > 0
    assert one["estimates"]["multimem_pair_mean"]["mean"] == pytest.approx(
        one["estimates"]["multimem"]["mean"] / 3
    )
    assert figures(one)["auc"] == one["auc"]
    file = reference / "candidates" / "text.npy"
    with pytest.raises(ConfigError, match="--model: must not be given with folders of embeddings"):
        run(Request((str(model),), model="ViT-B-32"))
    for path, told in ((tmp_path / "none", "there is no such folder"), (file, "it is a file")):
        message = rf"^--reference {path}: must be a folder of embeddings, as {model} is; {told}"
        with pytest.raises(InputError, match=message):
            run(Request((str(model),), reference=str(path)))
    (model / "held_out" / "sound.npy").unlink()
    with pytest.raises(InputError, match="must hold the modalities"):
        run(Request((str(model),)))


def test_folders_whose_held_out_samples_are_candidates(tmp_path: Path) -> None:
    model = write_embeddings(tmp_path / "model", 1, 0)
    for name in ("image", "text", "sound"):
        paths = [model / part / f"{name}.npy" for part in ("candidates", "held_out")]
        candidates, held_out = (np.load(path) for path in paths)
        np.save(paths[1], np.concatenate([held_out, candidates[4:7]]), allow_pickle=False)
    with pytest.raises(InputError, match=r"3 of 93 samples are .* the first in row 90"):
        run(Request((str(model),)))
    done = curate("audit", model, "--drop-overlap", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["held_out"] == 90
    assert "3 held-out samples are among the candidates" in report["warnings"][1]
    repeated = write_embeddings(tmp_path / "repeated", 1, 0)
    for name in ("image", "text", "sound"):
        paths = [repeated / part / f"{name}.npy" for part in ("candidates", "held_out")]
        candidates, held_out = (np.load(path) for path in paths)
        candidates[1] = held_out[2] = candidates[0]
        for path, rows in zip(paths, (candidates, held_out), strict=True):
            np.save(path, rows, allow_pickle=False)
    with pytest.raises(InputError, match=r"1 of 90 samples are .* the first in row 2"):
        run(Request((str(repeated),)))
    clean = write_embeddings(tmp_path / "clean", 1, 0)
    with pytest.raises(InputError, match="model: must hold the 90 held-out samples of the"):
        run(Request((str(model), str(clean)), drop_overlap=True))
    (clean / "candidates" / "uids.txt").write_text("a\n" * 90)
    with pytest.raises(InputError, match="90 uids, one a line and none twice; got 90, 1 of them"):
        run(Request((str(clean),)))
    (clean / "candidates" / "uids.txt").unlink()
    assert (
        report["checkpoints"][0]["estimates"]
        == run(Request((str(clean),)))["checkpoints"][0]["estimates"]
    )
    # What a model that has collapsed makes of all is no sign of anything.
    for path in clean.glob("*/*.npy"):
        np.save(path, np.ones((90, 16)), allow_pickle=False)
    assert run(Request((str(clean),)))["held_out"] == 90


@pytest.mark.parametrize("options", [["--limit", 10_000], ["--seed", 0], ["--no-search"]])
def test_folders_are_measured_as_they_are(tmp_path: Path, options: list[object]) -> None:
    model = write_embeddings(tmp_path / "model", 1, 0)
    done = curate("audit", model, *options)
    assert done.returncode == 2
    assert only_error(done.stderr) == (
        f"Error: {options[0]}: must not be given with folders of embeddings, which {model} is. "
        "Leave it out."
    )


def test_equal_held_out_samples_of_folders_count_once(tmp_path: Path) -> None:
    model = write_embeddings(tmp_path / "model", 1, 0)
    alone = run(Request((str(model),)))
    copied = write_embeddings(tmp_path / "copied", 1, 0)
    for name in ("image", "text", "sound"):
        path = copied / "held_out" / f"{name}.npy"
        rows = np.load(path)
        again = rows[:9].copy()
        if name == "image":  # another picture of the same text and sound is a sample of its own
            again[8] = rows[50]
        np.save(path, np.concatenate([rows, again]), allow_pickle=False)
    report = run(Request((str(copied),), reference=str(copied)))
    assert report["held_out"] == 91
    assert report["warnings"][1] == (
        "8 held-out samples have the embeddings of others of them: left out"
    )
    for name in ("image", "text", "sound"):
        path = copied / "held_out" / f"{name}.npy"
        np.save(path, np.load(path)[:-1], allow_pickle=False)
    assert run(Request((str(copied),)))["checkpoints"][0]["auc"] == alone["checkpoints"][0]["auc"]
    for path in copied.glob("held_out/*.npy"):
        np.save(path, np.load(path)[:1].repeat(90, 0), allow_pickle=False)
    with pytest.raises(InputError, match="held_out must be of at least 2 different samples; got 1"):
        run(Request((str(copied),)))


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    model = write_embeddings(tmp_path / "model", 1, 0)
    path = model / "held_out" / "text.npy"
    np.save(path, np.load(path).astype(object), allow_pickle=True)
    with pytest.raises(InputError) as caught:
        run(Request((str(model),)))
    assert str(caught.value) == (
        f"{path}: must be an array of numbers; it holds Python objects, or is no .npy. Save it "
        "anew as float32, by numpy.save."
    )


def test_folders_of_different_widths(tmp_path: Path) -> None:
    model = write_embeddings(tmp_path / "model", 1, 0)
    for part in ("candidates", "held_out"):
        path = model / part / "text.npy"
        np.save(path, np.load(path)[:, :9], allow_pickle=False)
    done = curate("audit", model)
    assert done.returncode == 2
    assert "candidates text: must be 16 numbers wide, as candidates image; got 9." in only_error(
        done.stderr
    )


def write_run(out: Path, uids: list[str]) -> Path:
    """What a finished run leaves of its decisions: the first eight are wrong, the last ten rare."""
    count = len(uids)
    known = {
        "uid": uids,
        "cluster_id": uids,
        "cluster_size": [1] * (count - 3) + [2, 4, 7],
        "rarity": [0.1] * (count - 10) + [0.9] * 10,
        "mismatch_probability": [0.9] * 8 + [0.1] * (count - 8),
        "keep": [False] * 8 + [True] * (count - 8),
    }
    schema = select_schema(public_columns("decisions"))
    columns = [pa.array(known.get(f.name, [None] * count), f.type) for f in schema]
    storage.commit_table(str(out / "decisions/00000.parquet"), pa.table(columns, schema=schema))
    ended = {"status": "finished", "stages": {"ingest": {}}, "facts": {}}
    storage.commit_json(str(out / "run.json"), ended)
    return out


def test_a_run_tells_the_rare_from_the_wrong(trained: Trained, tmp_path: Path) -> None:
    uids = list_samples((str(trained.candidates_tar),), "--candidates").uids
    out = write_run(tmp_path / "run", uids)
    report = run(trained.request(run=str(out), search=False, output=str(tmp_path / "audit")))
    split = report["checkpoints"][0]["split"]
    counts = {kind: [part["samples"] for part in parts.values()] for kind, parts in split.items()}
    assert counts == {
        "exposure": [COUNT - 3, 2, 1],
        "rarity": [10, COUNT - 10],
        "verdict": [8, COUNT - 8],
        "rarity and verdict": [0, 10, 8, COUNT - 18],
        "decision": [COUNT - 8, 8],
    }
    harmful = report["checkpoints"][0]["harmful"]
    assert 0 < harmful <= 8 / COUNT
    check_limits(report, None, harmful)
    with pytest.raises(LimitExceededError, match="max-harmful"):
        check_limits(report, None, harmful - 0.01)
    told = describe_audit(report)
    assert "rarity and verdict" in told
    assert "the common and right" in told
    page = (tmp_path / "audit/index.html").read_text()
    assert page.count("<svg") == 6
    table = pq.read_table(tmp_path / "audit/samples.parquet")
    assert table["seen"].to_pylist()[-3:] == [2, 4, 7]
    write_run(tmp_path / "other", [f"{number:032x}" for number in range(20)])
    with pytest.raises(ConfigError, match=r"knows none of 32"):
        run(trained.request(run=str(tmp_path / "other"), search=False))


def test_what_a_run_kept_is_taken_as_candidates(trained: Trained, tmp_path: Path) -> None:
    out = make_run(tmp_path / "run", keep=True)
    panel = list_samples((str(out),), "--candidates")
    assert len(panel) == KEPT
    assert set(panel.uids) == set(expected(out))
    assert all(picture is not None for picture in panel.pictures(32))
    drawn = panel.draw(10, 0)
    assert drawn.uids == [uid for uid in panel.uids if uid in set(drawn.uids)]
    np.save(tmp_path / "rows.npy", np.ones((3, 4), np.float32), allow_pickle=False)
    with pytest.raises(InputError, match="got vectors"):
        list_samples((str(tmp_path / "rows.npy"),), "--candidates")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_the_curve_goes_to_a_tracker(tracker: str, tmp_path: Path) -> None:
    pytest.importorskip(tracker)
    for number, pull in ((9, 0.2), (10, 1.0)):
        write_embeddings(tmp_path / f"epoch_{number}", pull, 0)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    done = launch(
        "audit", tmp_path / "epoch_*", "--track", tracker, "--json",
        MLFLOW_TRACKING_URI=uri, WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "was not tracked" not in done.stderr
    results = json.loads(done.stdout)["checkpoints"]
    if tracker == "wandb":
        (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
        content = written.read_bytes()
        assert all(name.encode() in content for name in figures(results[0]))
        return
    import mlflow

    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("curate-audit").experiment_id])
    assert found.data.params["checkpoints"] == str((f"{tmp_path}/epoch_*",))
    for name, value in figures(results[0]).items():
        curve = [
            (one.step, one.value) for one in client.get_metric_history(found.info.run_id, name)
        ]
        assert curve == [(9, pytest.approx(value)), (10, pytest.approx(figures(results[1])[name]))]


def test_a_tracker_that_fails_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "_to_mlflow", lambda *_: 1 / 0)
    assert not track_series("mlflow", "name", {}, [])
    assert "was not tracked: division by zero" in caplog.text
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"curate\[wandb\]"):
        check_tracker("wandb")
