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
from curate.audit import tracking
from curate.audit.auditing import Request, audit, check_limits, figures
from curate.audit.panel import list_samples
from curate.audit.tracking import track_series
from curate.engine.tracking import check_tracker
from curate.errors import ConfigError, CurateError, InputError, LimitExceededError, OutputError
from curate.models.encoders import torch_threads
from curate.report.audit_words import describe_audit
from curate.schema import public_columns, select_schema
from tests.audit.checkpoints import Pair, build, pairs, prepare, train, write_config, write_pairs
from tests.exports import KEPT, Silent, expected, make_run
from tests.support import curate, only_error

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
            "checkpoints": (str(self.folder / checkpoints),),
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


def test_another_architecture(trained: Trained, tmp_path: Path) -> None:
    wider = write_config(tmp_path, embed_dim=64)
    wider = wider.rename(tmp_path / "tiny-wider.json")
    with pytest.raises(ConfigError, match=r"another architecture: .* of other shapes"):
        run(trained.request(model=str(wider)))
    with pytest.raises(ConfigError, match="Did you mean"):
        run(trained.request(model="ViT-B-33"))


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
    none = str(tmp_path / "none")
    for change, told in (
        ({"reference": none}, "--reference .*: must be a checkpoint; no such file"),
        ({"candidates": (none,)}, "no such path"),
        ({"held_out": (none,)}, "no such path"),
        ({"run": none}, "must hold a finished run; there is no such folder"),
    ):
        with pytest.raises(CurateError, match=told):
            run(replace(request, **change))


def test_a_panel_of_one(trained: Trained, tmp_path: Path) -> None:
    tar = write_pairs(tmp_path / "one.tar", trained.held_out[:1])
    with pytest.raises(InputError, match="--held-out: must be at least 2"):
        run(trained.request(held_out=(str(tar),)))


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
    with pytest.raises(ConfigError, match="--model: must not be given with folders of embeddings"):
        run(Request((str(model),), model="ViT-B-32"))
    (model / "held_out" / "sound.npy").unlink()
    with pytest.raises(InputError, match="must hold the modalities"):
        run(Request((str(model),)))


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
    storage.commit_json(str(out / "run.json"), {"status": "finished", "stages": {}})
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
def test_figures_go_to_a_tracker(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(tracker)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    model = write_embeddings(tmp_path / "model", 1, 0)
    report = run(Request((str(model),)))
    series = [(step, figures(report["checkpoints"][0])) for step in (1, 2)]
    check_tracker(tracker)
    assert track_series(tracker, "name", {"model": "tiny"}, series)
    if tracker == "wandb":
        assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
        return
    import mlflow

    (found,) = mlflow.search_runs(experiment_names=["curate-audit"], output_format="list")
    assert found.data.metrics["memorization"] == pytest.approx(series[0][1]["memorization"])
    assert found.data.params == {"model": "tiny"}


def test_a_tracker_that_fails_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "_to_mlflow", lambda *_: 1 / 0)
    assert not track_series("mlflow", "name", {}, [])
    assert "was not tracked: division by zero" in caplog.text
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"curate\[wandb\]"):
        check_tracker("wandb")
