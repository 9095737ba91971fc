"""What the figures of layers promise."""

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")


from support import layer_plots

LAYERS = ["first", "second", "third"]
BY_LAYER = np.array([[3.0, -1.0], [2.0, 0.5], [0.0, -4.0]])
SHARES = np.array([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [0.4, 0.4, 0.2]])

FIGURES = {
    "along_layers": lambda: layer_plots.along_layers(
        BY_LAYER, LAYERS, {"review 0": 1, "review 2": 0}, "A title"
    ),
    "layer_shares": lambda: layer_plots.layer_shares(SHARES, [0.8, 0.2, 0.0], LAYERS, "A title"),
}


@pytest.fixture(params=FIGURES)
def name(request):
    return request.param


@pytest.fixture
def axes(name, figure):
    """The axes of a figure, drawn."""
    return figure(FIGURES[name]).gca()


def test_every_figure_is_tried_here():
    public = {
        name
        for name, value in vars(layer_plots).items()
        if getattr(value, "__module__", "") == layer_plots.__name__
    }
    assert public == set(FIGURES)


def test_a_figure_has_title_axes_in_words_and_a_white_ground(axes):
    assert axes.get_title(loc="left") == "A title"
    assert axes.get_xlabel() == "layer, from input to output"
    assert axes.get_ylabel()
    assert axes.figure.get_facecolor() == (1, 1, 1, 1)


def test_layers_are_named_in_their_order(axes):
    assert [tick.get_text() for tick in axes.get_xticklabels()] == LAYERS


@pytest.mark.parametrize("name", ["along_layers"], indirect=True)
def test_each_line_is_a_training_review_told_by_name_marker_and_stroke(axes):
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in lines] == ["review 0 (pos)", "review 2 (neg)"]
    assert [line.get_linestyle() for line in lines] == ["-", "--"]
    assert len({line.get_marker() for line in lines}) == 2
    np.testing.assert_array_equal([line.get_ydata() for line in lines], BY_LAYER.T)


@pytest.mark.parametrize("name", ["layer_shares"], indirect=True)
def test_shares_have_one_dot_per_test_review_a_median_and_the_squares(axes):
    *dots, medians = axes.collections
    for layer, of_layer in enumerate(dots):
        np.testing.assert_allclose(of_layer.get_offsets()[:, 1], 100 * SHARES[:, layer])
    heights = [segment[0, 1] for segment in medians.get_segments()]
    np.testing.assert_allclose(heights, [55, 25, 20])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [80, 20, 0])
