"""Suspects come in the order of their ranks, combined; how many are wrong is told by a model made as sure
as it is right."""

import csv

import numpy as np
import pandas as pd
import pytest

from support.job.store import Store
from support.job.suspects import BEFORE, as_text, doubts
from tests import tiny_language
from tests.tiny_job import QUERIES, TRAINING, make_model, make_reviews, options

FORMULA = '=HYPERLINK("http://example.org")'


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, and reviews with a column of their own, one of which is a formula."""
    folder = tmp_path_factory.mktemp("inputs")
    reviews = make_reviews(folder / "reviews")
    rows = pd.read_csv(reviews / "train.csv")
    rows["id"] = [FORMULA, *(f"t-{row}" for row in rows.index[1:])]
    rows.to_csv(reviews / "train.csv", index=False)
    return make_model(folder / "model"), reviews


def read(path):
    return pd.read_csv(path, encoding="utf-8-sig")


def ranked(values):
    """1 for the largest."""
    return np.argsort(np.argsort(-np.asarray(values), kind="stable"), kind="stable") + 1


def test_suspects_come_in_the_order_of_their_combined_ranks(inputs, said, tmp_path):
    said("run", *options(*inputs, tmp_path))
    told = said("suspects", "--store", tmp_path, "--keep", "id")
    found, store = read(tmp_path / "suspects.csv").set_index("row"), Store(tmp_path)
    by_row = found.sort_index()
    assert by_row.index.tolist() == list(range(TRAINING))
    assert by_row["rank_loss"].tolist() == ranked(1 - by_row["p_label"]).tolist()
    assert by_row["rank_self_influence"].tolist() == ranked(store.array("self_influences")[:]).tolist()
    assert by_row["rank_harm"].tolist() == ranked(-store.array("scores")[:].sum(axis=0)).tolist()
    names = ["rank_loss", "rank_self_influence", "rank_harm"]
    assert (1 / (BEFORE + found[names])).sum(axis=1).is_monotonic_decreasing
    assert (
        f"{TRAINING} of {TRAINING} training examples, by rank_loss, rank_self_influence, rank_harm." in told
    )
    agreed = (found["label"] == found["suggested"]).mean()
    assert f"The model agrees with {agreed:.1%} of its training labels and " in told
    assert f" of the labels of {QUERIES} queries. As long as a model has not learned" in told


def test_before_anything_is_fitted_loss_alone_ranks_and_the_model_s_own_doubts_are_counted(
    inputs, said, tmp_path
):
    model, reviews = inputs
    given = ("--store", tmp_path / "store", "--model", model, "--dataset", reviews)
    told = said("suspects", *given, "--count", 5, "--output", tmp_path)
    found = read(tmp_path / "suspects.csv")
    assert list(found) == ["row", "text", "label", "p_label", "suggested", "p_suggested", "rank_loss"]
    assert found["rank_loss"].tolist() == [1, 2, 3, 4, 5]
    assert (
        f"5 of {TRAINING} training examples, by rank_loss. About {(1 - found['p_label']).sum():.0f} of"
        in told
    )


def test_a_spreadsheet_computes_nothing_that_a_stranger_wrote(inputs, said, tmp_path):
    model, reviews = inputs
    given = ("--store", tmp_path / "store", "--model", model, "--dataset", reviews)
    said("suspects", *given, "--keep", "id", "--output", tmp_path)
    with (tmp_path / "suspects.csv").open(encoding="utf-8-sig", newline="") as file:
        assert {row["row"]: row["id"] for row in csv.DictReader(file)}["0"] == f"'{FORMULA}"
    for text in ("+1", "-1", "@x", "\tx", "\rx"):
        assert as_text(text) == f"'{text}"
    assert as_text("a = b") == "a = b"
    assert as_text(-1.5) == -1.5


def test_of_a_model_that_is_too_sure_or_not_sure_enough_the_doubts_are_those_that_come_true():
    generator = np.random.default_rng(0)
    true = generator.normal(1, 2, size=(2, 20_000))  # log-odds of the label that a model sees
    p_wrong = 1 / (1 + np.exp(true))
    wrong = generator.random(true.shape) < p_wrong
    of_label = np.where(wrong, -true, true)
    for too_sure in (0.5, 1, 4):
        p_label, asked = (pd.Series(1 / (1 + np.exp(-too_sure * one))) for one in (true[0], of_label[1]))
        expected = doubts(p_label, asked)
        assert expected.sum() == pytest.approx(wrong[0].sum(), rel=0.05)
        np.testing.assert_allclose(expected, p_wrong[0], atol=0.02)


def test_doubts_order_examples_as_the_model_does_and_survive_certainty():
    p_label = pd.Series([1.0, 0.999, 0.5, 1e-9, 1e-300])
    for asked in ([0.9, 0.2], [1.0, 1.0], [1e-12, 1 - 1e-12]):
        found = doubts(p_label, pd.Series(asked))
        assert found.is_monotonic_increasing
        assert found.between(0, 1).all()


def test_a_column_that_is_ours_already_is_not_kept_twice(inputs, said, tmp_path):
    model, reviews = inputs
    given = ("--store", tmp_path / "store", "--model", model, "--dataset", reviews)
    told = said("suspects", *given, "--keep", "id, label", status=1)
    assert "BadSetting: --keep label: the tables have a column of this name already. Leave it out" in told


def test_queries_that_the_model_was_least_sure_of_say_nothing_of_how_often_the_model_is_right(
    inputs, said, tmp_path
):
    chosen = [*options(*inputs, tmp_path), "--query-rows", "uncertain:2"]
    said("run", *chosen)
    told = said("suspects", "--store", tmp_path)
    assert "by rank_loss, rank_self_influence, rank_harm. About" in told
    assert "labels of" not in told


def test_without_a_store_and_a_word_of_what_is_meant_nothing_is_begun(said, tmp_path):
    told = said("suspects", "--store", tmp_path / "mistyped", status=1)
    assert f"There is no store at {tmp_path / 'mistyped'}. Begin one with: fit" in told
    assert not (tmp_path / "mistyped").exists()


def test_a_model_that_writes_has_no_labels_to_suspect(said, tmp_path):
    model, texts = tiny_language.make_model(tmp_path / "model"), tiny_language.make_texts(tmp_path / "texts")
    given = ("--store", tmp_path / "store", "--model", model, "--dataset", texts)
    told = said("suspects", *given, status=1)
    assert "BadSetting: suspects: a model that writes has no labels that could be wrong. See --task." in told
