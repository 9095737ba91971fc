"""What the repository holds about fidelity belongs to the experiments as they stand in the code."""

import json

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open

mpl.use("Agg")


from support.fidelity import plots, tables
from support.fidelity.agreement import linear_datamodeling_score, rank_stability
from support.fidelity.bank import load_bank
from support.fidelity.experiments import COMMITTED, EXPERIMENTS, bank_path
from support.fidelity.judgement import RECOMMENDED
from support.fidelity.removal import COUNTS
from support.fidelity.tail import Reviews


@pytest.fixture(scope="module")
def drawn(imdb):
    """Texts and labels of the first rows of a split, shuffled as the experiments do."""
    shuffled = {split: imdb[split].shuffle(seed=0) for split in ("train", "test")}

    def draw(split, rows):
        chosen = shuffled[split].select(rows)
        labels = torch.tensor(chosen["label"])
        return Reviews(torch.zeros(len(rows), 1), labels, list(chosen["text"]))

    return draw


@pytest.fixture(params=COMMITTED)
def experiment(request):
    return request.param


def training_reviews(drawn, name):
    first = EXPERIMENTS[name].first_review
    return drawn("train", range(first, first + EXPERIMENTS[name].train_reviews))


def test_a_committed_bank_is_that_of_its_experiment(experiment, drawn):
    chosen = EXPERIMENTS[experiment]
    with safe_open(bank_path(experiment), "pt") as file:
        metadata = file.metadata()
    for name, value in {**chosen.recipe.settings(), **vars(chosen.design)}.items():
        assert json.loads(metadata[name]) == value, name
    assert metadata["train_reviews"] == training_reviews(drawn, experiment).digest()
    assert metadata["queries"] == drawn("test", range(chosen.queries)).digest()


def test_a_committed_bank_has_the_subsets_of_its_design(experiment, drawn):
    bank, chosen = load_bank(bank_path(experiment)), EXPERIMENTS[experiment]
    expected = chosen.design.membership(training_reviews(drawn, experiment).labels)
    assert torch.equal(bank.membership, expected)
    assert bank.margins.shape == (chosen.design.subsets, chosen.design.seeds, chosen.queries)
    assert bank.margins.isfinite().all()


def test_the_bank_scores_are_reported_on_holds_a_hundred_retrainings_and_more():
    assert load_bank(bank_path("main")).margins[..., 0].numel() >= 100


def test_the_table_s_scores_are_those_of_the_bank(experiment, drawn):
    """Told by the one scorer that needs no model."""
    queries = drawn("test", range(EXPERIMENTS[experiment].queries)).labels
    train = training_reviews(drawn, experiment).labels
    bank = load_bank(bank_path(experiment)).of_queries(tables.REPORT)
    same = 2.0 * (queries[tables.REPORT, None] == train[None]) - 1
    expected = linear_datamodeling_score(same, bank)
    row = tables.judgement(experiment).query("scorer == 'same label'").iloc[0]
    assert row["report"] == pytest.approx(expected.mean, abs=2e-5)
    assert (row["low"], row["high"]) == pytest.approx(expected.interval(), abs=2e-5)


def test_the_recommended_scorer_has_the_best_mean_share_on_the_queries_to_choose_by():
    best = tables.shares_of_ceiling("choice").index[0]
    assert best == (RECOMMENDED.where, RECOMMENDED.regularization, RECOMMENDED.normalisation)


def test_the_recommended_scorer_is_above_every_other_kind_with_separated_intervals():
    table = tables.judgement("main")
    ours = tables.rows_of(table, RECOMMENDED).iloc[0]
    others = table[~table["scorer"].str.startswith(("EK-FAC", "exact"))]
    assert "Kronfluence" in set(others["scorer"])
    assert ours["low"] > others["high"].max()
    assert ours["report"] >= 0.68
    assert ours["report"] >= 0.85 * tables.ceiling("main")


def test_each_row_of_the_figure_is_the_best_of_its_kind_or_customary():
    table = tables.judgement("main")
    shown = tables.one_row_for_each(table)
    assert shown["name"].is_unique
    for _, row in shown.iterrows():
        kind = table[
            (table["scorer"] == row["scorer"])
            & (table["where"] == row["where"])
            & (table["normalisation"] == row["normalisation"])
        ]
        customary = row["regularization"] in ("1e-05", "auto", "heuristic", "1e-08 (default)")
        assert customary or row["choice"] == kind["choice"].max()


def test_every_experiment_has_a_row_below_its_ceiling():
    frame = tables.across_experiments()
    assert [name.split(":")[0] for name in frame.index] == COMMITTED
    assert frame.notna().all(axis=None)
    assert (frame.drop(columns="noise ceiling").max(axis=1) < frame["noise ceiling"]).all()


def test_rises_begin_at_nothing_removed():
    rises = tables.rises()
    assert (rises[rises["removed"] == 0]["rise"] == 0).all()
    assert set(rises["removed"]) == {0, *COUNTS}


def test_a_ranking_is_as_stable_as_it_is_alike():
    scores = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert rank_stability(scores, scores.exp()) == pytest.approx(1)
    assert rank_stability(scores, -scores) == pytest.approx(-1)


INTERVALS = pd.DataFrame(
    {"name": ["a", "b"], "report": [0.2, 0.7], "low": [0.1, 0.6], "high": [0.3, 0.8]}
)
RISES = pd.DataFrame(
    {"scorer": ["a", "a", "random", "random"], "removed": [0, 9] * 2, "rise": [0, 1.0, 0, 0.1]}
)
FIGURES = {
    "predicted_and_retrained": lambda: plots.predicted_and_retrained(
        {"a": (np.array([1.0, 2.0]), 0.5)}, np.array([2.0, 1.0]), "A title"
    ),
    "scores_with_intervals": lambda: plots.scores_with_intervals(INTERVALS, 0.9, ["b"], "A title"),
    "score_and_stability": lambda: plots.score_and_stability(
        [0.1, 1.0], {"a": [0.2, 0.3]}, [0.9], "A title"
    ),
    "along_the_path": lambda: plots.along_the_path(
        pd.DataFrame({"plain": [0.1, 0.2]}, index=[0.0, 1.0]), "A title"
    ),
    "removals": lambda: plots.removals(RISES, "A title"),
}


def test_every_figure_is_tried_here():
    public = {
        name
        for name, value in vars(plots).items()
        if callable(value) and getattr(value, "__module__", "") == plots.__name__
    }
    assert {name for name in public if not name.startswith("_")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_its_title_and_says_what_it_measures(name, figure):
    shown = figure(FIGURES[name])
    titles = {shown.get_suptitle(), *(axes.get_title(loc="left") for axes in shown.axes)}
    assert "A title" in titles
    assert shown.axes[0].get_xlabel()


def test_labels_at_the_ends_of_lines_keep_their_distance():
    places = plots._apart(pd.Series({"a": 1.0, "b": 1.01, "c": 5.0}), 0.5)
    assert places == {"a": 1.0, "b": 1.5, "c": 5.0}
