"""Influence spread over words: nothing is lost on the way, and nothing of a stranger's gets through."""

import re
from dataclasses import replace

import numpy as np
import pytest

from support.chapters import words
from support.chapters.words import Word, mean_shares, show_words, strongest_words, word_influences
from tests.page import Page

TEXT = "Unwatchable, and yet I loved it.<br /><br />It isn't for everyone; I LOVED it!"
HOSTILE = 'a <script>alert("x")</script> & <b onclick=1>bold</b> film'
LIGHT, DARK = [((255, 255, 255), (0, 0, 0)), ((19, 20, 22), (207, 208, 208))]
"""(ground, text) of a plain page and of the documentation's dark theme."""


def numbers_for(tokenizer, text):
    return np.random.default_rng(0).normal(size=len(tokenizer(text)["input_ids"]))


@pytest.fixture
def review(tokenizer):
    return word_influences(tokenizer, TEXT, numbers_for(tokenizer, TEXT))


# Words


@pytest.mark.parametrize("text", [TEXT, HOSTILE, "", "naïve café — 日本映画 😀", "x" * 300])
def test_words_add_up_to_their_tokens_and_padding_changes_nothing(tokenizer, text):
    numbers = numbers_for(tokenizer, text)
    spread = word_influences(tokenizer, text, numbers)
    assert sum(word.influence for word in spread) == pytest.approx(numbers.sum(), abs=1e-12)
    assert word_influences(tokenizer, text, np.pad(numbers, (0, 9))) == spread


@pytest.mark.parametrize("extra", [-1, 1], ids=["too few", "something behind the end"])
def test_influences_of_another_review_are_refused(tokenizer, extra):
    count = len(tokenizer(TEXT)["input_ids"])
    with pytest.raises(ValueError, match="Are they another review's"):
        word_influences(tokenizer, TEXT, np.ones(count + extra))


def test_a_review_is_cut_where_the_model_stops_reading(tokenizer):
    spread = word_influences(tokenizer, TEXT, np.ones(6), max_tokens=6)
    assert [word.text for word in spread] == ["[CLS]", "Unwatchable", ",", "[SEP]"]


# The table


def test_the_table_adds_repetitions_and_starts_with_the_strongest(review):
    table = strongest_words(review, 100)
    assert table["influence"].abs().is_monotonic_decreasing
    loved = table.set_index("word").loc["loved"]
    assert loved["times"] == 2
    both = [word.influence for word in review if word.name == "loved"]
    assert loved["influence"] == pytest.approx(sum(both))
    assert table["times"].sum() == len(review)
    assert table["share"].sum() == pytest.approx(1)
    assert list(table["effect"] == "helps") == list(table["influence"] > 0)
    assert len(strongest_words(review, 5)) == 5


# Loudness


@pytest.mark.parametrize("scale", [1, -3])
def test_shares_of_all_occurrences_have_neither_signs_nor_a_scale_and_add_up_to_one(scale):
    spread = [Word("[CLS]", 0, 0, 9.0), Word("no", 0, 2, 1.0), Word(",", 2, 3, 5.0)]
    spread += [Word("No", 4, 6, -2.0), Word("way", 7, 10, 1.0)]
    louder = [replace(word, influence=scale * word.influence) for word in spread]
    assert mean_shares(louder).to_dict() == {"no": 0.375, "way": 0.25}


# A word taken out


def test_every_occurrence_of_a_word_is_taken_out_and_nothing_else():
    assert words.without("No, not now. NO<br />no!", "no") == ", not now. <br />!"
    assert words.without("one<br />two<BR>three", "line break") == "onetwothree"
    assert words.without(TEXT, "absent") == TEXT


# Coloured text


def test_hostile_text_is_shown_and_not_run(tokenizer):
    spread = word_influences(tokenizer, HOSTILE, numbers_for(tokenizer, HOSTILE))
    page = Page(show_words(spread, HOSTILE, "<script>caption</script>").data)
    assert page.kinds <= {"figure", "figcaption", "strong", "small", "span", "blockquote", "p", "br"}
    assert HOSTILE in page.text
    assert "<script>caption</script>" in page.text


def test_the_text_is_complete_and_its_line_breaks_are_kept(review):
    source = show_words(review, TEXT, "A caption").data
    assert Page(source).texts["blockquote"] == [TEXT.replace("<br />", "⏎")]
    assert source.count("<br>", source.index("<blockquote")) == 1


def test_signs_can_be_told_without_colour_and_a_legend_says_what_the_marks_mean(review):
    source = show_words(review, TEXT, "A caption").data
    page = Page(source)
    largest = max(abs(word.influence) for word in review if not word.is_special)
    for said in ("helps blue, underlined", "harms red, dotted", f"deepest colour {largest:.2g} "):
        assert said in page.text
    for word in review:
        sign, effect = ("+", "helps") if word.influence > 0 else ("−", "harms")
        assert f"{word.name}: {sign}{abs(word.influence):.2g}, {effect}" in page.having("title")
    assert 'aria-label="A caption' in source


def test_a_mark_is_solid_where_the_word_helps_dotted_where_it_harms_and_absent_where_it_does_nothing():
    spread = [Word("good", 0, 4, 2.0), Word("bad", 5, 8, -1.0), Word("so", 9, 11, 0.01)]
    source = show_words(spread, "good bad so", "A caption").data
    good, bad, faint = re.findall(r"<span[^>]*>(?:good|bad|so)</span>", source)
    assert ("solid" in good, "dotted" in bad, "style" in faint) == (True, True, False)
    source = show_words([Word("so", 0, 2, 0.0)], "so", "A caption").data
    assert "rgba" not in source[source.index("<blockquote") :]


def test_special_tokens_do_not_pale_the_words():
    spread = [Word("[CLS]", 0, 0, 100.0), Word("good", 0, 4, 1.0)]
    source = show_words(spread, "good", "A caption").data
    alphas = re.findall(r"rgba\(76,114,176,([\d.]+)\)[^>]*>(\[CLS\]|good)<", source)
    assert alphas == [(f"{words.DEEPEST:.2f}", "[CLS]"), (f"{words.DEEPEST:.2f}", "good")]


@pytest.mark.parametrize("color", [words.HELPS, words.HARMS], ids=["helps", "harms"])
@pytest.mark.parametrize(("ground", "ink"), [LIGHT, DARK], ids=["light", "dark"])
def test_text_under_the_deepest_veil_has_the_contrast_that_wcag_asks(color, ground, ink):
    veiled = [words.DEEPEST * c + (1 - words.DEEPEST) * g for c, g in zip(color, ground, strict=True)]
    brighter, darker = sorted([luminance(veiled), luminance(ink)], reverse=True)
    assert (brighter + 0.05) / (darker + 0.05) >= 4.5


def luminance(rgb):
    """Relative luminance as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb) / 255]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_a_merged_word_has_the_sum_of_its_pieces_and_equal_words_side_by_side_stay_two(tokenizer):
    _, *spread, _ = word_influences(tokenizer, "isn't no no", np.array([0, 1.0, -2.0, 4.0, 8.0, 9.0, 0]))
    assert spread == [Word("isn't", 0, 5, 3.0), Word("no", 6, 8, 8.0), Word("no", 9, 11, 9.0)]


def test_pieces_contractions_and_line_breaks_are_words_that_stand_where_they_say(review):
    assert [word.text for word in review[:6]] == ["[CLS]", "Unwatchable", ",", "and", "yet", "I"]
    assert "isn't" in [word.text for word in review]
    assert [word.text for word in review if word.is_line_break] == ["<br />", "<br />"]
    assert all(word.is_special or TEXT[word.start : word.end] == word.text for word in review)


@pytest.mark.parametrize("text", [TEXT, "a [CLS] film"], ids=["usual", "typed by a stranger"])
def test_only_what_the_tokenizer_added_is_special(tokenizer, text):
    spread = word_influences(tokenizer, text, numbers_for(tokenizer, text))
    assert [word.text for word in spread if word.is_special] == ["[CLS]", "[SEP]"]
