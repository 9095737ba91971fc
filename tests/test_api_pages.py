"""The API reference has what a user calls: every name that a notebook imports, and the engine's classes."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import nbformat
import pytest

from support import ekfac
from support.ekfac import errors

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def documented() -> set[str]:
    """Modules that a page describes, all of them or some of their names."""
    pages = "".join(page.read_text() for page in (NOTEBOOKS / "api").glob("*.md"))
    return set(re.findall(r"automodule:: (\S+)", pages))


def imported(notebook: Path) -> set[tuple[str, str]]:
    """(module, name) of what the notebook imports from `support`."""
    cells = nbformat.read(notebook, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    return {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "support"
        for alias in node.names
    }


def home(module: str, name: str) -> str:
    """The module that defines a name, or is it."""
    found = getattr(importlib.import_module(module), name, None)
    if found is None:
        found = importlib.import_module(f"{module}.{name}")
    return found.__name__ if inspect.ismodule(found) else getattr(found, "__module__", module)


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_whatever_a_notebook_imports_is_documented(notebook):
    homes = {home(*one) for one in imported(notebook)}
    ours = {name for name in homes if name.partition(".")[0] == "support"}
    assert ours <= documented()


def test_the_engine_s_classes_and_errors_are_documented():
    public = {getattr(ekfac, name).__module__ for name in ekfac.__all__}
    assert public | {errors.__name__} <= documented()
