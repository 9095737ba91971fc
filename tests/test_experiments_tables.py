"""What the repository holds about fidelity belongs to the experiments as they stand in the code."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

from experiments import tables
from experiments.bank_making import EXPERIMENTS, bank_path, digest
from experiments.tables import HALVES, across_experiments, ceiling, shares_of_ceiling
from support.chapters import fidelity
from support.chapters.fidelity import RECOMMENDED
from support.judge import linear_datamodeling_score, load_bank
from support.retraining import Reviews


@pytest.fixture(scope="module")
def drawn(imdb):
    """Texts and labels of the first rows of a split, shuffled as the experiments do."""
    shuffled = {split: imdb[split].shuffle(seed=0) for split in ("train", "test")}

    def draw(split, rows):
        chosen = shuffled[split].select(rows)
        labels = torch.tensor(chosen["label"])
        return Reviews(torch.zeros(len(rows), 1), labels, list(chosen["text"]))

    return draw


@pytest.fixture(params=EXPERIMENTS)
def experiment(request):
    return request.param


def training_reviews(drawn, name):
    first = EXPERIMENTS[name].first_review
    return drawn("train", range(first, first + EXPERIMENTS[name].train_reviews))


def test_a_committed_bank_is_that_of_its_experiment_and_has_the_subsets_of_its_design(experiment, drawn):
    chosen, train = EXPERIMENTS[experiment], training_reviews(drawn, experiment)
    with safe_open(bank_path(experiment), "pt") as file:
        metadata = file.metadata()
    for name, value in {**vars(chosen.recipe), **vars(chosen.design)}.items():
        assert json.loads(metadata[name]) == value, name
    assert metadata["train_reviews"] == digest(train)
    assert metadata["queries"] == digest(drawn("test", range(chosen.queries)))
    bank = load_bank(bank_path(experiment))
    assert torch.equal(bank.membership, chosen.design.membership(train.labels))
    assert bank.margins.shape == (chosen.design.subsets, chosen.design.seeds, chosen.queries)
    assert bank.margins.isfinite().all()


def test_the_table_s_scores_are_those_of_the_bank(experiment, drawn):
    """Told by the one scorer that needs no model."""
    queries = drawn("test", range(EXPERIMENTS[experiment].queries)).labels
    train = training_reviews(drawn, experiment).labels
    bank = load_bank(bank_path(experiment)).of_queries(HALVES["report"])
    same = 2.0 * (queries[HALVES["report"], None] == train[None]) - 1
    expected = linear_datamodeling_score(same, bank)
    row = tables.judgement(experiment).query("scorer == 'same label'").iloc[0]
    assert row["report"] == pytest.approx(expected.mean, abs=2e-5)
    assert (row["low"], row["high"]) == pytest.approx(expected.interval(), abs=2e-5)


SETTINGS = ["where", "regularization", "normalisation"]


@pytest.mark.parametrize("half", HALVES)
def test_the_committed_shares_are_those_of_the_scores_and_the_banks(half):
    committed = fidelity.read_table(f"shares_{half}").set_index(SETTINGS)
    pd.testing.assert_frame_equal(committed, shares_of_ceiling(half), atol=1e-5, check_names=False)


def test_the_recommended_scorer_has_the_best_mean_share_on_the_queries_to_choose_by():
    best = shares_of_ceiling("choice").index[0]
    assert best == tuple(getattr(RECOMMENDED, setting) for setting in SETTINGS)


def test_the_recommended_scorer_is_above_every_other_kind_with_separated_intervals():
    table = tables.judgement("main")
    ours = fidelity.rows_of(table, RECOMMENDED).iloc[0]
    others = table[~table["scorer"].str.startswith(("EK-FAC", "exact"))]
    assert "Kronfluence" in set(others["scorer"])
    assert ours["low"] > others["high"].max()
    assert ours["report"] >= 0.68
    assert ours["report"] >= 0.85 * ceiling("main")


def test_each_row_of_the_figure_is_the_best_of_its_kind_or_customary():
    table = tables.judgement("main")
    shown = tables.one_row_for_each(table)
    assert shown["name"].is_unique
    for _, row in shown.iterrows():
        same = [table[name] == row[name] for name in ("scorer", "where", "normalisation")]
        kind = table[np.logical_and.reduce(same)]
        customary = row["regularization"] in ("1e-05", "auto", "heuristic", "1e-08 (default)")
        assert customary or row["choice"] == kind["choice"].max()


def test_every_experiment_has_a_committed_row_below_its_ceiling():
    frame = fidelity.read_table("across").set_index("bank")
    pd.testing.assert_frame_equal(frame, across_experiments(), atol=1e-5)
    assert [name.split(":")[0] for name in frame.index] == list(EXPERIMENTS)
    assert (frame.drop(columns="noise ceiling").max(axis=1) < frame["noise ceiling"]).all()


def test_what_the_chapter_shows_is_what_the_tables_say():
    committed = {name: fidelity.read_table(name) for name in ("shown", "rises", "along_the_path")}
    shown = tables.one_row_for_each(tables.judgement("main"))
    pd.testing.assert_frame_equal(committed["shown"], shown, atol=1e-5)
    pd.testing.assert_frame_equal(committed["rises"], tables.rises(), atol=1e-5)
    assert (committed["rises"].query("removed == 0")["rise"] == 0).all()
    path = tables.scores_along_the_path("main", "EK-FAC", "0.01")
    along = committed["along_the_path"].set_index("share")
    pd.testing.assert_frame_equal(along, path, check_names=False)


def test_outside_the_repository_the_chapter_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setattr(fidelity, "EXPERIMENTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="Chapter 09 needs the repository"):
        fidelity.read_table("shown")
