"""Every link of the built site that stays in it leads to a page, and to a place on that page."""

from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from browser.conftest import SITE


class Page(HTMLParser):
    """What a page of HTML links and what can be linked on it."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = {"", "top"}  # a browser finds these two on any page
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        self.links |= {given[name] for name in ("href", "src") if name in given}


parsed = cache(Page)


def dead_links(path: Path) -> Iterator[str]:
    """One line for each link of the page that leads nowhere."""
    for link in sorted(parsed(path).links):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        if not target.is_file():
            yield f"{path.name}: {link!r} leads to no file"
        elif target.suffix == ".html" and unquote(parts.fragment) not in parsed(target).places:
            yield f"{path.name}: {link!r} leads to no place on {target.name}"


PAGES = sorted(SITE.rglob("*.html"))


def test_the_site_is_built():
    assert PAGES, "The site is not built. Run `make docs` first, or `make test-browser`."


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(SITE)))
def test_every_link_within_the_site_leads_somewhere(path):
    assert list(dead_links(path)) == []


def test_a_dead_link_is_told_with_its_page(tmp_path):
    here, there = tmp_path / "here.html", tmp_path / "there.html"
    there.write_text('<h1 id="known">There</h1>')
    links = ("there.html#known", "there.html#unknown", "gone.html", "https://example.org/")
    here.write_text("".join(f'<a href="{link}">on</a>' for link in links))
    assert list(dead_links(here)) == [
        "here.html: 'gone.html' leads to no file",
        "here.html: 'there.html#unknown' leads to no place on there.html",
    ]
