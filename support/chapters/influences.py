"""04: which training reviews speak for or against a prediction, and what two reviews share."""

import re
from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from support.chapters.figures import MEANING, colours_up_to, new_axes
from support.text import paragraphs


def words_in_common(one: str, other: str) -> list[str]:
    """Words that both reviews use, stop words left out, in alphabetical order."""
    plain = (" ".join(paragraphs(text)).lower() for text in (one, other))
    first, second = (set(re.findall(r"[a-z][a-z']{2,}", text)) for text in plain)
    return sorted((first & second) - ENGLISH_STOP_WORDS)


def influences_by_labels(
    influences: np.ndarray, test_labels: Iterable, train_labels: Iterable, title: str
) -> None:
    """All influences, sorted by label: each pair of labels is a block. Colours end at the 99th percentile."""
    rows, columns = (np.argsort(labels, kind="stable") for labels in (test_labels, train_labels))
    colours = colours_up_to(np.quantile(np.abs(influences), 0.99))
    axes = new_axes(6.5, 5)
    colour_bar = {"label": f"share of the row's largest: {MEANING}", "extend": "both"}
    sns.heatmap(influences[rows][:, columns], ax=axes, cbar_kws=colour_bar, **colours)
    sides = [(test_labels, axes.axhline, axes.set_yticks), (train_labels, axes.axvline, axes.set_xticks)]
    for labels, line, ticks in sides:
        negative = int(np.sum(np.asarray(labels) == 0))
        line(negative, color="black", linewidth=1)
        ticks([negative / 2, (negative + len(labels)) / 2], ["negative", "positive"], rotation=0)
    axes.set(title=title, xlabel="training reviews", ylabel="test reviews")
    plt.show()
