"""Every link to a file or a heading of the repository leads there, and a dead one is told."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from tests.links import Source, dead_links, sources

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("source", sources(ROOT), ids=lambda s: str(s.path.relative_to(ROOT)))
def test_every_link_leads_somewhere(source):
    assert dead_links(source) == []


def test_readers_pages_are_among_the_sources():
    names = {str(source.path.relative_to(ROOT)) for source in sources(ROOT)}
    assert {"README.md", "notebooks/index.md", "notebooks/api/judge.md"} <= names
    assert {"notebooks/01_setup.ipynb", "benchmarks/results.md"} <= names


@pytest.fixture
def page(tmp_path):
    """Writes a page of markdown beside a page and a notebook that have one heading each."""
    (tmp_path / "there.md").write_text("# A page\n\n```\n# no heading\n```\n")
    notebook = new_notebook(cells=[new_markdown_cell("## What λ does, *really*")])
    nbformat.write(notebook, tmp_path / "there.ipynb")

    def page(text: str) -> Source:
        (tmp_path / "page.md").write_text(text)
        return Source(tmp_path / "page.md")

    return page


@pytest.mark.parametrize(
    "link",
    [
        "there.md",
        "there.md#a-page",
        "there.ipynb#what-λ-does-really",
        "#below",
        "there.md#term-Fisher",
        "https://example.org/nothing",
    ],
)
def test_a_good_link_is_no_matter(page, link):
    assert dead_links(page(f"[this]({link})\n\n## Below\n")) == []


@pytest.mark.parametrize("text", ["`[code](gone.md)`", "```\n[code](gone.md)\n```"])
def test_links_in_code_are_not_followed(page, text):
    assert dead_links(page(text)) == []


@pytest.mark.parametrize(
    ("link", "told"),
    [
        ("gone.md", "page.md: the link 'gone.md' leads nowhere"),
        ("there.md#no-heading", "to no heading of there.md, there are ['a-page']"),
        ("there.ipynb#other", "to no heading of there.ipynb, there are ['what-λ-does-really']"),
        ("#above", "to no heading of page.md, there are ['below']"),
    ],
)
@pytest.mark.parametrize("kind", ["", "!"])
def test_a_dead_link_is_told_with_its_page(page, kind, link, told):
    (message,) = dead_links(page(f"{kind}[this]({link})\n\n## Below\n"))
    assert told in message
