"""Other people's readers and trainers on what `curate export` writes, by the commands it prints."""

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curate.engine.export import Request, export
from tests.exports import (
    KEPT,
    Found,
    Here,
    Page,
    Silent,
    expected,
    make_run,
    need,
    run_python,
)
from tests.support import read_folder

GROUPED = {"shard_samples": 5, "groups": 3}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def truth(out: Path) -> dict[str, Found]:
    return expected(out)


@pytest.fixture(scope="module")
def made(out: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports by layout."""
    folders = {}
    for layout in ("groups", "mds", "hf", "keep-list"):
        folders[layout] = tmp_path_factory.mktemp("export") / layout
        more = {"shard_samples": 40} if layout == "hf" else GROUPED
        export(Request(str(out), str(folders[layout]), layout, **more), Here(), Silent())
    return folders


def read_rows(text: str) -> dict[str, Found]:
    """Return what a script printed: a line of JSON per sample, uid first."""
    rows: dict[str, Found] = {}
    for line in text.splitlines():
        if line.startswith("["):
            uid, digest, caption, captions, weight = json.loads(line)
            assert uid not in rows
            rows[uid] = (digest, caption, captions, weight)
    return rows


#: Printed by every script for each sample.
SHOW = """
import hashlib, json, sys
def show(uid, image, caption, captions, weight):
    digest = hashlib.sha256(image).hexdigest()
    print(json.dumps([uid, digest, caption, list(captions), float(weight)]))
"""
TABLES = {
    "pandas": """
import pandas
table = pandas.read_parquet(sys.argv[1])
rows = table.to_dict("records")
for row in rows:
    show(row["uid"], row["image"]["bytes"], row["caption"], row["captions"], row["weight"])
""",
    "polars": """
import polars
for row in polars.read_parquet(sys.argv[1] + "/*.parquet").iter_rows(named=True):
    show(row["uid"], row["image"]["bytes"], row["caption"], row["captions"], row["weight"])
""",
    "duckdb": """
import duckdb
query = "select uid, image.bytes, caption, captions, weight from read_parquet(?)"
for row in duckdb.execute(query, [sys.argv[1] + "/*.parquet"]).fetchall():
    show(*row)
""",
}


@pytest.mark.parametrize("package", TABLES)
def test_tables(
    package: str, made: dict[str, Path], truth: dict[str, Found], tmp_path: Path
) -> None:
    need(package)
    text = run_python(SHOW + TABLES[package], made["hf"] / "data", folder=tmp_path)
    assert read_rows(text) == truth


@pytest.mark.parametrize("package", TABLES)
def test_keep_list(
    package: str, made: dict[str, Path], truth: dict[str, Found], tmp_path: Path
) -> None:
    need(package)
    code = {
        "pandas": "table = pandas.read_parquet(path).values.tolist()",
        "polars": "table = polars.read_parquet(path).rows()",
        "duckdb": "table = duckdb.execute('select * from read_parquet(?)', [path]).fetchall()",
    }[package]
    script = f"import json, sys, {package}\npath = sys.argv[1]\n{code}\nprint(json.dumps(table))"
    text = run_python(script, made["keep-list"] / "keep.parquet", folder=tmp_path)
    rows = {uid: (source, weight) for uid, _, source, weight in json.loads(text)}
    assert rows == {uid: ("0.tar", found[3]) for uid, found in truth.items()}


def test_datasets(made: dict[str, Path], truth: dict[str, Found], tmp_path: Path) -> None:
    need("datasets")
    code = """
from datasets import Image, load_dataset
samples = load_dataset(sys.argv[1], split="train")
assert isinstance(samples.features["image"], Image), samples.features
first = samples[0]
assert first["image"].size == (40, 36) and first["width"] in (40, None)
for row in samples.cast_column("image", Image(decode=False)):
    show(row["uid"], row["image"]["bytes"], row["caption"], row["captions"], row["weight"])
"""
    assert read_rows(run_python(SHOW + code, made["hf"], folder=tmp_path)) == truth


def test_datasets_reads_the_tars(out: Path, truth: dict[str, Found], tmp_path: Path) -> None:
    need("datasets")
    one_kind = make_run(tmp_path / "run", kinds=("JPEG",))
    export(Request(str(one_kind), str(tmp_path / "e"), "webdataset"), Here(), Silent())
    code = """
from datasets import Image, load_dataset
samples = load_dataset("webdataset", data_files={"train": sys.argv[1]}, split="train")
for row in samples.cast_column("jpg", Image(decode=False)):
    known = row["json"]
    assert known["uid"] == row["__key__"] and known["caption"] == row["txt"]
    show(known["uid"], row["jpg"]["bytes"], row["txt"], known["captions"], known["weight"])
"""
    text = run_python(SHOW + code, tmp_path / "e/*.tar", folder=tmp_path)
    assert read_rows(text) == expected(one_kind)


def test_streaming(made: dict[str, Path], truth: dict[str, Found], tmp_path: Path) -> None:
    need("streaming")
    code = """
from streaming import StreamingDataset
samples = StreamingDataset(local=sys.argv[1], batch_size=1)
for row in samples:
    show(row["uid"], row["image"], row["caption"], row["captions"], row["weight"])
"""
    assert read_rows(run_python(SHOW + code, made["mds"], folder=tmp_path)) == truth


def test_streams_repeat_by_weight(
    made: dict[str, Path], truth: dict[str, Found], tmp_path: Path
) -> None:
    need("streaming")
    page = Page((made["mds"] / "TRAINING.md").read_text())
    code = page.block("python", "from streaming").replace("batch_size=256", "batch_size=1")
    code += "\nimport json\nprint(json.dumps([sample['uid'] for sample in samples]))\n"
    drawn = Counter(json.loads(run_python(code, folder=tmp_path).splitlines()[-1]))
    assert drawn.keys() <= truth.keys()
    assert sum(drawn.values()) == pytest.approx(KEPT, abs=2)
    mean = np.mean([found[3] for found in truth.values()])
    for low, high in ((0.3, 0.5), (0.8, 1.1), (1.9, 2.3)):
        band = [uid for uid, found in truth.items() if low < found[3] < high]
        seen = sum(drawn[uid] for uid in band) / len(band)
        assert seen == pytest.approx(np.mean([truth[u][3] for u in band]) / mean, rel=0.1)


def test_webdataset_mixes_by_weight(
    made: dict[str, Path], truth: dict[str, Found], tmp_path: Path
) -> None:
    need("webdataset")
    page = Page((made["groups"] / "TRAINING.md").read_text())
    code = SHOW + page.block("python", "import webdataset")
    code += """
import itertools
drawn = {}
for sample in itertools.islice(samples, 9000):
    times = drawn.setdefault(sample["__key__"], [0, sample])
    times[0] += 1
for uid, (times, sample) in drawn.items():
    known = json.loads(sample["json"])
    image = sample.get("png") or sample["jpg"]
    show(uid, image, sample["txt"].decode(), known["captions"], known["weight"])
print({uid: times for uid, (times, _) in drawn.items()})
"""
    text = run_python(code, folder=tmp_path)
    assert read_rows(text) == truth
    times = json.loads(text.splitlines()[-1].replace("'", '"'))
    check_shares(times, truth)


def check_shares(times: dict[str, int], truth: dict[str, Found]) -> None:
    """Demand that samples were seen in proportion to their weights."""
    uids = list(truth)
    weights = np.array([truth[uid][3] for uid in uids])
    seen = np.array([times.get(uid, 0) for uid in uids])
    for low, high in ((0.3, 0.5), (0.8, 1.1), (1.9, 2.3)):
        band = (weights > low) & (weights < high)
        assert band.sum() == KEPT // 3
        share = weights[band].sum() / weights.sum()
        assert seen[band].sum() / seen.sum() == pytest.approx(share, rel=0.08)


#: open_clip's own pipeline, as it reads a validation set: every sample once.
DECODER = """
import hashlib, json, sys
from types import SimpleNamespace
from open_clip_train.data import get_wds_dataset
def digest(image):
    return hashlib.sha256(image.tobytes()).hexdigest()
given = SimpleNamespace(val_data=sys.argv[1], val_num_samples=None, batch_size=1, workers=0,
                        train_data_upsampling_factors=None)
read = get_wds_dataset(given, digest, False, tokenizer=lambda text: [text])
for images, texts in read.dataloader:
    print(json.dumps([*images, *texts]))
"""


def test_open_clip_decodes_every_sample(made: dict[str, Path], out: Path, tmp_path: Path) -> None:
    need("open_clip_train")
    need("webdataset")
    tars = sorted(path.name for path in made["groups"].glob("*.tar"))
    urls = f"{made['groups']}/{{{','.join(name.removesuffix('.tar') for name in tars)}}}.tar"
    text = run_python(DECODER, urls, folder=tmp_path)
    found = [tuple(json.loads(line)) for line in text.splitlines() if line.startswith("[")]
    shown = []
    for row in read_folder(out / "shards").select(["image", "caption"]).to_pylist():
        pixels = Image.open(io.BytesIO(row["image"])).convert("RGB").tobytes()
        shown.append((hashlib.sha256(pixels).hexdigest(), row["caption"]))
    assert len(found) == KEPT
    assert sorted(found) == sorted(shown)


TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
#: open_clip's own main, with a model that a test can afford; what it drew is counted.
TRAINER = """
import json, sys
from collections import Counter
import open_clip, torch
open_clip.add_model_config("tiny.json")
from open_clip_train import data, main
torch.set_num_threads(1)
given = dict(zip(sys.argv[1:], sys.argv[2:]))
urls, factors = given["--train-data"], given["--train-data-upsampling-factors"]
print("size", data.get_dataset_size(urls))
drawn = Counter(
    shard["url"].rsplit("/", 1)[-1]
    for shard in data.ResampledShards2(urls, factors, nshards=20_000, deterministic=True)
)
print("drawn", json.dumps(drawn))
main.main(sys.argv[1:])
"""


def test_open_clip_trains_on_the_groups(
    made: dict[str, Path], truth: dict[str, Found], tmp_path: Path
) -> None:
    need("open_clip_train")
    need("webdataset")
    installed = version("webdataset")
    if tuple(map(int, installed.split("."))) > (0, 2, 86):
        pytest.skip(f"open_clip's trainer needs webdataset 0.2.86 or older; got {installed}")
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    (tmp_path / "train.py").write_text(TRAINER)
    script = Page((made["groups"] / "TRAINING.md").read_text()).block("sh")
    command = f"{sys.executable} -W ignore train.py --device cpu --warmup 1 --log-every-n-steps 1"
    for printed, affordable in (
        ("python -m open_clip_train.main", command),
        ("--model ViT-B-32", "--model tiny"),
        ("--batch-size 256 --workers 4 --epochs 32", "--batch-size 15 --workers 1 --epochs 1"),
    ):
        assert printed in script
        script = script.replace(printed, affordable)
    done = subprocess.run(
        ["bash", "-ec", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"size ({KEPT}, 18)" in done.stdout
    log = done.stdout + done.stderr
    assert re.search(rf"Train Epoch: 0 \[\s*{KEPT}/{KEPT} \(100%\)\]", log), log[-3000:]
    assert "Handling webdataset error" not in log
    drawn = json.loads(re.search("^drawn (.*)$", done.stdout, re.M)[1])  # type: ignore[index]
    # A shard that is drawn gives each of its samples once.
    times = {}
    for name, number in drawn.items():
        with tarfile.open(made["groups"] / name) as tar:
            times.update({member.partition(".")[0]: number for member in tar.getnames()})
    assert times.keys() == truth.keys()
    check_shares(times, truth)
