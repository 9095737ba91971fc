"""One fit answers many questions, each with queries, λ and results of its own."""

import csv
import re
import shutil

import numpy as np
import pytest

from support.job.command import main
from support.job.store import Store
from support.model import LABELS
from tests.tiny_job import QUERIES, TRAINING, attributes, make_model, make_reviews, options

PLAIN = "scores"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return make_model(folder / "model"), make_reviews(folder / "reviews")


@pytest.fixture(scope="module")
def tickets(inputs, tmp_path_factory):
    """A file of other queries, and a store that was asked about them after its own question."""
    folder = tmp_path_factory.mktemp("asked")
    shutil.copy(inputs[1] / "train.csv", folder / "new.csv")
    store = folder / "store"
    assert main(["run", *options(*inputs, store)]) == 0
    asked = ["--queries", str(folder / "new.csv"), "--query-split", "train", "--query-rows", "0:5"]
    assert main(["score", "--store", str(store), "--question", "tickets-may", *asked]) == 0
    return store, asked


def scores(store, question=""):
    return Store(store, question).array("scores")[:]


def test_a_second_question_has_the_scores_of_a_store_of_its_own_and_nothing_is_fitted_again(
    inputs, tickets, said, tmp_path, monkeypatch
):
    store, asked = tickets
    said("run", *options(*inputs, tmp_path / "alone"), *asked)
    np.testing.assert_array_equal(scores(store, "tickets-may"), scores(tmp_path / "alone"))
    assert scores(store).shape == (QUERIES, TRAINING)
    monkeypatch.setattr("support.job.fit._shards", None)
    assert "Scored 13 training examples on 1 queries" in said(
        "run", "--store", store, "--question", "third", "--query-rows", "1"
    )
    np.testing.assert_array_equal(
        scores(store, "third")[0], scores(store)[Store(store, "third").array("query_rows")[0]]
    )
