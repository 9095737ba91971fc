"""What the chapters share: the setting they ask in is the judge's, and they begin with the same reviews."""

import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from support.chapters import story
from support.chapters.fidelity import read_table
from support.model import load_model


def test_the_chapters_ask_when_and_how_a_retrained_whole_model_agrees_best():
    judged = read_table("whole_model").query("tracked == 'chapters' and basis == 'gradient' and layer == ''")
    judged = judged[~judged["where"].str.contains("and")].replace({"0.1 × mean": "auto"})
    numbers = pd.to_numeric(judged["regularization"], errors="coerce").notna()
    best = judged[numbers | (judged["regularization"] == "auto")].sort_values("choice").iloc[-1]
    assert (best["where"], best["normalisation"]) == ("20%", "plain")
    assert best["where"].replace("%", "-percent") == story.SNAPSHOT
    assert best["regularization"] == story.REGULARIZATION


@pytest.fixture(scope="module")
def begun():
    return story.begin("packaged", seed=0, num_train=7, num_test=5)


def test_a_story_has_the_finished_model_and_the_same_on_its_way(begun):
    models = {"final": begun.model, story.SNAPSHOT: begun.early_model}
    for snapshot, model in models.items():
        assert not model.training
        expected = load_model(snapshot=snapshot).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.model.state_dict().items())


def test_the_same_seed_draws_the_same_reviews_and_more_of_them_begin_alike(begun):
    more = story.begin("packaged", seed=0, num_train=9, num_test=5)
    assert more.train.texts[:7] == begun.train.texts
    assert_close(next(iter(more.train_loader))[1], begun.train.labels)
