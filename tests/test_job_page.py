"""The page needs nothing else, shows every text whole, and runs nothing that a stranger wrote."""

import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from support.job.examples import Examples
from support.job.top import Top, page
from tests.page import Page

HOSTILE = '<script>alert("x")</script> & <b onclick=1>bold</b> film, http://example.org'
BROKEN = "First line.<br /><br />Second line.\nThird."
QUERIES = [HOSTILE, "dull", "A query that nothing moves."]
CLASSES = {"negative": 0, "positive": 1}


def rows(query, effect, scores):
    return pd.DataFrame(
        {
            "query": query,
            "query_row": query + 40,
            "effect": effect,
            "place": np.arange(1, len(scores) + 1),
            "training_row": [100 * query + number for number in range(len(scores))],
            "score": scores,
            "share": np.abs(scores) / 20,
            "label": [number % 3 for number in range(len(scores))],
            "text": [f"{effect} {query} {number}" for number in range(len(scores))],
        }
    )


@pytest.fixture(scope="module")
def source():
    by_query = pd.concat(
        [rows(0, "helps", [4.0, 2.0, 1.0]), rows(0, "harms", [-5.0]), rows(1, "harms", [-0.25, -0.125])],
        ignore_index=True,
    )
    by_query.loc[0, "text"] = HOSTILE
    by_query.loc[1, "text"] = BROKEN
    overall = pd.DataFrame({"place": [1, 2], "training_row": [7, 8], "share": [0.5, 0.125]})
    overall = overall.assign(helps=[2, 0], label=[1, 0], text=[HOSTILE, "second"])
    texts = Dataset.from_dict({"text": QUERIES, "label": [0, 1, 1]})
    queries = Examples(np.array([40, 41, 42]), texts, Dataset.from_dict({}), "", 0)
    return page(Top(by_query, overall), queries, CLASSES, {"model": "<mine>", "scores": "plain"})


@pytest.fixture(scope="module")
def parsed(source):
    return Page(source)


def test_the_page_needs_nothing_from_elsewhere(source, parsed):
    assert not parsed.having("src")
    assert not {"script", "link", "img", "iframe"} & parsed.kinds
    assert all(target.startswith("#") for target in parsed.having("href"))
    assert "url(" not in source
    assert "@import" not in source
    assert source.count("http") == source.count("film, http://example.org")


def test_the_page_has_a_language_a_title_and_headings_in_order(source, parsed):
    assert source.startswith("<!doctype html>")
    assert parsed.tags[0] == ("html", {"lang": "en"})
    assert parsed.texts["title"] == parsed.texts["h1"]
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(lower - upper <= 1 for upper, lower in pairwise(levels))


def test_hostile_text_is_shown_and_not_run(source, parsed):
    assert parsed.texts["blockquote"].count(HOSTILE) == 3
    assert "<script" not in source
    assert "&lt;script&gt;" in source
    assert "<mine>" in parsed.texts["td"]


def test_line_breaks_of_a_text_are_kept_and_shown(source, parsed):
    assert "First line.\n\nSecond line.\nThird." in parsed.texts["blockquote"]
    assert re.search(r"blockquote \{[^}]*white-space: pre-line", source)


def test_every_query_has_its_section_even_one_that_nothing_moves(parsed):
    assert parsed.having("href") == ["#query-0", "#query-1", "#query-2"]
    assert parsed.texts["section"][2].count("None.") == 2
    for text, section in zip(QUERIES, parsed.texts["section"], strict=True):
        assert text in section


def test_labels_are_named_and_an_unknown_one_keeps_its_number(parsed):
    assert parsed.texts["h2"][1:] == [
        "Query 0: row 40, negative",
        "Query 1: row 41, positive",
        "Query 2: row 42, positive",
    ]
    said = parsed.texts["section"][0]
    for row in ("row 0, negative", "row 1, positive", "row 2, label 2"):
        assert row in said


def test_scores_and_shares_stand_beside_each_other(parsed):
    said = " ".join(parsed.texts["section"][1].split())
    assert "−0.25 1.25% row 100, negative" in said
    assert "−0.125 0.62% row 101, positive" in said
    assert "row 7, positive, helps 2 of 3" in " ".join(parsed.texts["summary"][0].split())
