"""09: tables of what scorers reached before the judge, from the repository's `experiments`; their figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from support.chapters.figures import NEGATIVE, NEUTRAL, POSITIVE, new_axes, show

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
GREEN = "#55a868"
SMALL = {"textcoords": "offset points", "fontsize": 8}


@dataclass(frozen=True)
class Recommendation:
    """What the collection recommends: no other place on the way through training, λ and normalisation has
    a larger mean share of the noise ceilings of all banks, on the queries that are there to choose by."""

    scorer: str = "EK-FAC"
    where: str = "20%"
    regularization: str = "0.01"
    normalisation: str = "plain"


RECOMMENDED = Recommendation()


def committed(name: str) -> Path:
    """A file of the repository's folder `experiments`. Raises `FileNotFoundError`."""
    path = EXPERIMENTS / name
    if not path.is_file():
        cure = (
            "Chapter 09 needs the repository, which holds more than the installed package: run it in a clone."
        )
        raise FileNotFoundError(f"{path} is missing. {cure}")
    return path


def read_table(name: str) -> pd.DataFrame:
    """A committed table; settings that a scorer doesn't have are empty. Raises as `committed`."""
    return pd.read_csv(committed(f"{name}.csv"), keep_default_na=False, dtype={"regularization": str})


def rows_of(table: pd.DataFrame, chosen: Recommendation) -> pd.DataFrame:
    """The rows with these settings, one per experiment."""
    settings = pd.Series(vars(chosen))
    return table[(table[settings.index] == settings).all(axis=1)]


def predicted_and_retrained(predictions: dict[str, tuple], outcomes: np.ndarray, title: str) -> None:
    """For one query, summed influences of the subsets against the loss after training on them; a panel
    for each scorer of `predictions`: name → (sums, LDS)."""
    panels = np.atleast_1d(new_axes(8, 3, len(predictions)))
    for axes, (name, (sums, score)) in zip(panels, predictions.items(), strict=True):
        axes.scatter(sums, outcomes, s=14, color=POSITIVE, alpha=0.6, linewidths=0)
        axes.set(xlabel="summed influence of the half", title=f"{name}\nLDS {score:.2f}")
        axes.locator_params(axis="x", nbins=4)
    panels[0].figure.suptitle(title, x=0, ha="left", fontweight="bold")
    show(panels, ylabel="loss after training on it")


def scores_with_intervals(table: pd.DataFrame, ceiling: float, emphasised: Sequence[str], title: str) -> None:
    """LDS of every scorer (columns name, report, low, high), best on top, and the noise ceiling."""
    table = table.sort_values("report")
    axes = new_axes(7.5, 0.9 + 0.23 * len(table))
    for place, row in enumerate(table.itertuples()):
        color = POSITIVE if row.name in emphasised else NEUTRAL
        axes.plot([row.low, row.high], [place, place], color=color, linewidth=2)
        axes.plot(row.report, place, "o", color=color, markersize=5)
        axes.annotate(f"{row.report:.2f}", (row.low, place), (-4, 0), ha="right", va="center", **SMALL)
    axes.axvline(ceiling, color=NEGATIVE, linestyle="--", linewidth=1)
    axes.annotate(f"noise ceiling {ceiling:.2f}", (ceiling, 0), (-4, 0), ha="right", color=NEGATIVE, **SMALL)
    axes.set_yticks(range(len(table)), table["name"])
    axes.axvline(0, color=NEUTRAL, linewidth=0.6)
    axes.grid(axis="x", alpha=0.3)
    # Room for the number beside the lowest interval.
    left = min(-0.12, table["low"].min() - 0.15)
    show(axes, xlabel="linear datamodeling score", title=title, xlim=(left, 1.0))


def score_and_stability(
    regularizations: Sequence[float], curves: Mapping[str, Sequence[float]], stability: Sequence, title: str
) -> None:
    """LDS against λ for each of `curves`, and how alike the rankings of neighbouring λ are."""
    axes = new_axes(7, 3.2)
    for (name, values), color in zip(curves.items(), (POSITIVE, GREEN), strict=False):
        axes.plot(regularizations, values, "o-", color=color, markersize=4, label=name)
    between = [np.sqrt(one * other) for one, other in pairwise(regularizations)]
    ranks = "rank correlation of neighbouring λ"
    axes.plot(between, stability, "s--", color=NEGATIVE, markersize=4, label=ranks)
    axes.legend(fontsize=8)
    show(axes, title=title, xlabel="regularization λ", ylabel="correlation", xscale="log", ylim=(0, 1.02))


def along_the_path(table: pd.DataFrame, title: str) -> None:
    """LDS by the share of training after which influences were taken (index), a line per normalisation."""
    axes = new_axes(7, 3)
    axes.set_prop_cycle(color=[NEUTRAL, POSITIVE, GREEN])
    axes.plot(100 * table.index, table, "o-", markersize=4, label=table.columns)
    axes.legend()
    show(axes, xlabel="checkpoint, % of training", ylabel="LDS", title=title)


def removals(table: pd.DataFrame, title: str, of: str = "reviews removed, of 1,000") -> None:
    """Mean rise of the queries' loss against the number of removed reviews (columns scorer, removed,
    rise): a line per scorer, which ends in its name."""
    axes = new_axes(7.5, 3.4)
    ends = table[table["removed"] == table["removed"].max()].set_index("scorer")["rise"]
    gap, lowest, places = 0.055 * (ends.max() - min(ends.min(), 0)), -np.inf, {}
    for name, end in ends.sort_values().items():  # names at least a gap from each other
        places[name] = lowest = max(end, lowest + gap)
    colors = plt.get_cmap("tab10").colors
    for color, (name, rows) in zip(colors, table.groupby("scorer", sort=False), strict=False):
        color = NEUTRAL if name == "random" else color
        axes.plot(rows["removed"], rows["rise"], "o-", color=color, markersize=4)
        end = rows["removed"].max(), places[name]
        axes.annotate(name, end, (8, 0), va="center", color=color, **SMALL)
    axes.hlines(0, 0, table["removed"].max(), color=NEUTRAL, linewidth=0.6)
    show(axes, title=title, xlabel=of, ylabel="rise of the query's loss")


def scores_by_regularization(tables: Mapping[str, pd.DataFrame], ceiling: float, title: str) -> None:
    """LDS with its interval against λ (columns basis, regularization, report, low, high), a line for each
    basis and a panel for each table, below the noise ceiling."""
    panels = np.atleast_1d(new_axes(8, 3.2, len(tables)))
    for axes, (name, table) in zip(panels, tables.items(), strict=True):
        for color, (basis, rows) in zip(
            (NEGATIVE, POSITIVE), table.groupby("basis", sort=False), strict=False
        ):
            values = rows["regularization"].astype(float)
            axes.fill_between(values, rows["low"], rows["high"], color=color, alpha=0.2, linewidth=0)
            axes.plot(values, rows["report"], "o-", color=color, markersize=4, label=basis)
        axes.axhline(ceiling, color=NEUTRAL, linestyle="--", linewidth=1)
        axes.set(xscale="log", ylim=(0, 1), title=name, xlabel="regularization λ")
    max(panels, key=lambda axes: len(axes.lines)).legend(fontsize=8)
    panels[0].figure.suptitle(title, x=0, ha="left", fontweight="bold")
    show(panels, ylabel="LDS")


def scores_by_layer(tables: Mapping[str, pd.DataFrame], title: str) -> None:
    """LDS of each layer by itself (rows) for each λ (columns), a panel for each table."""
    panels = np.atleast_1d(new_axes(8, 4.2, len(tables)))
    for axes, (name, table) in zip(panels, tables.items(), strict=True):
        style = {"annot": True, "fmt": ".2f", "annot_kws": {"fontsize": 7}, "cmap": "Blues", "vmin": 0}
        ends = {"cbar": False, "yticklabels": axes is panels[0]}
        sns.heatmap(table, ax=axes, vmax=0.4, linewidths=0.3, **style, **ends)
        axes.set(title=name, xlabel="regularization λ", ylabel="")
    panels[0].figure.suptitle(title, x=0, ha="left", fontweight="bold")
    show(panels)


def single_removals(table: pd.DataFrame, scorers: Sequence[str], title: str) -> None:
    """Predicted change of a query's loss without one review (a column per scorer) against the true one, a
    panel for each; both times a thousand."""
    panels = np.atleast_1d(new_axes(8, 3.2, len(scorers)))
    for axes, name in zip(panels, scorers, strict=True):
        rank = table[name].corr(table["change"], method="spearman")
        axes.scatter(1e3 * table[name], 1e3 * table["change"], s=5, color=POSITIVE, alpha=0.3, linewidths=0)
        axes.axhline(0, color=NEUTRAL, linewidth=0.6)
        axes.axvline(0, color=NEUTRAL, linewidth=0.6)
        axes.set(title=f"{name}\nrank correlation {rank:.2f}", xlabel="predicted change, × 1,000")
    panels[0].figure.suptitle(title, x=0, ha="left", fontweight="bold")
    show(panels, ylabel="true change, × 1,000")
