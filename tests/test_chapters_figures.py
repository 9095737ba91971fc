"""What every figure of the chapters owes its reader, and what single figures promise."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

mpl.use("Agg")


from support.chapters import (
    corruption,
    fidelity,
    figures,
    influences,
    layers,
    preparation,
    regularization,
    scale,
    sentiment,
)

TITLE = "A title"
INFLUENCES = np.array([[1.0, -2.0, 0.5], [0.25, 20_097.4, -0.061]])
TEST_LABELS, TRAIN_LABELS = np.array([1, 0]), np.array([0, 1, 0])
LAYERS = ["first", "second", "third"]
BY_LAYER = np.array([[3.0, -1.0], [2.0, 0.5], [0.0, -4.0]])
SHARES = np.array([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [0.4, 0.4, 0.2]])
INTERVALS = pd.DataFrame({"name": ["a", "b"], "report": [0.2, 0.7], "low": [0.1, 0.6], "high": [0.3, 0.8]})
RISES = pd.DataFrame(
    {"scorer": ["a", "a", "random", "random"], "removed": [0, 9] * 2, "rise": [0, 1.0, 0, 0.1]}
)
CORRELATIONS = pd.DataFrame({"1 → 2": [0.5, 1.0], "2 → 3": [0.1, -0.2]}, index=["one", "two"])
SPECTRUM = {"layer": np.array([[0.1, 3.0], [0.5, 1e-4]])}
SCORES = np.array([[4.0, -3.0, 2.0, 1.0], [0.0, 0.0, -5.0, 5.0], [1.0, 1.0, 1.0, -1.0]])
FINDING = {"a ranking": np.array([[0.0, 0.5, 1.0], [0.0, 1.0, 1.0]])}
DROPPED = {"a ranking": np.array([[0.8, 0.9], [0.9, 0.9]])}
ALONG = pd.DataFrame({"plain": [0.1, 0.2]}, index=[0.0, 1.0])

BY_LAMBDA = pd.DataFrame(
    {"basis": list("aabb"), "regularization": ["0.01", "1"] * 2, "report": [0.5, 0.4, 0.2, 0.1]}
).assign(low=0.05, high=0.6)
SINGLE = pd.DataFrame({"change": [0.1, -0.2, 0.3], "recommended": [0.2, -0.1, 0.1]})
FIGURES = {
    figures.influence_heatmap: (INFLUENCES, TEST_LABELS, TRAIN_LABELS, TITLE, (1, 1)),
    sentiment.learning_curve: ([0.7, 0.5, 0.4], {"50-percent": 2}, TITLE),
    sentiment.confidence: ([0.1, 0.9, 0.6], [0, 1, 0], [50, 512, 300], TITLE),
    preparation.parameter_shares: ({"embeddings": 3}, {"embeddings": 0, "head": 2}, TITLE),
    preparation.padding: ([3, 9, 4, 8], 2, 10, TITLE),
    influences.steep_and_flat: ([0.25, 4.0], [0.01, 1.0], TITLE),
    influences.influences_by_labels: (INFLUENCES, TEST_LABELS, TRAIN_LABELS, TITLE),
    influences.influences_side_by_side: (
        [INFLUENCES, -2 * INFLUENCES],
        TEST_LABELS,
        [TRAIN_LABELS, 1 - TRAIN_LABELS],
        [TITLE, "Another"],
    ),
    corruption.finding_curves: ([FINDING] * 2, 0.5, [TITLE, "Another"]),
    corruption.accuracy_after_dropping: (DROPPED, [0.1, 0.2], {"all kept": 0.8}, TITLE),
    layers.along_layers: (BY_LAYER, LAYERS, {"review 0": 1, "review 2": 0}, TITLE),
    layers.layer_shares: (SHARES, LAYERS, TITLE),
    scale.concentration: (SCORES, [0.5], TITLE),
    scale.twins: (pd.Series([0.0, 0.02, 0.7]), pd.Series([1.0, 0.1, 0.05]), TITLE),
    fidelity.predicted_and_retrained: ({"a": (np.array([1.0, 2.0]), 0.5)}, np.array([2.0, 1.0]), TITLE),
    fidelity.scores_with_intervals: (INTERVALS, 0.9, ["b"], TITLE),
    fidelity.score_and_stability: ([0.1, 1.0], {"a": [0.2, 0.3]}, [0.9], TITLE),
    fidelity.along_the_path: (ALONG, TITLE),
    fidelity.removals: (RISES, TITLE),
    fidelity.scores_by_regularization: ({"tail": BY_LAMBDA, "whole": BY_LAMBDA}, 0.9, TITLE),
    fidelity.scores_by_layer: ({"end": CORRELATIONS}, TITLE),
    fidelity.single_removals: (SINGLE, ["recommended"], TITLE),
    regularization.neighbour_correlations: (CORRELATIONS, TITLE),
    regularization.spectra: (SPECTRUM, {"small": 1e-3, "large": 1.0}, TITLE),
}


@pytest.fixture
def drawn(figure):
    """The axes of a figure."""
    return lambda function: figure(function, *FIGURES[function]).axes


@pytest.mark.parametrize("function", FIGURES, ids=lambda function: function.__name__)
def test_a_figure_has_its_title_and_says_what_it_measures_on_a_white_ground(figure, function):
    shown = figure(function, *FIGURES[function])
    assert TITLE in {shown.get_suptitle(), *(axes.get_title(loc="left") for axes in shown.axes)}
    assert shown.axes[0].get_xlabel() or shown.axes[0].get_ylabel()
    assert shown.get_facecolor() == (1, 1, 1, 1)


@pytest.mark.parametrize("function", [figures.influence_heatmap, influences.influences_by_labels])
def test_influence_colours_are_centred_on_zero(drawn, function):
    low, high = drawn(function)[0].collections[0].get_clim()
    assert low == -high < 0


def test_rows_and_columns_are_sorted_by_label(drawn):
    mesh = drawn(influences.influences_by_labels)[0].collections[0]
    np.testing.assert_array_equal(mesh.get_array().reshape(2, 3), INFLUENCES[[1, 0]][:, [0, 2, 1]])


def test_every_pair_of_twins_is_a_point(drawn):
    points = drawn(scale.twins)[0].collections[0].get_offsets()
    np.testing.assert_allclose(points, [[0, 1], [0.02, 0.1], [0.7, 0.05]])


def test_panels_side_by_side_share_one_scale_and_name_their_labels(drawn):
    left, right, *_ = drawn(influences.influences_side_by_side)
    limits = [panel.collections[0].get_clim() for panel in (left, right)]
    assert limits[0] == limits[1] == (-2 * 20_097.4, 2 * 20_097.4)
    names = [[tick.get_text()[3:6] for tick in panel.get_xticklabels()] for panel in (left, right)]
    assert names == [["neg", "pos", "neg"], ["pos", "neg", "pos"]]


def test_finding_curves_and_accuracies_after_dropping_are_means_over_trials_in_percent(drawn):
    line, perfect = drawn(corruption.finding_curves)[0].lines
    np.testing.assert_array_equal(line.get_xydata(), [[0, 0], [50, 75], [100, 100]])
    np.testing.assert_array_equal(perfect.get_xydata(), [[0, 0], [50, 100], [100, 100]])
    axes = drawn(corruption.accuracy_after_dropping)[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [85, 90])
    assert [name.get_text() for name in axes.texts] == ["all kept"]


@pytest.mark.parametrize("function", [layers.along_layers, layers.layer_shares])
def test_layers_are_named_in_their_order(drawn, function):
    axes = drawn(function)[0]
    assert axes.get_xlabel() == "layer, from input to output"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == LAYERS


def test_each_line_is_a_training_review_told_by_name_marker_and_stroke(drawn):
    axes = drawn(layers.along_layers)[0]
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in lines] == ["review 0 (pos)", "review 2 (neg)"]
    assert [line.get_linestyle() for line in lines] == ["-", "--"]
    assert len({line.get_marker() for line in lines}) == 2
    sizes = [np.abs(line.get_ydata()).sum() for line in lines]
    np.testing.assert_allclose(sizes, 100)
    np.testing.assert_array_equal(np.sign([line.get_ydata() for line in lines]), np.sign(BY_LAYER.T))


def test_shares_have_one_dot_per_test_review_and_a_median(drawn):
    axes = drawn(layers.layer_shares)[0]
    dots, medians = axes.collections
    np.testing.assert_allclose(dots.get_offsets()[:, 1], 100 * SHARES.ravel())
    heights = [segment[0, 1] for segment in medians.get_segments()]
    np.testing.assert_allclose(heights, [55, 25, 20])


def test_concentration_has_a_line_for_each_query_a_median_and_equality(drawn):
    axes = drawn(scale.concentration)[0]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["each query", "median of the queries", "if all were equal"]
    curves = [line.get_ydata() for line in axes.lines if len(line.get_xdata()) == 4]
    np.testing.assert_allclose(curves[:3], 100 * scale.cumulative_shares(SCORES))
    np.testing.assert_allclose(curves[3], np.median(curves[:3], axis=0))
    assert "50%: 2" in [text.get_text() for text in axes.texts]


def test_spectra_fall_from_the_largest_eigenvalue_and_show_the_regularizations(drawn):
    axes = drawn(regularization.spectra)[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [3.0, 0.5, 0.1, 1e-4])
    assert [line.get_ydata()[0] for line in axes.lines[1:]] == [1e-3, 1.0]
    assert {text.get_text() for text in axes.texts} == {"small", "large"}


def test_padding_is_counted_per_batch_in_both_orders_and_error_rates_per_length(drawn):
    axes = drawn(preparation.padding)[0]
    assert [bar.get_width() for bar in axes.patches] == [40, 9 * 2 + 8 * 2, 4 * 2 + 9 * 2, 24]
    assert [bar.get_height() for bar in drawn(sentiment.confidence)[1].patches] == [0, 100, 0]


def test_the_heatmap_is_readable_names_reviews_with_their_labels_and_frames_the_marked_pair(drawn):
    axes = drawn(figures.influence_heatmap)[0]
    assert axes.collections[0].get_clim()[1] == 20_097.4
    written = [text.get_text() for text in axes.texts]
    assert written == ["1", "-2", "0.5", "0.25", "20,097", "-0.061"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0 (neg)", "1 (pos)", "2 (neg)"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0 (pos)", "1 (neg)"]
    assert [patch.get_xy() for patch in axes.patches] == [(1, 1)]


def test_a_push_goes_further_along_the_flat_direction_and_less_far_the_more_is_added(drawn):
    push, small, large = (
        np.hypot(arrow.U, arrow.V).item() for arrow in drawn(influences.steep_and_flat)[0].collections[-3:]
    )
    assert large < push < small
