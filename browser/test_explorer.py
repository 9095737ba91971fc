"""The pages beside the chapters, which need nothing but themselves: the explorer, and 08's `top.html`."""

import json
import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from browser.conftest import ROOT
from browser.test_site import SERIOUS

ALONE = ["explorer", "top"]
EXPLORER = ROOT / "notebooks" / "explorer.html"


@pytest.fixture
def explorer(page: Page, site: str) -> Page:
    page.goto(f"{site}/explorer.html")
    return page


def text_of(page: Page, side: str, number: int) -> str:
    return page.locator(f"#{side}-{number} blockquote").text_content()


def cell(page: Page, training: int, test: int):
    return page.locator(f"td[aria-label^='training review {training} on test review {test}:']")


def order(page: Page) -> list[str]:
    return page.locator(".matrix tbody tr:visible th").all_inner_texts()


def test_a_cell_that_is_clicked_shows_its_two_reviews(explorer):
    cell(explorer, 12, 3).click()
    pair = explorer.locator(".pair")
    assert pair.get_by_role("heading", name="Training review 12 on test review 3").is_visible()
    shown = pair.locator("blockquote").all_text_contents()
    assert shown == [text_of(explorer, "training", 12), text_of(explorer, "test", 3)]
    assert pair.locator("tr").count() == 3


def test_a_cell_that_is_pointed_at_tells_its_number(explorer):
    cell(explorer, 7, 2).hover()
    told = explorer.get_by_role("status").filter(has_text="on test review 2").inner_text()
    assert re.match(r"training review 7 on test review 2: [+−][\d.,]+, (helps|harms)$", told)


def test_the_keyboard_does_what_the_mouse_does(explorer):
    cell(explorer, 12, 3).click()
    for key in ("ArrowRight", "ArrowDown", "Enter"):
        explorer.keyboard.press(key)
    assert explorer.locator(".pair h2").inner_text() == "Training review 13 on test review 4"


def test_a_test_review_s_number_sorts_by_its_scores(explorer):
    explorer.locator(".matrix thead button").nth(4).click()
    scores = json.loads(explorer.locator("#data").text_content())["scores"]["influence"][4]
    best = sorted(range(len(scores)), key=lambda row: -scores[row])
    assert [int(name.split()[0]) for name in order(explorer)] == best


def test_labels_and_words_filter(explorer):
    explorer.locator("select[name=label]").select_option("positive")
    assert {name.split()[1] for name in order(explorer)} == {"(pos)"}
    explorer.get_by_label("Search in training reviews").fill("movie")
    rows = [int(name.split()[0]) for name in order(explorer)]
    assert rows
    assert all("movie" in text_of(explorer, "training", row).lower() for row in rows)


def test_other_scores_tell_other_numbers(explorer):
    def told():
        return cell(explorer, 5, 4).get_attribute("aria-label")

    before = told()
    explorer.locator("select[name=scores]").select_option("relative influence")
    assert told() != before


@pytest.mark.parametrize("name", ALONE)
def test_a_page_alone_fetches_nothing_and_has_no_fault(page, site, name):
    fetched, faults = [], []
    page.on("request", lambda request: fetched.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: message.type == "error" and faults.append(message.text))
    page.goto(f"{site}/{name}.html", wait_until="networkidle")
    assert [url for url in fetched if not url.endswith("favicon.ico")] == [f"{site}/{name}.html"]
    assert [fault for fault in faults if "favicon" not in fault and "404" not in fault] == []


@pytest.mark.parametrize("name", ALONE)
def test_a_phone_scrolls_a_page_alone_down_only(phone, site, name):
    phone.goto(f"{site}/{name}.html")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_explorer_shuts_nobody_out(page, site, scheme):
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.goto(f"{site}/explorer.html")
    found = Axe().run(page).response["violations"]
    serious = {one["id"]: one["nodes"][0]["html"] for one in found if one["impact"] in SERIOUS}
    assert serious == {}


def test_without_a_script_the_explorer_says_so_and_has_its_reviews(chromium: Browser):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(EXPLORER.as_uri())
    assert page.get_by_text("scripts are switched off here").is_visible()
    assert not page.locator(".tools").is_visible()
    assert page.locator("details").count() == 120
    context.close()
