"""02: how the model learned, and how sure and how right it is on reviews it has not seen."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import seaborn as sns

from support.chapters.figures import NEGATIVE, NEUTRAL, POSITIVE, new_axes, show


def learning_curve(losses: Sequence[float], snapshots: dict[str, int], title: str) -> None:
    """Training loss by step, smoothed, with the steps at which a snapshot was kept."""
    axes = new_axes(7, 2.8)
    window = max(1, len(losses) // 40)
    by_step = pd.Series(losses, index=np.arange(1, len(losses) + 1))
    axes.plot(by_step, color=NEUTRAL, alpha=0.25, linewidth=0.6)
    smooth = by_step.rolling(window, min_periods=1).mean()
    axes.plot(smooth, color=POSITIVE, label=f"mean of {window} steps")
    for name, step in snapshots.items():
        axes.axvline(step, color=NEUTRAL, linestyle=":", linewidth=1)
        share = name.replace("-percent", " %")
        axes.annotate(share, (step, axes.get_ylim()[1]), ha="center", va="bottom", fontsize=7)
    axes.set_title(title, pad=18)
    axes.legend(frameon=False)
    show(axes, xlabel="training step (dotted: a snapshot was kept)", ylabel="cross-entropy")


def confidence(positive_probability: Iterable, labels: Iterable, tokens: Iterable, title: str) -> None:
    """How sure the model is on held-out reviews by their label, and its errors by review length."""
    left, right = axes = new_axes(8, 3, panels=2)
    frame = pd.DataFrame({"p": positive_probability, "label": labels, "tokens": tokens})
    for label, (name, color) in enumerate([("negative", NEGATIVE), ("positive", POSITIVE)]):
        said, sure = f"true label {name}", frame["p"][frame["label"] == label]
        style = {"element": "step", "fill": False, "linewidth": 1.8, "color": color}
        sns.histplot(x=sure, bins=20, binrange=(0, 1), label=said, ax=left, **style)
    left.axvline(0.5, color=NEUTRAL, linewidth=0.8, linestyle=":")
    left.set(yscale="log", ylim=(1, None), title=title)
    left.legend(loc="lower center", framealpha=1, edgecolor="white")
    frame["wrong"] = (frame["p"] > 0.5) != (frame["label"] == 1)
    names = ["to 128", "129–256", "257–384", "385–511", "cut at 512"]
    frame["length"] = pd.cut(frame["tokens"], [0, 128, 256, 384, 511, 512], labels=names)
    rates = 100 * frame.groupby("length", observed=True)["wrong"].mean()
    sns.barplot(x=rates.index.astype(str), y=rates.to_numpy(), color=NEUTRAL, ax=right)
    right.set(xlabel="tokens", ylabel="wrong predictions, %", title="Cut reviews are misread most")
    right.tick_params(axis="x", labelsize=7)
    show(axes, xlabel="predicted probability of positive", ylabel="reviews (log)")
