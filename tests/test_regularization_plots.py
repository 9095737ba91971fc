"""The figures of the appendix on regularization."""

import matplotlib as mpl
import numpy as np
import pandas as pd

mpl.use("Agg")


from support import regularization_plots


def test_each_kind_of_correlation_has_a_panel_with_a_row_per_layer(figure):
    table = pd.DataFrame({"1 → 2": [0.5, 1.0], "2 → 3": [0.1, -0.2]}, index=["first", "second"])
    shown = figure(
        regularization_plots.neighbour_correlations, {"pearson": table, "spearman": table}, "Title"
    )
    assert shown.get_suptitle() == "Title"
    assert [axes.get_title(loc="left") for axes in shown.axes[:2]] == ["Pearson", "Spearman"]
    assert [tick.get_text() for tick in shown.axes[0].get_yticklabels()] == ["first", "second"]
    assert shown.axes[0].collections[0].get_clim() == (-1, 1)


def test_spectra_fall_from_the_largest_eigenvalue_and_show_the_regularizations(figure):
    values = {"layer": np.array([[0.1, 3.0], [0.5, 1e-4]])}
    shown = figure(regularization_plots.spectra, values, {"small": 1e-3, "large": 1.0}, "Title")
    axes = shown.axes[0]
    assert axes.get_title(loc="left") == "Title"
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [3.0, 0.5, 0.1, 1e-4])
    assert [line.get_ydata()[0] for line in axes.lines[1:]] == [1e-3, 1.0]
    assert {text.get_text() for text in axes.texts} == {"small", "large"}
    right = axes.get_window_extent().x1
    assert all(text.get_window_extent().x0 > right for text in axes.texts)
