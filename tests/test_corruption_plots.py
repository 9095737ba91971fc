"""What the figures of the search for wrong labels promise."""

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")


from support import corruption_plots

FIGURES = {
    "finding_curves": lambda: corruption_plots.finding_curves(
        [{"a ranking": np.array([[0.0, 0.5, 1.0], [0.0, 1.0, 1.0]])}] * 2,
        0.5,
        ["A title", "Another"],
    ),
    "accuracy_after_dropping": lambda: corruption_plots.accuracy_after_dropping(
        {"a ranking": np.array([[0.8, 0.9], [0.9, 0.9]])}, [0.1, 0.2], {"all kept": 0.8}, "A title"
    ),
}


@pytest.fixture
def drawn(figure):
    """The axes of a figure by its name."""
    return lambda name: figure(FIGURES[name]).axes


def test_every_figure_is_tried_here():
    public = {
        name
        for name, value in vars(corruption_plots).items()
        if getattr(value, "__module__", "") == corruption_plots.__name__
    }
    assert public == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_title_axes_in_words_and_a_white_ground(drawn, name):
    first, *_ = axes = drawn(name)
    assert first.get_title(loc="left") == "A title"
    assert first.get_xlabel().endswith("%")
    assert first.get_ylabel().endswith("%")
    assert all(one.figure.get_facecolor() == (1, 1, 1, 1) for one in axes)


def test_a_finding_curve_is_the_mean_over_trials_in_percent(drawn):
    line, perfect = drawn("finding_curves")[0].lines
    np.testing.assert_array_equal(line.get_xydata(), [[0, 0], [50, 75], [100, 100]])
    np.testing.assert_array_equal(perfect.get_xydata(), [[0, 0], [50, 100], [100, 100]])


def test_accuracies_after_dropping_are_means_over_trials_in_percent(drawn):
    heights = drawn("accuracy_after_dropping")[0].lines[0].get_ydata()
    np.testing.assert_allclose(heights, [85, 90])


def test_references_are_drawn_across_and_named_beside_the_axes(drawn):
    axes = drawn("accuracy_after_dropping")[0]
    (name,) = axes.texts
    assert name.get_text() == "all kept"
    assert name.get_window_extent().x0 > axes.get_window_extent().x1
