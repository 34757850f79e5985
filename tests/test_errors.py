import ast
import importlib
import inspect
import pickle
import pkgutil
import re
from pathlib import Path

import pytest

import curate
from curate import errors
from curate.errors import CurateError

PACKAGE = Path(curate.__file__).parent
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages([str(PACKAGE)], "curate.")
    if module.name != "curate.__main__"  # importing it runs it
)
ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


def public_names(path: Path) -> set[str]:
    """Return what a module defines at its top without an underscore, imports left out."""
    names: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            # A command is called by its name on the command line, never imported.
            if not any("main.command" in ast.unparse(one) for one in node.decorator_list):
                names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("name", MODULES)
def test_all_is_complete(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None
    assert module.__doc__, f"{name} must say what it is"
    listed = getattr(module, "__all__", None)
    defined = public_names(Path(module.__file__))
    if not defined and listed is None:
        return  # a package that only holds modules
    assert listed is not None, f"{name} must have __all__"
    assert len(set(listed)) == len(listed)
    for one in listed:
        assert hasattr(module, one), f"{name}.__all__ names {one}, which is not there"
    # Array is a name for a type, and stays in its module.
    unlisted = defined - set(listed) - {"Array"}
    assert not unlisted, f"{name}: list in __all__ or underscore: {', '.join(sorted(unlisted))}"


def drawn_tree() -> dict[str, str | None]:
    """Read the parent of each class from the drawing in the docstring."""
    assert errors.__doc__ is not None
    parents: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"^(\s+)([│ ]*)(?:[├└]── )?([A-Z]\w+Error)\b", line)
        if found is None:
            continue
        indent = found.start(3)
        above = [one for one in above if one[0] < indent]
        parents[found.group(3)] = above[-1][1] if above else None
        above.append((indent, found.group(3)))
    return parents


def test_the_drawing_is_the_tree() -> None:
    expected = {
        kind.__name__: None if kind is CurateError else kind.__bases__[0].__name__
        for kind in ERRORS
    }
    assert drawn_tree() == expected
    assert set(errors.__all__) == expected.keys()


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_errors_survive_the_way_from_a_worker(kind: type[CurateError]) -> None:
    error = pickle.loads(pickle.dumps(kind("here: must hold; got that; do this.")))
    assert type(error) is kind
    assert str(error) == "here: must hold; got that; do this."
    assert issubclass(kind, CurateError)
    assert kind.__doc__


def test_exit_codes() -> None:
    for kind in ERRORS:
        code = 3 if kind is errors.LimitExceededError else 1
        assert kind.exit_code == (2 if issubclass(kind, errors.UsageError) else code)


def test_every_error_is_raised_somewhere() -> None:
    text = "\n".join(path.read_text("utf-8") for path in PACKAGE.rglob("*.py"))
    groups = {"CurateError", "UsageError", "RunError"}
    for kind in ERRORS:
        if kind.__name__ not in groups:
            raised = re.search(rf"(raise|return) {kind.__name__}\(", text)
            assert raised, f"{kind.__name__} is never raised"
