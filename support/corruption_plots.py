"""Figures of the search for wrong labels. They know arrays and strings only."""

from collections.abc import Sequence

import numpy as np

from support.drawing import NEUTRAL, new_axes, show

LINES = [
    ("#4c72b0", "-"),
    ("#c44e52", "--"),
    ("#2f8f5b", "-."),
    ("#8172b3", (0, (4, 1, 1, 1, 1, 1))),
    ("#8c8c8c", ":"),
    ("#000000", "-"),
]
"""Colour and dashes of lines that are told apart without colour, too."""


def finding_curves(
    curves: Sequence[dict[str, np.ndarray]], share_flipped: float, titles: Sequence[str]
) -> None:
    """Share of the wrong labels found against the share of reviews inspected; one panel per experiment.

    `curves`: for each panel, ranking → (draws, inspected + 1); the line is the mean over draws, the
    band one standard deviation to either side. The thin line is the ranking of one who knows.
    """
    panels = np.atleast_1d(new_axes(4.2 * len(curves), 3.8, len(curves)))
    for axes, of_panel, title in zip(panels, curves, titles, strict=True):
        for (name, draws), (color, line) in zip(of_panel.items(), LINES, strict=False):
            inspected = np.linspace(0, 100, draws.shape[1])
            mean, spread = 100 * draws.mean(axis=0), 100 * draws.std(axis=0)
            axes.plot(inspected, mean, color=color, linestyle=line, linewidth=1.8, label=name)
            axes.fill_between(
                inspected, mean - spread, mean + spread, color=color, alpha=0.15, lw=0
            )
        perfect = [0, 100 * share_flipped, 100]
        axes.plot(perfect, [0, 100, 100], color="black", linewidth=0.7, label="flips known")
        axes.set(xlim=(0, 100), ylim=(0, 102), title=title, xlabel="reviews inspected, %")
    panels[0].set(ylabel="flipped labels found, %")
    panels[-1].legend(frameon=False, loc="lower right")
    show(panels)


def accuracy_after_dropping(
    accuracies: dict[str, np.ndarray],
    shares: Sequence[float],
    references: dict[str, float],
    title: str,
) -> None:
    """Accuracy of the model trained again without the most suspicious share, one line per ranking.

    `accuracies`: ranking → (draws, shares), bars are standard errors of the mean over draws;
    `references` are drawn across and named beside the axes.
    """
    axes = new_axes(7.5, 4)
    for number, (name, draws) in enumerate(accuracies.items()):
        color, line = LINES[number % len(LINES)]
        dodged = 100 * np.asarray(shares) + 0.12 * (number - (len(accuracies) - 1) / 2)
        mean, error = draws.mean(axis=0), draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
        axes.errorbar(
            dodged, 100 * mean, 100 * error, color=color, linestyle=line, fmt="o", ms=3, label=name
        )
    for name, value in references.items():
        axes.axhline(100 * value, color=NEUTRAL, linewidth=0.7)
        axes.annotate(
            name, (1, 100 * value), (4, 0), xycoords=axes.get_yaxis_transform(),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    axes.set(
        title=title, xlabel="most suspicious reviews dropped, %", xticks=[100 * s for s in shares]
    )
    axes.set(ylabel="held-out accuracy, %")
    axes.figure.legend(frameon=False, loc="outside lower center", ncols=3)
    show(axes)
