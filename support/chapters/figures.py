"""What all figures share. A figure is a function that knows arrays and strings and returns nothing: it is
shown, on a white ground of its own, so that it reads the same on light and dark pages.
"""

from collections.abc import Callable, Iterable

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes

NEGATIVE, POSITIVE, NEUTRAL = "#c44e52", "#4c72b0", "#8c8c8c"
STYLE = {"figure.dpi": 110, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False}
MEANING = "blue helps, red harms"


def new_axes(width: float | int, height: float | int, panels: int = 1) -> Axes | np.ndarray:
    """Axes of that size in inches, in the collection's style; an array of them for several panels."""
    sns.set_theme("paper", "ticks", rc=STYLE)
    _, axes = plt.subplots(1, panels, figsize=(width, height), layout="constrained")
    return axes


def show(axes: Axes | np.ndarray, **labels) -> None:
    """Label the first axes, and show the figure without the frames that say nothing."""
    np.atleast_1d(axes)[0].set(**labels)
    for one in np.atleast_1d(axes):
        sns.despine(ax=one)
    plt.show()


def name_beside(axes: Axes, name: str, height: float, **style) -> None:
    """A name to the right of the axes, at this height of the data."""
    said = {"va": "center", "xycoords": axes.get_yaxis_transform()} | style
    axes.annotate(name, (1, height), (4, 0), textcoords="offset points", **said)


def readable(value: float) -> str:
    """A number as people write it: 20,100, 4.2, 0.061."""
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"


def influence_heatmap(
    influences: np.ndarray, test_labels: Iterable, train_labels: Iterable, title: str, marked: tuple[int, int]
) -> None:
    """Influence of each training review (column) on each test review (row); `marked` is framed."""
    tests, trains = influences.shape
    axes = new_axes(min(9.0, 2.2 + 0.8 * trains), min(7.0, 1.3 + 0.5 * tests))
    limit = np.abs(influences).max()
    colour_bar = {"label": f"nats per unit of weight: {MEANING}", "format": "{x:,.6g}"}
    draw_heatmap(axes, influences, limit, [test_labels, train_labels], readable, cbar_kws=colour_bar)
    axes.add_patch(plt.Rectangle(marked[::-1], 1, 1, fill=False, edgecolor="black", lw=2))
    axes.set(title=title, xlabel="training review", ylabel="test review")
    plt.show()


def draw_heatmap(
    axes: Axes, influences: np.ndarray, limit: float, labels: list[Iterable], as_text: Callable, **colour_bar
) -> None:
    """Influences as text, in colours from −limit to limit; reviews are named by test and train labels."""
    names = dict(zip(["yticklabels", "xticklabels"], map(names_of, labels), strict=True))
    style = {"annot": np.vectorize(as_text)(influences), "fmt": "", "linewidths": 0.5, "ax": axes}
    sns.heatmap(influences, **style, **names, **colours_up_to(limit), **colour_bar)
    axes.tick_params(axis="y", rotation=0)


def colours_up_to(limit: float | np.floating) -> dict:
    """Colours of a heatmap from −limit to limit, zero in white."""
    limit = float(limit) or 1.0
    return {"vmin": -limit, "vmax": limit, "cmap": "RdBu"}


def names_of(labels: Iterable) -> list[str]:
    """Reviews as figures name them: `0 (neg)`, `1 (pos)`."""
    return [f"{row} ({'pos' if label else 'neg'})" for row, label in enumerate(labels)]
