"""The rendered site, page by page, as a reader's browser shows it."""

import json
import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from browser.conftest import ROOT, SITE


def book(name: str = "index") -> list[str]:
    """A page and those below it, in reading order, as the tables of contents name them."""
    source = ROOT / "notebooks" / f"{name}.md"
    text = source.read_text() if source.exists() else ""
    entries = re.findall(r"```{toctree}\n:hidden:\n\n(.*?)```", text, re.S)
    names = re.findall(r"([\w/]+)>?$", "".join(entries), re.M)
    return [name, *(page for below in names for page in book(below))]


PAGES = book()
CHAPTERS = [name for name in PAGES if re.match(r"\d\d_|appendix_", name)]
SERIOUS = ("serious", "critical")
HEAVY = 250_000  # bytes of HTML


def opened(page: Page, site: str, name: str, scheme: str = "light") -> Page:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.goto(f"{site}/{name}.html", wait_until="networkidle")
    if page.locator(".math").count():
        page.wait_for_function("window.MathJax?.startup?.promise !== undefined")
        page.evaluate("MathJax.startup.promise.then(() => true)")
    return page


@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_whole_and_from_here_alone(page, site, name):
    complaints = []
    page.on("console", lambda m: m.type == "error" and complaints.append(m.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
    page.on("response", lambda r: r.status >= 400 and complaints.append(f"{r.status}: {r.url}"))
    page.on(
        "request", lambda r: r.url.startswith((site, "data:", "blob:")) or complaints.append(f"from: {r.url}")
    )
    opened(page, site, name)
    assert complaints == []


@pytest.mark.parametrize("name", PAGES)
def test_every_formula_is_set(page, site, name):
    opened(page, site, name)
    formulas = page.locator(".math").count()
    assert page.locator(".math mjx-container svg").count() >= formulas
    assert page.locator("[data-mml-node=merror]").count() == 0
    assert "$" not in page.locator("article :is(p, li, td, figcaption)").all_inner_texts()


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_figure_is_there_and_says_what_it_shows(page, site, name):
    opened(page, site, name)
    images = page.locator("article img")
    assert images.count() == figures(name)
    for image in images.all():
        image.scroll_into_view_if_needed()
        assert image.evaluate("i => i.decode().then(() => i.naturalWidth)") > 0
        assert len(image.get_attribute("alt") or "") > 20


def figures(name: str) -> int:
    """How many the committed notebook has."""
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("name", CHAPTERS)
def test_hidden_cells_are_folded_and_unfold(page, site, name):
    opened(page, site, name)
    parameters = page.get_by_text("ci = False", exact=False).first
    assert not parameters.is_visible()
    page.locator("details.hide summary, details summary").first.click()
    assert parameters.is_visible()


def test_search_finds_what_damping_is(page, site):
    page.goto(f"{site}/search.html?q=damping", wait_until="networkidle")
    page.wait_for_selector("#search-results li a")
    found = page.locator("#search-results li a").all_inner_texts()
    assert "Glossary" in " ".join(found)


def test_next_walks_the_whole_book_and_previous_walks_back(page, site):
    opened(page, site, "index")
    there = [name_of(page, site)]
    while page.locator("a.next-page").count():
        page.locator("a.next-page").click()
        page.wait_for_load_state()
        there.append(name_of(page, site))
    back = [name_of(page, site)]
    while page.locator("a.prev-page").count():
        page.locator("a.prev-page").click()
        page.wait_for_load_state()
        back.append(name_of(page, site))
    assert there == PAGES
    assert back == PAGES[::-1]


def name_of(page: Page, site: str) -> str:
    return page.url.removeprefix(f"{site}/").split(".html")[0]


@pytest.mark.parametrize("name", PAGES)
def test_no_page_is_heavy(name):
    assert (SITE / f"{name}.html").stat().st_size < HEAVY


def test_an_error_that_is_raised_leads_to_what_it_means(page, site):
    opened(page, site, "api/influences")
    page.locator("dd a", has_text="NotFinite").first.click()
    assert page.url == f"{site}/api/influences.html#support.ekfac.errors.NotFinite"
    assert page.locator(":target").get_by_text("NotFinite").is_visible()


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_scrolls_down_only(phone, site, name):
    opened(phone, site, name)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_nobody_is_shut_out(page, site, name, scheme):
    """axe-core finds no serious fault of accessibility."""
    opened(page, site, name, scheme)
    found = Axe().run(page).response["violations"]
    serious = {
        fault["id"]: [node["html"][:160] for node in fault["nodes"][:3]]
        for fault in found
        if fault["impact"] in SERIOUS
    }
    assert serious == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_coloured_words_have_a_legend(page, site, scheme):
    opened(page, site, "07_words", scheme)
    legends = page.locator("article small", has_text="helps")
    assert legends.count()
    assert legends.first.is_visible()
