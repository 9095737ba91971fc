"""The page that asks, as a reader uses it: with a mouse, with keys alone, and without scripts."""

import pytest

from browser.test_site import opened

ROWS = "#behind tr"


@pytest.fixture
def asked(page, site):
    return opened(page, site, "ask")


def test_a_question_is_answered_with_ten_training_reviews(asked):
    assert asked.locator(ROWS).count() == 10
    assert "The model says:" in asked.locator("#said").inner_text()
    assert "1,000 training reviews compared" in asked.locator("#kept").inner_text()


@pytest.mark.parametrize(("name", "value"), [("bytes", "64"), ("kind", "relative")])
def test_fewer_bytes_and_the_other_influence_change_the_answer(asked, name, value):
    before = asked.locator("#behind").inner_text()
    asked.locator(f'input[name="{name}"][value="{value}"]').check()
    assert asked.locator("#behind").inner_text() != before
    assert asked.locator(ROWS).count() == 10


def test_more_bytes_find_more_of_the_exact_first_ten(asked):
    def found(size):
        asked.locator(f'input[name="bytes"][value="{size}"]').check()
        right = 0
        for question in range(asked.locator("#ask-question option").count()):
            asked.locator("#ask-question").select_option(index=question)
            right += int(asked.locator("#kept").inner_text().rpartition(", ")[2].partition(" ")[0])
        return right

    few, some, most = map(found, (64, 256, 1024))
    assert few < some < most


def test_a_search_leaves_the_reviews_with_these_words(asked):
    asked.get_by_label("Only reviews with the words").fill("watch")
    assert "hold “watch”" in asked.locator("#found").inner_text()
    for row in asked.locator(ROWS).all_inner_texts():
        assert "watch" in row.lower()


def test_keys_are_enough(asked):
    asked.get_by_label("Question").focus()
    before = asked.locator("#asked").inner_text()
    asked.keyboard.press("ArrowDown")
    assert asked.locator("#asked").inner_text() != before
    asked.keyboard.press("Tab")
    asked.keyboard.press("ArrowUp")
    assert "at 256 bytes" in asked.locator("#kept").inner_text()


def test_without_scripts_the_page_says_what_it_would_do(chromium, site):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{site}/ask.html")
    assert page.get_by_text("scripts are switched off").is_visible()
    assert not page.locator("#ask").is_visible()
    context.close()
