"""The API reference is complete: every module is on one page of it."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = ("experiments.collection", "support.finetune")
"""Their reference is `--help`."""


def modules() -> set[str]:
    """The modules of `support` by name: packages and commands have no page."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in ROOT.glob("support/**/*.py"))
    names = {".".join(path.parts) for path in paths if not path.name.startswith("__")}
    return {name for name in names if not name.startswith(COMMANDS)}


def test_every_module_is_on_one_page():
    pages = [page.read_text() for page in (ROOT / "notebooks" / "api").glob("*.md")]
    described = Counter(re.findall(r"automodule:: (\S+)", "".join(pages)))
    assert described == Counter(modules())
