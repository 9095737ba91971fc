"""What is installed: names that are offered, what they need, and no more files than they read."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

import support

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imported(folder: Path) -> set[str]:
    """Packages of others that the modules of a folder import."""
    found = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found |= {name.partition(".")[0] for name in names}
    return found - sys.stdlib_module_names - {"support"}


def test_the_package_offers_its_names_before_they_are_imported():
    assert set(support.__all__) <= set(dir(support))


def test_a_name_that_is_not_offered_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Influence'"):
        _ = support.Influence


def test_the_engine_needs_what_is_declared_and_nothing_else():
    assert imported(ROOT / "support" / "ekfac") == set(SETTINGS["project"]["dependencies"])


def test_snapshots_and_banks_stay_in_the_repository():
    globs = SETTINGS["tool"]["setuptools"]["package-data"]["support"]
    files = {path for glob in globs for path in (ROOT / "support").glob(glob)}
    assert ROOT / "support" / "adapter" / "final" / "adapter_model.safetensors" in files
    assert sum(path.stat().st_size for path in files) < 4_000_000
