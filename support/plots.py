"""One function per figure. They know arrays and strings, and return nothing: the figure is shown.

Every figure has a white ground of its own, so that it reads the same on light and dark pages.
"""

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from support.drawing import NEGATIVE, NEUTRAL, POSITIVE, new_axes, show

DIVERGING = "RdBu"


def learning_curve(losses: Sequence[float], snapshots: dict[str, int], title: str) -> None:
    """Training loss by step, smoothed, with the steps at which a snapshot was kept."""
    axes = new_axes(7, 2.8)
    window = max(1, len(losses) // 40)
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=NEUTRAL, alpha=0.25, linewidth=0.6)
    smooth = pd.Series(losses).rolling(window, min_periods=1).mean()
    axes.plot(steps, smooth, color=POSITIVE, label=f"mean of {window} steps")
    for name, step in snapshots.items():
        axes.axvline(step, color=NEUTRAL, linestyle=":", linewidth=1)
        share = name.replace("-percent", " %")
        axes.annotate(share, (step, axes.get_ylim()[1]), ha="center", va="bottom", fontsize=7)
    axes.set(xlabel="training step (dotted: a snapshot was kept)", ylabel="cross-entropy")
    axes.set_title(title, pad=18)
    axes.legend(frameon=False)
    show(axes)


def confidence(
    positive_probability: Iterable, labels: Iterable, tokens: Iterable, title: str
) -> None:
    """How sure the model is on held-out reviews by their label, and its errors by review length."""
    left, right = axes = new_axes(8, 3, panels=2)
    frame = pd.DataFrame({"p": positive_probability, "label": labels, "tokens": tokens})
    for label, (name, color) in enumerate([("negative", NEGATIVE), ("positive", POSITIVE)]):
        sns.histplot(
            x=frame["p"][frame["label"] == label],
            bins=20,
            binrange=(0, 1),
            element="step",
            fill=False,
            linewidth=1.8,
            color=color,
            label=f"true label {name}",
            ax=left,
        )
    left.axvline(0.5, color=NEUTRAL, linewidth=0.8, linestyle=":")
    left.set(yscale="log", ylim=(1, None), title=title)
    left.set(xlabel="predicted probability of positive", ylabel="reviews (log)")
    left.legend(loc="lower center", framealpha=1, edgecolor="white")
    frame["wrong"] = (frame["p"] > 0.5) != (frame["label"] == 1)
    names = ["to 128", "129–256", "257–384", "385–511", "cut at 512"]
    frame["length"] = pd.cut(frame["tokens"], [0, 128, 256, 384, 511, 512], labels=names)
    rates = 100 * frame.groupby("length", observed=True)["wrong"].mean()
    sns.barplot(x=rates.index.astype(str), y=rates.to_numpy(), color=NEUTRAL, ax=right)
    right.set(xlabel="tokens", ylabel="wrong predictions, %", title="Cut reviews are misread most")
    right.tick_params(axis="x", labelsize=7)
    show(axes)


def parameter_shares(frozen: dict[str, int], tracked: dict[str, int], title: str) -> None:
    """Parameters of each part of the model in millions: those with gradients and those without."""
    axes = new_axes(7, 2.8)
    parts = list(dict.fromkeys([*frozen, *tracked]))
    below = [frozen.get(part, 0) / 1e6 for part in parts]
    above = [tracked.get(part, 0) / 1e6 for part in parts]
    axes.bar(parts, below, color=NEUTRAL, label="frozen")
    axes.bar(parts, above, bottom=below, color=POSITIVE, label="with gradients")
    axes.set(title=title, ylabel="million parameters")
    axes.legend(frameon=False)
    show(axes)


def padding(lengths: Sequence[int], batch_size: int, longest: int, title: str) -> None:
    """Tokens read with every review padded to `longest`, to its batch in two orders, or not at all."""
    axes = new_axes(7, 2.2)
    totals = {
        f"all padded to {longest}": longest * len(lengths),
        "per batch, random order": _tokens_read(lengths, batch_size),
        "per batch, similar lengths": _tokens_read(sorted(lengths), batch_size),
        "real tokens": sum(lengths),
    }
    colors = [NEGATIVE, POSITIVE, POSITIVE, NEUTRAL]
    bars = axes.barh(list(totals), list(totals.values()), color=colors)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(title=title, xlabel=f"tokens read for {len(lengths)} reviews")
    axes.margins(x=0.12)
    show(axes)


def _tokens_read(lengths: Sequence[int], batch_size: int) -> int:
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return sum(max(batch) * len(batch) for batch in batches)


def influence_heatmap(
    influences: np.ndarray,
    test_labels: Iterable,
    train_labels: Iterable,
    title: str,
    marked: tuple[int, int] | None = None,
) -> None:
    """Influence of each training review (column) on each test review (row), zero in white.

    The colour scale ends at the largest absolute value; `marked` frames one entry.
    """
    tests, trains = influences.shape
    axes = new_axes(min(9.0, 2.2 + 0.8 * trains), min(7.0, 1.3 + 0.5 * tests))
    limit, numbers = np.abs(influences).max(), _readable(influences)
    _heatmap(axes, influences, limit, test_labels, train_labels, numbers, colour_bar=True)
    if marked is not None:
        row, column = marked
        axes.add_patch(plt.Rectangle((column, row), 1, 1, fill=False, edgecolor="black", lw=2))
    axes.set(title=title, xlabel="training review", ylabel="test review")
    plt.show()


def influences_side_by_side(
    influences: Sequence[np.ndarray],
    test_labels: Iterable,
    train_labels: Sequence[Iterable],
    titles: Sequence[str],
) -> None:
    """Influences of the same reviews under several labellings, one panel each, on one colour scale.

    The scale ends at the largest absolute value of all panels; thousands are written as k.
    """
    tests, trains = influences[0].shape
    panels = new_axes(
        min(7.6, 1.2 + 0.5 * trains * len(influences)), 1.9 + 0.36 * tests, len(influences)
    )
    limit = max(np.abs(values).max() for values in influences)
    for panel, values, labels, title in zip(panels, influences, train_labels, titles, strict=True):
        numbers = _readable(values, in_thousands=True)
        _heatmap(panel, values, limit, test_labels, labels, numbers, colour_bar=False)
        panel.set_xticklabels([name.replace(" ", "\n") for name in _names(labels)])
        panel.tick_params(labelsize=8)
        plt.setp(panel.texts, fontsize=7.5)
        panel.set(title=title, xlabel="training review")
        if panel is not panels[0]:
            panel.set_yticks([])
    panels[0].set_ylabel("test review")
    colour_bar = panels[0].figure.colorbar(
        panels[0].collections[0], ax=list(panels), location="bottom", aspect=40, shrink=0.6,
        label="blue helps, red harms", ticks=[-limit, 0, limit],
    )  # fmt: skip
    colour_bar.ax.set_xticklabels(_readable(np.array([-limit, 0, limit]), in_thousands=True))
    colour_bar.outline.set_visible(False)
    plt.show()


def _heatmap(
    axes: Axes,
    influences: np.ndarray,
    limit: float,
    test_labels: Iterable,
    train_labels: Iterable,
    numbers: np.ndarray,
    colour_bar: bool,
) -> None:
    limit = float(limit) or 1.0
    sns.heatmap(
        influences,
        vmin=-limit,
        vmax=limit,
        cmap=DIVERGING,
        ax=axes,
        annot=numbers,
        fmt="",
        linewidths=0.5,
        xticklabels=_names(train_labels),
        yticklabels=_names(test_labels),
        cbar=colour_bar,
        cbar_kws={"label": "blue helps, red harms", "format": "{x:,.6g}"} if colour_bar else None,
    )
    axes.tick_params(axis="y", rotation=0)


def _names(labels: Iterable) -> list[str]:
    return [f"{row} ({'pos' if label else 'neg'})" for row, label in enumerate(labels)]


def _readable(values: np.ndarray, in_thousands: bool = False) -> np.ndarray:
    """Numbers as people write them: 20,100, 4.2, 0.061; where room is short, 20k for 20,100."""

    def written(value: float) -> str:
        if in_thousands and abs(value) >= 10_000:
            return f"{value / 1000:,.0f}k"
        return f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2g}"

    return np.array([written(value) for value in values.flat]).reshape(values.shape)


def influences_by_labels(
    influences: np.ndarray, test_labels: Iterable, train_labels: Iterable, title: str
) -> None:
    """All influences at once, rows and columns sorted by label: each pair of labels is a block.

    Within a label the order is that of the samples; the colour scale ends at the 99th percentile.
    """
    rows, columns = (np.argsort(labels, kind="stable") for labels in (test_labels, train_labels))
    limit = float(np.quantile(np.abs(influences), 0.99)) or 1.0
    axes = new_axes(6.5, 5)
    sns.heatmap(
        influences[rows][:, columns],
        vmin=-limit,
        vmax=limit,
        cmap=DIVERGING,
        ax=axes,
        cbar_kws={"label": "share of the row's largest: blue helps, red harms", "extend": "both"},
    )
    for labels, line, ticks in [
        (test_labels, axes.axhline, axes.set_yticks),
        (train_labels, axes.axvline, axes.set_xticks),
    ]:
        negative = int(np.sum(np.asarray(labels) == 0))
        line(negative, color="black", linewidth=1)
        ticks([negative / 2, (negative + len(labels)) / 2], ["negative", "positive"], rotation=0)
    axes.set(title=title, xlabel="training reviews", ylabel="test reviews")
    plt.show()
