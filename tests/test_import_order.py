"""The path of the data is the order of the folders: nothing imports what comes after it, and no job imports a job."""

import ast
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parent.parent / "library"
ORDER = [
    {"errors", "files", "tensorfile"},
    {"config"},
    {"flow"},
    {"conditioning"},
    {"memory"},
    {"models"},
    {"networks"},
    {"data"},
    {"sampling"},
    {"previews", "forecast"},
    {"caching", "training", "inference"},
    {"start"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
MODULES = sorted(path for path in LIBRARY.rglob("*.py") if path != LIBRARY / "__init__.py")


def imported(path: Path) -> set[str]:
    """The top-level parts of ``library`` that a module imports, at any depth of its code."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} uses a relative import"
            names = [f"{node.module}.{alias.name}" if node.module == "library" else node.module for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("library.")}
    return parts


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
    assert own in LEVEL, f"library/{own} has no place in the import order: add it to ORDER"
    for part in imported(path) - {own}:
        assert part in LEVEL, f"{path} imports library.{part}, which has no place in the import order"
        assert LEVEL[part] < LEVEL[own] or (LEVEL[part] == LEVEL[own] == 0), f"{path} imports library.{part}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_every_module_says_why_it_exists(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring and len(docstring) > 20, f"{path} has no docstring that says what it is for"
