"""04: a steep and a flat direction, which training reviews speak for or against a prediction, and what two
reviews share."""

import re
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from support.chapters import figures
from support.chapters.figures import MEANING, NEGATIVE, NEUTRAL, POSITIVE, colours_up_to, new_axes, show
from support.text import paragraphs

QUIVER = {"angles": "xy", "scale_units": "xy", "scale": 1}


def words_in_common(one: str, other: str) -> list[str]:
    """Words that both reviews use, stop words left out, in alphabetical order."""
    plain = (" ".join(paragraphs(text)).lower() for text in (one, other))
    first, second = (set(re.findall(r"[a-z][a-z']{2,}", text)) for text in plain)
    return sorted((first & second) - ENGLISH_STOP_WORDS)


def influences_by_labels(
    influences: np.ndarray, test_labels: Iterable, train_labels: Iterable, title: str
) -> None:
    """All influences, sorted by label: each pair of labels is a block. Colours end at the largest."""
    rows, columns = (np.argsort(labels, kind="stable") for labels in (test_labels, train_labels))
    colours = colours_up_to(np.abs(influences).max())
    axes = new_axes(6.5, 5)
    colour_bar = {"label": f"share of the row's largest: {MEANING}"}
    sns.heatmap(influences[rows][:, columns], ax=axes, cbar_kws=colour_bar, **colours)
    sides = [(test_labels, axes.axhline, axes.set_yticks), (train_labels, axes.axvline, axes.set_xticks)]
    for labels, line, ticks in sides:
        negative = int(np.sum(np.asarray(labels) == 0))
        line(negative, color="black", linewidth=1)
        ticks([negative / 2, (negative + len(labels)) / 2], ["negative", "positive"], rotation=0)
    axes.set(title=title, xlabel="training reviews", ylabel="test reviews")
    plt.show()


def steep_and_flat(curvatures: Sequence[float], regularizations: Sequence[float], title: str) -> None:
    """A loss with a flat and a steep direction, as contour lines over two weights: one push, equally long
    in both (`curvatures`: flat, steep), and what (F + λ)⁻¹ makes of it for two λ."""
    axes = new_axes(6.2, 3.8)
    turn = np.pi / 6
    basis = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    across, up = np.meshgrid(np.linspace(-1.2, 2.9, 120), np.linspace(-0.9, 2.0, 120))
    along = basis.T @ np.stack([across.ravel(), up.ravel()])
    loss = (np.array(curvatures)[:, None] * along**2).sum(axis=0).reshape(across.shape)
    axes.contour(across, up, loss, levels=np.geomspace(0.15, 24, 9), colors=NEUTRAL, linewidths=0.5)
    push = np.full(2, 0.55)
    arrows = {"the push": (push, "black")}
    for value, color in zip(regularizations, (NEGATIVE, POSITIVE), strict=True):
        arrows[f"divided by curvature + {value:g}"] = (push / (np.array(curvatures) + value), color)
    for name, (arrow, color) in arrows.items():
        axes.quiver(0, 0, *(basis @ arrow), color=color, label=name, width=0.008, **QUIVER)
    for name, place in {"flat": (2.6, 0.12), "steep": (0, 1.1)}.items():
        axes.annotate(name, basis @ place, color=NEUTRAL, ha="center", fontstyle="italic")
    axes.set(aspect="equal", xlim=(-1.2, 2.9), ylim=(-0.9, 2.0))
    axes.legend(loc="lower right", frameon=True)
    show(axes, title=title, xlabel="one weight", ylabel="another weight")


def influences_side_by_side(
    influences: list[np.ndarray], test_labels: Iterable, train_labels: list[Iterable], titles: list[str]
) -> None:
    """Influences of the same reviews, taken in several ways, as percentages of their row's largest: a panel
    for each, on one colour scale."""
    tests, trains = influences[0].shape
    width = min(7.6, 1.2 + 0.5 * trains * len(influences))
    panels = figures.new_axes(width, 1.9 + 0.36 * tests, len(influences))
    limit, short = np.abs(influences).max(), lambda value: f"{value:.{int(abs(value) < 10)}f}"
    for panel, values, labels, title in zip(panels, influences, train_labels, titles, strict=True):
        figures.draw_heatmap(panel, values, limit, [test_labels, labels], short, cbar=False)
        panel.set_xticklabels([name.replace(" ", "\n") for name in figures.names_of(labels)])
        panel.tick_params(labelsize=8)
        plt.setp(panel.texts, fontsize=7.5)
        panel.set(title=title, xlabel="training review")
    for panel in panels[1:]:
        panel.set_yticks([])
    panels[0].set_ylabel("test review")
    place = {"ax": list(panels), "location": "bottom", "aspect": 40, "shrink": 0.6}
    ends = {"ticks": [-limit, 0.0, limit], "label": f"% of the row's largest: {figures.MEANING}"}
    colour_bar = panels[0].figure.colorbar(panels[0].collections[0], **ends, **place)
    colour_bar.outline.set_visible(False)
    plt.show()
