import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from curate import config
from curate.config import load_pipeline, parse_setting, read_yaml, shipped_pipelines
from curate.errors import ConfigError
from curate.stages import STAGES
from curate.stages.base import Stage, Table

SHIPPED = Path(__file__).parents[1] / "pipelines"


def write(folder: Path, text: str) -> str:
    path = folder / "pipeline.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(name: str, settings: tuple[tuple[str, str, Any], ...] = ()) -> str:
    """Load a pipeline that does not hold; return the error, which must be one line."""
    with pytest.raises(ConfigError) as caught:
        load_pipeline(name, settings)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ingest: {}\nembd: {}", ["'embd' must be a stage", "Did you mean embed?"]),
        ("ingest: {}\n7: {}", ["7 must be a stage"]),
        (
            "ingest: {}\nembed: {}\ndedup: {min_cosin: 0.9}",
            ["dedup has no parameter 'min_cosin'", "Did you mean min_cosine?"],
        ),
        ("ingest: {3: 1}", ["ingest has no parameter 3"]),
        (
            "ingest: {}\nembed: {}\ndedup: {min_cosine: 95}",
            ["dedup.min_cosine must be", "less than or equal to 1", "got 95"],
        ),
        (
            "ingest: {}\nembed: {}\ndedup: {min_cosine: high}",
            ["dedup.min_cosine must be", "valid number", "got 'high'", "cosine of image_emb"],
        ),
        ("ingest: {}\nembed: {}\ndedup: {max_probes: 2.5}", ["dedup.max_probes", "valid integer"]),
        ("ingest: {}\nembed: {}\ndedup: {min_cosine: .nan}", ["dedup.min_cosine"]),
        ("ingest: {}\nembed: {max_pixels: .inf}", ["embed.max_pixels"]),
        ("ingest: {format: zip}", ["ingest.format", "'webdataset'", "got 'zip'"]),
        ("ingest: {}\nembed: {encoder: clip}", ["embed.encoder", "open_clip:MODEL/PRETRAINED"]),
        (
            "ingest: {}\nembed: {}\ndedup: {}\nscore: {clip_proxies: 3}",
            ["score.clip_proxies must be even, as", "got 3"],
        ),
        (
            "ingest: {}\nembed: {}\nselect: {keep_fraction: {column: width, fraction: 3}}",
            ["select.keep_fraction.fraction", "got 3"],
        ),
        (
            "ingest: {}\nembed: {}\nselect: {thresholds: [{column: heigth, min: 3}]}",
            ["select.thresholds.0.column", "heigth"],
        ),
        ("ingest: {}\nembed: 5", ["embed must be a mapping of parameters", "got int"]),
        ("ingest: [1]", ["ingest must be a mapping", "got list"]),
        ("- ingest", ["must be a mapping of stages", "got list"]),
        ("", ["must be a mapping of stages", "got nothing"]),
        ("{}", ["must be a mapping of stages"]),
        ("ingest: {}\nembed: {}\ningest: {}", ["line 3", "'ingest' is given twice"]),
        (
            "ingest: {}\nembed: {}\ndedup:\n  seed: 2\n  seed: 3",
            ["line 5", "'seed' is given twice"],
        ),
        ("ingest: {", ["line 1", "must be valid YAML"]),
        ("ingest: !!python/object/apply:os.system [ls]", ["must be valid YAML"]),
        ("? [a, b]\n: {}", ["must be valid YAML"]),
        ("? {a: b}\n: {}", ["must be valid YAML"]),
        ("embed: {}", ["the first stage must be ingest", "got embed"]),
        (
            "ingest: {}\nselect: {}",
            ["select reads the column decode_reason", "Add embed before it"],
        ),
        ("ingest: {}\ndedup: {}\nembed: {}", ["dedup reads the column image_emb", "Add embed"]),
        (
            "ingest: {}\nembed: {}\nselect: {max_mismatch_rate: 0.1}",
            ["select reads the column mismatch_probability"],
        ),
    ],
)
def test_what_does_not_hold(tmp_path: Path, text: str, parts: list[str]) -> None:
    name = write(tmp_path, text)
    message = refusal(name)
    assert message.startswith(name)
    for part in parts:
        assert part in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in refusal(str(tmp_path / "none.yaml"))
    (tmp_path / "latin.yaml").write_bytes(b"ingest: {dataset: \xe9}")
    assert "not UTF-8" in refusal(str(tmp_path / "latin.yaml"))
    message = refusal("ofline")
    assert "Did you mean offline?" in message
    assert all(name in message for name in shipped_pipelines())


def test_a_folder_of_a_shipped_name_does_not_hide_the_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `curate run dedup --output dedup` makes such a folder, and is then run again.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dedup").mkdir()
    assert [stage.name for stage in load_pipeline("dedup").stages][:3] == [
        "ingest",
        "remove",
        "embed",
    ]


class _Again(Stage):
    """Writes what another stage writes."""

    name: ClassVar[str] = "again"

    def tables(self) -> tuple[Table, ...]:
        return (Table("again", ("width",)),)


def test_a_column_has_one_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.STAGES, "again", _Again)
    message = refusal(write(tmp_path, "ingest: {}\nembed: {}\nagain: {}"))
    assert "again writes width, which embed already writes" in message


def test_settings_override_the_file(tmp_path: Path) -> None:
    name = write(tmp_path, "ingest: {}\nembed: {}\ndedup:\n  seed: 2")
    pipeline = load_pipeline(
        name, [("dedup", "seed", 3), ("dedup", "min_cosine", 0.5), ("ingest", "inputs", ["/a"])]
    )
    assert pipeline.stages[2].model_dump()["seed"] == 3
    assert pipeline.stages[2].model_dump()["min_cosine"] == 0.5
    text = yaml.safe_load(pipeline.text)
    # The text is the recipe: what was set is in it, where this run's input lies is not.
    assert text == {"ingest": {}, "embed": {}, "dedup": {"seed": 3, "min_cosine": 0.5}}
    assert load_pipeline(write(tmp_path, pipeline.text)).stages[1:] == pipeline.stages[1:]
    assert "has no stage 'dedupe'. Did you mean dedup?" in refusal(name, (("dedupe", "seed", 1),))
    assert "Did you mean max_probes?" in refusal(name, (("dedup", "max_probe", 1),))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dedup.min_cosine=0.95", ("dedup", "min_cosine", 0.95)),
        ("ingest.dataset=a=b", ("ingest", "dataset", "a=b")),
        ("select.max_aspect=", ("select", "max_aspect", None)),
        ("select.max_aspect=null", ("select", "max_aspect", None)),
        ("select.prefer=[resolution]", ("select", "prefer", ["resolution"])),
        (
            "select.keep_fraction={column: clip_score, fraction: .3}",
            ("select", "keep_fraction", {"column": "clip_score", "fraction": 0.3}),
        ),
        (
            "embed.encoder=open_clip:ViT-B-32//a/b.pt",
            ("embed", "encoder", "open_clip:ViT-B-32//a/b.pt"),
        ),
        (" write.webdataset = true", ("write", "webdataset", True)),
    ],
)
def test_settings(text: str, expected: tuple[str, str, Any]) -> None:
    assert parse_setting(text) == expected


@pytest.mark.parametrize(
    "text", ["dedup", "dedup.min_cosine", "min_cosine=1", ".x=1", "a.=1", "=", "a.b={"]
)
def test_settings_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^--set {re.escape(text)}"):
        parse_setting(text)


def test_numbers_in_exponent_form_are_numbers(tmp_path: Path) -> None:
    # YAML 1.1 reads 1e-4, which has no dot, as a string.
    assert read_yaml("1e-4", "here") == "1e-4"
    name = write(tmp_path, "ingest: {}\nembed: {}\ndedup: {min_cosine: 1e-4}")
    assert load_pipeline(name).stages[2].model_dump()["min_cosine"] == 1e-4
    setting = parse_setting("dedup.min_cosine=5e-1")
    assert load_pipeline(name, [setting]).stages[2].model_dump()["min_cosine"] == 0.5


def test_only_true_and_false_are_booleans(tmp_path: Path) -> None:
    """YAML 1.1 would read the field `on` of a table as true, and Norwegian as false."""
    assert read_yaml("[true, False, on, no, y]", "here") == [True, False, "on", "no", "y"]
    path = write(
        tmp_path, "ingest: {}\nembed: {plugins: [language]}\nselect: {languages: [en, no]}"
    )
    assert load_pipeline(path).stages[-1].model_dump()["languages"] == ("en", "no")
    setting = parse_setting("select.score_tables=[{path: a.csv, on: url}]")
    stage = load_pipeline(path, [setting]).stages[-1].model_dump()
    assert stage["score_tables"][0]["on"] == "url"


def missing_stages(name: str) -> set[str]:
    return set(yaml.safe_load((SHIPPED / f"{name}.yaml").read_text("utf-8"))) - STAGES.keys()


def test_all_pipelines_are_shipped() -> None:
    assert shipped_pipelines() == sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    assert {"default", "offline", "dedup", "clip-score"} <= set(shipped_pipelines())


@pytest.mark.parametrize("name", shipped_pipelines())
def test_shipped_pipelines_hold(name: str) -> None:
    missing = missing_stages(name)
    if missing:
        pytest.skip(f"this version has no stage {', '.join(sorted(missing))}")
    pipeline = load_pipeline(name)
    assert pipeline.stages[0].name == "ingest"
    assert load_pipeline(str(SHIPPED / f"{name}.yaml")).stages == pipeline.stages
    writers = {stage.name for stage in pipeline.stages if stage.publishes}
    assert "write" in writers


@pytest.mark.parametrize("name", shipped_pipelines())
def test_every_default_has_its_reason(name: str) -> None:
    lines = (SHIPPED / f"{name}.yaml").read_text("utf-8").splitlines()
    assert lines[0].startswith("# ")
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if not indent or line.lstrip().startswith("#"):
            continue
        if line.rstrip().endswith(":"):
            continue  # a mapping: its members have the comments
        before = lines[number - 1].lstrip()
        # A parameter may share the comment of the one above it, within one mapping.
        shared = lines[number - 1].startswith(" " * indent) and not before.startswith("#")
        assert " # " in line or before.startswith("# ") or shared, f"{name}.yaml:{number + 1}"


def test_stages_are_known_by_their_names() -> None:
    for name, kind in STAGES.items():
        assert kind.name == name
        for field_name, declared in kind.model_fields.items():
            assert declared.description, f"{name}.{field_name} must say what it is"
