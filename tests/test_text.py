"""Reviews on a page or a terminal: nothing that either would obey survives but line breaks."""

import pytest

from support.text import paragraphs, show_review, visible

REVIEW = "A <b>bold</b> film.<br /><br />With <script>alert('x')</script> & more.<br>End."


def test_paragraphs_are_cut_at_line_breaks_of_either_form():
    assert paragraphs("One.<br /><br />Two.<br>Three.<BR/>") == ["One.", "Two.", "Three."]


def test_markup_of_a_review_is_shown_and_never_obeyed():
    page = show_review(REVIEW, caption="<i>caption</i>").data
    assert "<script" not in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; more." in page
    assert page.count("<p>") == 3


def test_a_long_review_is_cut_after_the_given_number_of_words_and_says_how_many_follow():
    page = show_review("one two three<br />four five six seven", longest=5).data
    assert "<p>one two three</p><p>four five</p>" in page
    assert "… and 2 more words" in page
    assert "more words" not in show_review("one two<br />three", longest=3).data


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("\x1b[2J\x9b31m", r"\x1b[2J\x9b31m"),
        ("\u202eevil\u2066\u200f", r"\u202eevil\u2066\u200f"),
        ("a\rb\tc\x07\u2028\ud800", r"a\rb\tc\x07\u2028\ud800"),
    ],
    ids=["escape sequences", "bidirectional marks", "other control characters"],
)
def test_what_a_terminal_would_obey_is_written_out(text, written):
    assert visible(text) == written


def test_ordinary_text_in_any_script_stays_as_it_is_and_in_its_lines():
    text = "Größe, λ ≥ 0 …\n日本語 עברית 🙂"
    assert visible(text) == text
