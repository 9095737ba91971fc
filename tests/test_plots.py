"""What every figure owes its reader, and what single figures promise."""

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")


from support import plots

INFLUENCES = np.array([[1.0, -2.0, 0.5], [0.25, 20_097.4, -0.061]])
TEST_LABELS, TRAIN_LABELS = np.array([1, 0]), np.array([0, 1, 0])

FIGURES = {
    "learning_curve": lambda: plots.learning_curve([0.7, 0.5, 0.4], {"50-percent": 2}, "A title"),
    "confidence": lambda: plots.confidence([0.1, 0.9, 0.6], [0, 1, 0], [50, 512, 300], "A title"),
    "parameter_shares": lambda: plots.parameter_shares(
        {"embeddings": 3}, {"embeddings": 0, "head": 2}, "A title"
    ),
    "padding": lambda: plots.padding([3, 9, 4, 8], 2, 10, "A title"),
    "influence_heatmap": lambda: plots.influence_heatmap(
        INFLUENCES, TEST_LABELS, TRAIN_LABELS, "A title", marked=(1, 1)
    ),
    "influences_by_labels": lambda: plots.influences_by_labels(
        INFLUENCES, TEST_LABELS, TRAIN_LABELS, "A title"
    ),
    "influences_side_by_side": lambda: plots.influences_side_by_side(
        [INFLUENCES, -2 * INFLUENCES],
        TEST_LABELS,
        [TRAIN_LABELS, 1 - TRAIN_LABELS],
        ["A title", "Another"],
    ),
}


@pytest.fixture
def drawn(figure):
    """The axes of a figure by its name."""
    return lambda name: figure(FIGURES[name]).axes


def test_every_figure_is_tried_here():
    public = {
        name
        for name, value in vars(plots).items()
        if callable(value) and getattr(value, "__module__", "") == plots.__name__
    }
    assert {name for name in public if not name.startswith("_")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_its_title_and_says_what_it_measures_on_a_white_ground(drawn, name):
    first, *_ = axes = drawn(name)
    assert first.get_title(loc="left") == "A title" or first.get_title() == "A title"
    assert first.get_xlabel() or first.get_ylabel()
    assert all(one.figure.get_facecolor() == (1, 1, 1, 1) for one in axes)


@pytest.mark.parametrize("name", ["influence_heatmap", "influences_by_labels"])
def test_influence_colours_are_centred_on_zero(drawn, name):
    mesh = drawn(name)[0].collections[0]
    low, high = mesh.get_clim()
    assert low == -high < 0


def test_the_heatmaps_scale_ends_at_the_largest_influence_and_its_numbers_are_readable(drawn):
    axes = drawn("influence_heatmap")[0]
    assert axes.collections[0].get_clim()[1] == 20_097.4
    written = [text.get_text() for text in axes.texts]
    assert written == ["1", "-2", "0.5", "0.25", "20,097", "-0.061"]


def test_the_heatmap_names_reviews_with_their_labels_and_frames_the_marked_pair(drawn):
    axes = drawn("influence_heatmap")[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0 (neg)", "1 (pos)", "2 (neg)"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0 (pos)", "1 (neg)"]
    assert [patch.get_xy() for patch in axes.patches] == [(1, 1)]


def test_rows_and_columns_are_sorted_by_label(drawn):
    shown = drawn("influences_by_labels")[0].collections[0].get_array().reshape(2, 3)
    np.testing.assert_array_equal(shown, INFLUENCES[[1, 0]][:, [0, 2, 1]])


def test_padding_is_counted_per_batch_in_both_orders(drawn):
    axes = drawn("padding")[0]
    assert [bar.get_width() for bar in axes.patches] == [40, 9 * 2 + 8 * 2, 4 * 2 + 9 * 2, 24]


def test_error_rates_are_per_length(drawn):
    rates = [bar.get_height() for bar in drawn("confidence")[1].patches]
    assert rates == [0, 100, 0]


def test_panels_side_by_side_share_one_scale_and_name_their_own_labels(drawn):
    left, right, *_ = drawn("influences_side_by_side")
    limits = [panel.collections[0].get_clim() for panel in (left, right)]
    assert limits[0] == limits[1] == (-2 * 20_097.4, 2 * 20_097.4)
    names = [[tick.get_text()[3:6] for tick in panel.get_xticklabels()] for panel in (left, right)]
    assert names == [["neg", "pos", "neg"], ["pos", "neg", "pos"]]


def test_panels_side_by_side_write_thousands_short(drawn):
    left, right, *_ = drawn("influences_side_by_side")
    assert [text.get_text() for text in left.texts] == ["1", "-2", "0.5", "0.25", "20k", "-0.061"]
    assert right.texts[4].get_text() == "-40k"
