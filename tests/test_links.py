"""Links inside the repository, of every markdown file and of the prose of every notebook, lead there.

A page links a file beside it or a heading; both must be there. Addresses elsewhere are not asked, and
what Sphinx alone can name, terms of the glossary and functions, is for the links of the built site.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat
import pytest

LINK = re.compile(r"\]\((?!\w+:)([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+)$", re.MULTILINE)
FENCED = re.compile(r"^(```+|~~~+).*?^\1", re.MULTILINE | re.DOTALL)
NAMED_BY_SPHINX = ("term-", "support.")
IN_CODE = re.compile(r"`[^`\n]*`")
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Source:
    """A markdown file, or the markdown cells of a notebook."""

    path: Path

    @cached_property
    def prose(self) -> str:
        """Its text without code."""
        text = self.path.read_text(encoding="utf-8")
        if self.path.suffix == ".ipynb":
            cells = nbformat.reads(text, as_version=4).cells
            text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        return FENCED.sub("", text)

    @property
    def links(self) -> list[str]:
        return LINK.findall(IN_CODE.sub("", self.prose))

    @property
    def anchors(self) -> set[str]:
        """Its headings, as both GitHub and the site name them."""
        return {
            re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            for text in HEADING.findall(self.prose)
        }


def fault(source: Source, link: str) -> str:
    """Where a link leads that leads nowhere."""
    page, _, anchor = link.partition("#")
    target = source.path.parent / page if page else source.path
    if not target.exists():
        return f"nowhere, there is no {target}"
    if anchor and target.suffix in (".md", ".ipynb") and not anchor.startswith(NAMED_BY_SPHINX):
        anchors = Source(target).anchors
        if anchor not in anchors:
            return f"to no heading of {target.name}, there are {sorted(anchors)}"
    return ""


def sources() -> list[Source]:
    """The README, and what is in the folders that are written for readers."""
    below = (path for folder in ("notebooks", "benchmarks", "docs") for path in (ROOT / folder).rglob("*"))
    found = [*ROOT.glob("*.md"), *below]
    return [Source(path) for path in sorted(found) if path.suffix in (".md", ".ipynb")]


@pytest.mark.parametrize("source", sources(), ids=lambda source: str(source.path.relative_to(ROOT)))
def test_every_link_leads_somewhere(source):
    faults = {link: fault(source, link) for link in source.links}
    assert {link: told for link, told in faults.items() if told} == {}


def test_readers_pages_are_among_the_sources():
    names = {str(source.path.relative_to(ROOT)) for source in sources()}
    assert {"README.md", "notebooks/index.md", "notebooks/api/judge.md"} <= names
    assert {"notebooks/01_setup.ipynb", "benchmarks/results.md"} <= names
