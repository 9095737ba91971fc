"""Every link to a file or a heading of the repository leads there."""

from pathlib import Path

import pytest

from tests.links import dead_links, sources

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("source", sources(ROOT), ids=lambda s: str(s.path.relative_to(ROOT)))
def test_every_link_leads_somewhere(source):
    assert dead_links(source) == []


def test_readers_pages_are_among_the_sources():
    names = {str(source.path.relative_to(ROOT)) for source in sources(ROOT)}
    assert {"README.md", "notebooks/index.md", "notebooks/api/judge.md"} <= names
    assert {"notebooks/01_setup.ipynb", "benchmarks/results.md"} <= names
