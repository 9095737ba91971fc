"""The pages that `make notebooks` leaves: read from the disk, without a server or a network."""

import shutil

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from playwright.sync_api import Page

from experiments.collection import INDEX, MATHJAX, index_of, write_page


@pytest.fixture
def executed(tmp_path):
    """The page of a notebook with formulas, and one review that is about money."""
    review = new_output("display_data", {"text/html": "<p>It cost $5 and made $6.</p>"})
    cells = [
        new_markdown_cell("# Money\n\nWith $\\lambda$:\n\n$$F + \\lambda I$$"),
        new_code_cell("show_review()", outputs=[review]),
    ]
    shutil.copytree(MATHJAX, tmp_path / "mathjax")
    write_page(new_notebook(cells=cells), tmp_path / "01_money.html")
    write_page(index_of({"[Money](01_money.html)": 1.0}, {}), tmp_path / INDEX)
    return (tmp_path / "01_money.html").as_uri()


def test_formulas_are_set_from_the_disk_and_dollars_of_reviews_left_alone(page: Page, executed):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(executed, wait_until="networkidle")
    page.wait_for_selector("mjx-container svg")
    page.evaluate("MathJax.startup.promise.then(() => true)")
    assert page.locator("mjx-container").count() == 2
    assert page.get_by_text("It cost $5 and made $6.").is_visible()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_a_page_leads_to_the_list_of_all_and_back(page: Page, executed):
    page.goto(executed)
    page.get_by_role("link", name="All notebooks").click()
    page.get_by_role("link", name="Money").click()
    assert page.title() == "Money"
