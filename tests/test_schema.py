import ast
import re
from pathlib import Path

import pyarrow as pa
import pytest

import curate
from curate import plugins, schema
from curate.plugins import BUILT_IN
from curate.schema import (
    COLUMNS,
    REASONS,
    describe_columns,
    markdown_tables,
    public_columns,
    select_schema,
)
from curate.stages import STAGES

PACKAGE = Path(curate.__file__).parent
ROOT = PACKAGE.parent


def text_constants(path: Path) -> set[str]:
    """Return every string of a module that is not a docstring or a comment."""
    tree = ast.parse(path.read_text("utf-8"))
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def reason_literals(path: Path) -> set[str]:
    """Return the strings that a module uses as a reason, by the places where reasons stand."""
    tree = ast.parse(path.read_text("utf-8"))
    found: set[str] = set()

    def take(node: ast.AST | None) -> None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)

    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            for word in node.keywords:
                if word.arg is not None and word.arg.endswith("reason"):
                    take(word.value)
            if name == "Decoded" and len(node.args) == 4:
                take(node.args[3])
            if name == "first_reason":
                for argument in node.args:
                    take(argument)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                name = ast.unparse(target)
                if name.endswith("reason"):
                    take(node.value)
                if isinstance(target, ast.Subscript) and ast.unparse(target.value) == "failed":
                    take(target.slice)
    return found


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "schema.py"]


def test_reasons_used_are_reasons_known() -> None:
    used = {reason: path.name for path in sources() for reason in reason_literals(path)}
    assert len(used) > 8  # the search itself works
    unknown = {reason: where for reason, where in used.items() if reason not in REASONS}
    assert not unknown


def test_reasons_known_are_reasons_used() -> None:
    texts = set[str]().union(*(text_constants(path) for path in sources()))
    assert not [reason for reason in REASONS if reason not in texts]


@pytest.mark.parametrize("reason", REASONS)
def test_parameters_named_in_reasons_exist(reason: str) -> None:
    assert re.fullmatch(r"[a-z]+(_[a-z]+)+|mismatched|contaminated|nsfw", reason)
    for stage, field in re.findall(r"\b([a-z]+)\.([a-z_]+)", REASONS[reason]):
        assert stage in STAGES, f"{reason} names {stage}.{field}"
        assert field in STAGES[stage].model_fields, f"{reason} names {stage}.{field}"


@pytest.mark.parametrize("name", COLUMNS)
def test_every_column_is_described(name: str) -> None:
    column = COLUMNS[name]
    assert column.name == name
    assert re.fullmatch(r"[a-z0-9_]+", name)
    assert column.meaning
    assert not column.meaning.endswith(".")
    assert column.where in ("both", "decisions", "shards", "stage")
    if column.type is not None and pa.types.is_floating(column.type):
        assert column.unit, "a number has a unit or a range"


def test_every_column_of_a_stage_is_known_and_its_own() -> None:
    for name, kind in STAGES.items():
        stage = kind()
        for written_column in stage.writes():
            assert COLUMNS[written_column].stage == name
        assert {*stage.reads(), *stage.wants()} <= COLUMNS.keys()
    written = {c for kind in STAGES.values() for c in kind().writes()}
    written |= {c.name for name in BUILT_IN for c in plugins.find(name).columns}
    for column in COLUMNS.values():
        if column.stage in STAGES and column.stage != "write":
            assert column.name in written, f"nobody writes {column.name}"


def test_public_columns_are_those_of_the_contract() -> None:
    decisions, shards = public_columns("decisions"), public_columns("shards")
    assert decisions[0] == shards[0] == "uid"
    promised = {"uid", "key", "source_file", "caption", "keep", "reason", "failed_rules", "weight"}
    promised |= {"cluster_id", "representative_uid", "representative_cosine", "duplicate_level"}
    promised |= {"clip_score", "alignment_in", "alignment_out", "holdout_gap", "rarity"}
    promised |= {"memorization_score", "mismatch_probability", "memorization_kind"}
    promised |= {"alignment_in_stderr", "alignment_out_stderr", "holdout_gap_stderr"}
    promised |= {"memorization_score_stderr", "mismatch_probability_stderr"}
    assert promised <= set(decisions)
    written = {"uid", "key", "image", "caption", "captions", "width", "height", "weight", "rarity"}
    assert written <= set(shards)
    assert not {"image", "captions"} & set(decisions)
    assert not {"keep", "reason", "offset"} & set(shards)


def test_schemas() -> None:
    found = select_schema(["uid", "width"])
    assert found == pa.schema([("uid", pa.string()), ("width", pa.int32())])
    with pytest.raises(KeyError, match="depends on the encoder"):
        select_schema(["image_emb"])
    with pytest.raises(KeyError):
        select_schema(["nonsense"])


def test_descriptions_hold_every_column_and_reason() -> None:
    described = describe_columns()
    assert [column["name"] for column in described["columns"]] == list(COLUMNS)
    assert described["reasons"] == REASONS


def test_markdown_tables_are_tables() -> None:
    columns, reasons = markdown_tables().split("\n\n")
    for table, width in ((columns, 5), (reasons, 2)):
        for line in table.splitlines():
            assert len(re.split(r"(?<!\\)\|", line)) == width + 2, line
    public = {*public_columns("decisions"), *public_columns("shards")}
    assert set(re.findall(r"^\| `(\w+)`", columns, re.M)) == public
    assert re.findall(r"^\| `(\w+)`", reasons, re.M) == list(REASONS)


def test_the_readme_has_these_tables() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.search(r"<!-- columns -->\n(.*?)<!-- /columns -->", text, re.S)
    if found is None or not found.group(1).strip():
        pytest.skip("README.md has no table between <!-- columns --> and <!-- /columns --> yet")
    assert found.group(1).strip() == markdown_tables(), "run `curate columns --markdown`"


def test_columns_keep_their_order() -> None:
    # Tables are read by position in places: a column is added, never moved, without thought.
    assert list(schema.COLUMNS)[:3] == ["uid", "key", "source_file"]
