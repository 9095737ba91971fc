"""06: an influence spread over layers. Figures know arrays and strings only."""

from collections.abc import Sequence

import numpy as np

from support.chapters.figures import NEGATIVE, NEUTRAL, POSITIVE, new_axes, show

MARKERS = "osD^vPX*"
DEPTH = "layer, from input to output"


def along_layers(by_layer: np.ndarray, layers: list[str], train_labels: dict[str, int], title: str) -> None:
    """What every layer (row) adds to the influence of a few training reviews (columns), in percent of all
    that is added up in the column, as lines: positive reviews blue and solid, negative ones red and dashed.
    `train_labels`: name → label, column by column."""
    axes = new_axes(8, 3.8)
    percent = 100 * by_layer / np.abs(by_layer).sum(axis=0)
    for column, (name, label) in enumerate(train_labels.items()):
        line, color, said = ("-", POSITIVE, "pos") if label else ("--", NEGATIVE, "neg")
        style = {"marker": MARKERS[column % len(MARKERS)], "markersize": 4, "linewidth": 1.2}
        axes.plot(percent[:, column], line, color=color, label=f"{name} ({said})", **style)
    axes.axhline(0, color=NEUTRAL, linewidth=0.8)
    axes.set_xticks(range(len(layers)), layers, rotation=40, ha="right")
    axes.legend(title="training review", loc="upper left", bbox_to_anchor=(1, 1))
    show(axes, title=title, xlabel=DEPTH, ylabel="% of the line's own sizes")


def layer_shares(of_sizes: np.ndarray, layers: Sequence[str], title: str) -> None:
    """Each layer's share of all sizes of influence, a dot per test review, and the median: `of_sizes` is
    (test reviews, layers), rows adding up to one."""
    axes = new_axes(8, 3.8)
    beside = np.random.default_rng(0).uniform(-0.25, 0.25, size=len(of_sizes))
    places = np.arange(len(layers))
    dots = {"s": 7, "color": NEUTRAL, "alpha": 0.45, "linewidths": 0, "label": "one test review"}
    axes.scatter(places + beside[:, None], 100 * of_sizes, **dots)
    bars = {"color": POSITIVE, "linewidth": 2.5, "label": "median test review"}
    axes.hlines(100 * np.median(of_sizes, axis=0), places - 0.35, places + 0.35, **bars)
    axes.set_xticks(places, layers, rotation=40, ha="right")
    axes.legend()
    show(axes, title=title, ylim=(0, None), xlabel=DEPTH, ylabel="share of the total, %")
