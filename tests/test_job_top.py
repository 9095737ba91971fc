"""The strongest are those that a sort of the whole matrix would find, without holding the matrix; their
page needs nothing else, shows every text whole, and runs nothing that a stranger wrote."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from support.job.errors import StepMissing, StoreDamaged
from support.job.examples import Examples
from support.job.page import page
from support.job.store import Store
from support.job.top import by_column, strongest
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


@pytest.mark.parametrize("relative", [False, True])
def test_shares_by_a_column_add_up_what_its_examples_have(tmp_path, relative):
    sources = np.array(["web", "mail", "web", "book", "web", "mail", "web", "web", "mail", "web", "web"])
    scores = SCORES / np.sqrt(OWN) if relative else SCORES
    top = strongest(stored(tmp_path, own=OWN), TRAINED_ON, ASKED, 1, relative)
    found = by_column(top.shares, "source", sources.tolist()).set_index("value")
    parts = scores / np.abs(scores).sum(axis=1, keepdims=True)
    for source, row in found.iterrows():
        own = parts[:, sources == source]
        assert row["examples"] == own.shape[1]
        assert row["helps share"] == pytest.approx(own.clip(min=0).sum(axis=1).mean())
        assert row["harms share"] == pytest.approx(-own.clip(max=0).sum(axis=1).mean())
        assert row["times"] == pytest.approx(row["share"] / (own.shape[1] / TRAINING))
    assert found["share"].sum() == pytest.approx(1)
    assert found["share"].is_monotonic_decreasing


# The page

HOSTILE = '<script>alert("x")</script> & <b onclick=1>bold</b> film, \'http://example.org'
BROKEN = "First line.<br /><br />Second line.\nThird."
ASKING = [HOSTILE, "dull", "A query that nothing moves."]
MOVING = np.array([[4.0, 3.0, 2.0, -1.0], [0.0, 0.0, -0.25, -0.125], [0.0, 0.0, 0.0, 0.0]])


def told(table):
    """With what a model says, and a column of a stranger's."""
    said = {"class_name": "negative", "predicted": "positive", "p_predicted": 0.75, "p_label": 0.25}
    return table.assign(**said, source=HOSTILE)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    store = stored(tmp_path_factory.mktemp("page"), MOVING, own=OWN[:4])
    about = store, examples(range(4), [HOSTILE, BROKEN, "second", "third"], 3), examples([40, 41, 43], ASKING)
    tops = {"plain": strongest(*about, 4), "relative": strongest(*about, 4, relative=True)}
    return {
        name: replace(
            top,
            by_query=told(top.by_query),
            overall=told(top.overall),
            queries=told(top.queries),
            by_column=by_column(top.shares, "source", [HOSTILE, "web", "web", "web"]),
        )
        for name, top in tops.items()
    }


@pytest.fixture(scope="module")
def source(found):
    return page(found, ["source"], {"model": "<mine>", "scores": "plain"})


@pytest.fixture(scope="module")
def parsed(source):
    return Page(source)


def fields(parsed):
    """What each example can be sorted and saved by."""
    return [json.loads(one) for one in parsed.having("data-fields")]


def test_the_page_needs_nothing_from_elsewhere_and_forbids_it(source, parsed):
    assert not parsed.having("src")
    assert not {"link", "img", "iframe"} & parsed.kinds
    assert all(target.startswith("#") for target in parsed.having("href"))
    assert "url(" not in source
    assert "@import" not in source
    assert source.count("http://") == source.count("http://example.org")
    assert "default-src 'none';" in parsed.having("content")[0]


def test_no_script_runs_but_the_page_s_own(source, parsed):
    digest = base64.b64encode(hashlib.sha256(parsed.texts["script"][0].encode()).digest()).decode()
    assert len(parsed.texts["script"]) == 1
    assert f"script-src 'sha256-{digest}';" in parsed.having("content")[0]


def test_without_script_nothing_is_offered_that_needs_one(parsed):
    forms = [attributes for tag, attributes in parsed.tags if tag == "form"]
    assert len(forms) == 1
    assert "hidden" in forms[0]


def test_the_page_has_a_language_a_title_and_headings_in_order(source, parsed):
    assert source.startswith("<!doctype html>")
    assert parsed.tags[0] == ("html", {"lang": "en"})
    assert parsed.texts["title"] == parsed.texts["h1"]
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(lower - upper <= 1 for upper, lower in pairwise(levels))


def test_hostile_text_is_shown_and_not_run_wherever_it_stands(source, parsed):
    assert parsed.texts["blockquote"].count(HOSTILE) == 1 + 2 * 2  # as a query; in the lists of both kinds
    assert source.count("<script") == 1
    assert "&lt;script&gt;" in source
    assert "<mine>" in parsed.texts["td"]
    assert HOSTILE in parsed.texts["td"]
    assert {one["source"] for one in fields(parsed)} == {HOSTILE}
    assert f"source: {HOSTILE}" in parsed.texts["section"][1]


def test_line_breaks_of_a_text_are_kept_and_shown(source, parsed):
    assert "First line.\n\nSecond line.\nThird." in parsed.texts["blockquote"]
    assert re.search(r"blockquote, .said \{[^}]*white-space: pre-line", source)


def test_every_query_has_its_section_even_one_that_nothing_moves(parsed):
    assert {"#query-0", "#query-1", "#query-2"} <= set(parsed.having("href"))
    assert parsed.texts["section"][2].count("None.") == 4  # helpful, harmful, plain, relative
    for text, section in zip(ASKING, parsed.texts["section"], strict=True):
        assert text in section


def test_every_example_has_a_place_of_its_own_that_it_links_to(found, parsed):
    places = parsed.having("id")
    assert len(set(places)) == len(places)
    assert {f"#{place}" for place in places} == set(parsed.having("href"))
    assert len(places) == len(ASKING) + sum(len(one.by_query) + len(one.overall) for one in found.values())


def test_what_the_model_said_stands_beside_what_the_label_says(parsed):
    assert parsed.texts["h2"][2] == "Query 0: row 40, labelled negative, predicted positive 75%"
    assert "row 0 · negative, predicted positive 75\xa0%" in parsed.texts["section"][0]


def test_scores_and_shares_stand_beside_each_other_plain_ones_beside_relative_ones(found, parsed):
    said = " ".join(parsed.texts["section"][1].split())
    assert "−0.25 66.67% row 2 ·" in said
    assert "−0.125 33.33% row 3 ·" in said
    for name in found:
        assert f"Most harmful, {name}" in said
        strongest_one = found[name].by_query.query("query == 1")["score"].iloc[0]
        assert f"{strongest_one:+.3g}".replace("-", "−") in said
    assert "helps 1 of 3" in " ".join(parsed.texts["summary"][0].split())


def test_one_kind_of_scores_alone_is_shown_without_the_other(found):
    alone = Page(page({"plain": found["plain"]}, [], {}))
    assert "relative" not in "".join(alone.texts["section"] + alone.texts["p"])


def test_tokens_are_coloured_by_what_they_add_on_both_sides_and_escaped(found):
    pair = found["plain"].by_query.iloc[0]
    tokens = pd.DataFrame({"said": [HOSTILE, " dull", " film"], "score": [4.0, -1.0, 0.1], "token": range(3)})
    tokens = tokens.assign(query=pair["query"], training_row=pair["training_row"])
    both = pd.concat([tokens.assign(side=side) for side in ("query", "training")])
    top = replace(found["plain"], by_token=both)
    coloured = Page(page({"plain": top}, [], {}))
    marked = [attributes for tag, attributes in coloured.tags if tag == "b"]
    assert [one["class"] for one in marked] == ["helps", "harms"] * 2
    assert [one["title"] for one in marked] == ["+4", "−1"] * 2
    assert coloured.texts["b"] == [HOSTILE, " dull"] * 2
    whole = f"{HOSTILE} dull film"
    assert [part.strip() for part in coloured.texts["p"]].count(whole) == 1
    assert [part.strip() for part in coloured.texts["blockquote"]].count(whole) == 1
