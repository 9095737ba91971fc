"""02: how the model learned, and how sure and how right it is on reviews it has not seen."""

from collections.abc import Iterable, Sequence

import pandas as pd
import seaborn as sns

from support.chapters.figures import NEGATIVE, NEUTRAL, POSITIVE, new_axes, show


def learning_curve(losses: Sequence[float], snapshots: dict[str, int], title: str) -> None:
    """Training loss by step, smoothed, with the steps at which a snapshot was kept."""
    axes = new_axes(7, 2.8)
    window = max(1, len(losses) // 40)
    by_step = pd.Series(losses, index=range(1, len(losses) + 1))
    axes.plot(by_step, color=NEUTRAL, alpha=0.25, linewidth=0.6)
    axes.plot(by_step.rolling(window, 1).mean(), color=POSITIVE, label=f"mean of {window} steps")
    for name, step in snapshots.items():
        axes.axvline(step, color=NEUTRAL, linestyle=":", linewidth=1)
        top = step, axes.get_ylim()[1]
        axes.annotate(name.replace("-percent", " %"), top, ha="center", va="bottom", fontsize=7)
    axes.set_title(title, pad=18)
    axes.legend()
    show(axes, xlabel="training step (dotted: a snapshot was kept)", ylabel="cross-entropy")


def confidence(positive_probability: Iterable, labels: Iterable, tokens: Iterable, title: str) -> None:
    """How sure the model is on held-out reviews by their label, and its errors by review length."""
    left, right = axes = new_axes(8, 3, panels=2)
    frame = pd.DataFrame({"p": positive_probability, "label": labels, "tokens": tokens})
    style = {"bins": 20, "binrange": (0, 1), "element": "step", "fill": False, "linewidth": 1.8, "ax": left}
    for label, (name, color) in enumerate([("negative", NEGATIVE), ("positive", POSITIVE)]):
        sure = frame["p"][frame["label"] == label]
        sns.histplot(x=sure, label=f"true label {name}", color=color, **style)
    left.axvline(0.5, color=NEUTRAL, linewidth=0.8, linestyle=":")
    left.set(yscale="log", ylim=(1, None), title=title)
    left.legend(loc="lower center", frameon=True, framealpha=1, edgecolor="white")
    frame["wrong"] = (frame["p"] > 0.5) != (frame["label"] == 1)
    names = ["to 128", "129–256", "257–384", "385–511", "cut at 512"]
    frame["length"] = pd.cut(frame["tokens"], [0, 128, 256, 384, 511, 512], labels=names)
    rates = 100 * frame.groupby("length", observed=True)["wrong"].mean()
    sns.barplot(x=rates.index.astype(str), y=rates.to_numpy(), color=NEUTRAL, ax=right)
    right.set(xlabel="tokens", ylabel="wrong predictions, %", title="Cut reviews are misread most")
    right.tick_params(axis="x", labelsize=7)
    show(axes, xlabel="predicted probability of positive", ylabel="reviews (log)")
