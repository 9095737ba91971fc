"""The strongest are those that a sort of the whole matrix would find, without holding the matrix; their
page needs nothing else, shows every text whole, and runs nothing that a stranger wrote."""

import re
from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset

from support.job.errors import StepMissing, StoreDamaged
from support.job.examples import Examples
from support.job.store import Store
from support.job.top import page, strongest
from tests.page import Page

QUERIES, TRAINING = 3, 11
SCORES = np.random.default_rng(0).normal(size=(QUERIES, TRAINING))
OWN = np.random.default_rng(1).uniform(0.1, 4, size=TRAINING)


def examples(rows, texts=None, classes=2):
    rows = np.asarray(rows)
    texts = {"text": texts or [f"text {row}" for row in rows], "label": [int(row) % classes for row in rows]}
    return Examples(rows, Dataset.from_dict(texts), Dataset.from_dict({}), "", 0)


TRAINED_ON, ASKED = examples(np.arange(TRAINING) * 2 + 100), examples([4, 7, 9])


def stored(folder, scores=SCORES, chunks=(2, 4), own=None):
    store = Store(folder)
    store.begin()
    store.make_array("scores", scores.shape, chunks, "float64")
    store.write("scores", tuple(map(range, scores.shape)), scores)
    if own is not None:
        store.make_array("self_influences", own.shape, chunks[1:], "float64")
        store.write("self_influences", (range(len(own)),), own)
    return store


def lose(store, chunk):
    (store.folder / "results.zarr" / chunk).unlink()


def dense(scores, query, sign, count):
    """Training numbers by a stable sort of one row of the matrix; only those of that sign."""
    order = np.argsort(-sign * scores[query], kind="stable")
    return [number for number in order.tolist() if sign * scores[query, number] > 0][:count]


def check(top, scores, count):
    shares = np.abs(scores) / np.abs(scores).sum(axis=1, keepdims=True)
    for query in range(len(scores)):
        for effect, sign in {"helps": 1, "harms": -1}.items():
            by_query = top.by_query[top.by_query["query"] == query]
            found = by_query[by_query["effect"] == effect]
            numbers = dense(scores, query, sign, count)
            assert found["training_row"].tolist() == TRAINED_ON.rows[numbers].tolist()
            assert found["place"].tolist() == list(range(1, len(numbers) + 1))
            np.testing.assert_allclose(found["score"].tolist(), scores[query, numbers])
            np.testing.assert_allclose(found["share"].tolist(), shares[query, numbers])
    mean = shares.mean(axis=0)
    numbers = np.argsort(-mean, kind="stable")[:count]
    assert top.overall["training_row"].tolist() == TRAINED_ON.rows[numbers].tolist()
    np.testing.assert_allclose(top.overall["share"].tolist(), mean[numbers])
    assert top.overall["helps"].tolist() == (scores[:, numbers] > 0).sum(axis=0).tolist()


@pytest.mark.parametrize("count", [1, 3, TRAINING])
@pytest.mark.parametrize("chunks", [(1, 1), (2, 4), (3, 5), (QUERIES, TRAINING)])
def test_the_strongest_are_those_of_the_whole_sorted_matrix(tmp_path, chunks, count):
    top = strongest(stored(tmp_path, chunks=chunks), TRAINED_ON, ASKED, count)
    check(top, SCORES, count)


def test_shares_add_up_to_one_and_each_row_says_its_query_and_its_own_text_and_label(tmp_path):
    top = strongest(stored(tmp_path), TRAINED_ON, ASKED, TRAINING)
    np.testing.assert_allclose(top.by_query.groupby("query")["share"].sum(), np.ones(QUERIES))
    assert top.overall["share"].sum() == pytest.approx(1)
    by_query = top.by_query
    assert by_query["query_row"].tolist() == ASKED.rows[by_query["query"]].tolist()
    assert by_query["text"].tolist() == [f"text {row}" for row in by_query["training_row"]]
    assert by_query["label"].tolist() == [row % 2 for row in by_query["training_row"]]


@pytest.mark.parametrize("chunk", [1, 4, TRAINING])
def test_of_equal_scores_the_first_wins_however_the_store_is_cut(tmp_path, chunk):
    scores = np.tile([1.0, 2.0, -1.0, 2.0, 1.0, -1.0, 2.0, 0.0, 1.0, -1.0, 2.0], (QUERIES, 1))
    check(strongest(stored(tmp_path, scores, (2, chunk)), TRAINED_ON, ASKED, 3), scores, 3)


def test_what_neither_helps_nor_harms_is_in_no_list(tmp_path):
    scores = np.zeros((QUERIES, TRAINING))
    scores[0, [2, 5]], scores[1, 7] = [3.0, -1.0], -2.0
    top = strongest(stored(tmp_path, scores), TRAINED_ON, ASKED, 4)
    found = top.by_query[["query", "effect", "training_row"]].to_numpy().tolist()
    assert found == [[0, "helps", 104], [0, "harms", 110], [1, "harms", 114]]
    assert top.overall["training_row"].tolist() == [114, 104, 110]
    assert top.overall["helps"].tolist() == [0, 1, 0]


def test_relative_scores_are_divided_by_the_root_of_self_influence_if_there_is_any(tmp_path):
    store = stored(tmp_path / "all", own=OWN)
    check(strongest(store, TRAINED_ON, ASKED, 4, relative=True), SCORES / np.sqrt(OWN), 4)
    own, scores = OWN.copy(), SCORES.copy()
    own[3] = scores[:, 3] = 0
    store = stored(tmp_path / "not all", scores, own=own)
    top = strongest(store, TRAINED_ON, ASKED, TRAINING, relative=True)
    assert TRAINED_ON.rows[3] not in top.by_query["training_row"].tolist()


def test_scores_of_another_shape_than_the_examples_are_refused_before_any_is_read(tmp_path):
    store = stored(tmp_path)
    store.make_array("scores", (QUERIES, 10**15), (2, 4), "float64")
    with pytest.raises(
        StoreDamaged, match=r"said to be \(3, 1000000000000000\), but .* \(3, 11\)\. Run: score"
    ):
        strongest(store, TRAINED_ON, ASKED, 2)


def test_one_chunk_that_is_missing_is_an_error_and_relative_scores_need_every_self_influence(tmp_path):
    store = stored(tmp_path)
    with pytest.raises(StepMissing, match=r"has no self_influences yet\. Run: self$"):
        strongest(store, TRAINED_ON, ASKED, 2, relative=True)
    lose(store, "scores/c/0/2")
    with pytest.raises(StepMissing, match=r"^Not all scores are there yet\. Run: score"):
        strongest(store, TRAINED_ON, ASKED, 2)
    store = stored(tmp_path / "other", own=OWN)
    lose(store, "self_influences/c/2")
    with pytest.raises(StepMissing, match=r"^Not all self_influences are there yet\. Run: self\."):
        strongest(store, TRAINED_ON, ASKED, 2, relative=True)


def test_never_more_than_one_column_of_chunks_is_read(tmp_path, monkeypatch):
    widths = []
    read = Store.read

    def spied(self, name, place):
        widths.append(len(place[-1]))
        return read(self, name, place)

    monkeypatch.setattr(Store, "read", spied)
    strongest(stored(tmp_path, chunks=(2, 4)), TRAINED_ON, ASKED, 2)
    assert widths == [4, 4, 3] * 2


def test_a_query_that_nothing_harms_leaves_labels_whole_numbers(tmp_path):
    scores = np.abs(SCORES)
    top = strongest(stored(tmp_path, scores), TRAINED_ON, ASKED, 2)
    assert set(top.by_query["effect"]) == {"helps"}
    assert top.by_query["label"].dtype == np.int64


# The page

HOSTILE = '<script>alert("x")</script> & <b onclick=1>bold</b> film, http://example.org'
BROKEN = "First line.<br /><br />Second line.\nThird."
ASKING = [HOSTILE, "dull", "A query that nothing moves."]
MOVING = np.array([[4.0, 3.0, 2.0, -1.0], [0.0, 0.0, -0.25, -0.125], [0.0, 0.0, 0.0, 0.0]])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    store = stored(tmp_path_factory.mktemp("page"), MOVING)
    queries = examples([40, 41, 43], ASKING)
    top = strongest(store, examples(range(4), [HOSTILE, BROKEN, "second", "third"], 3), queries, 4)
    facts = {"model": "<mine>", "scores": "plain"}
    return page(top, queries, {"negative": 0, "positive": 1}, facts)


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
    for text, section in zip(ASKING, parsed.texts["section"], strict=True):
        assert text in section


def test_labels_are_named_and_an_unknown_one_keeps_its_number(parsed):
    named = ["Query 0: row 40, negative", "Query 1: row 41, positive", "Query 2: row 43, positive"]
    assert parsed.texts["h2"][1:] == named
    for row in ("row 0, negative", "row 1, positive", "row 2, label 2"):
        assert row in parsed.texts["section"][0]


def test_scores_and_shares_stand_beside_each_other(parsed):
    said = " ".join(parsed.texts["section"][1].split())
    assert "−0.25 66.67% row 2, label 2" in said
    assert "−0.125 33.33% row 3, negative" in said
    assert "row 2, label 2, helps 1 of 3" in " ".join(parsed.texts["summary"][0].split())
