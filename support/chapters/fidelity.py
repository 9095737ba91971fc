"""09: the tables of what scorers reached before the judge, and figures of them.

Tables and banks lie in the repository's folder `experiments`, whose commands made them; an installed
package has none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from support.chapters.figures import NEGATIVE, NEUTRAL, POSITIVE, new_axes, show

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
END = "100%"
ON_THE_WAY = ("0%", "5%", "10%", "35%", "50%", "75%")
CUSTOMARY = ("1e-05", "auto", "heuristic", "1e-08 (default)")
RANDOM = "random"


class OutsideTheRepository(FileNotFoundError):
    """Committed results are asked for where there is no repository."""


@dataclass(frozen=True)
class Recommendation:
    """What the collection recommends: EK-FAC a fifth of the way through training, as it is.

    Of all places, λ and normalisations it has the largest share of the noise ceiling, mean over the
    experiments, on the queries that are there to choose by.
    """

    scorer: str = "EK-FAC"
    where: str = "20%"
    regularization: str = "0.01"
    normalisation: str = "plain"


RECOMMENDED = Recommendation()


def committed(name: str) -> Path:
    """A file of the repository's folder `experiments`. Raises `OutsideTheRepository`."""
    path = EXPERIMENTS / name
    if not path.is_file():
        raise OutsideTheRepository(
            f"{path} is missing. Chapter 09 needs the repository with its folder `experiments`, which "
            "the installed package leaves out: run it in a clone."
        )
    return path


def read_table(name: str) -> pd.DataFrame:
    """A committed table; settings that a scorer doesn't have are empty. Raises as `committed`."""
    path = committed(f"{name}.csv")
    return pd.read_csv(path, keep_default_na=False, dtype={"regularization": str})


def judgement(experiment: str) -> pd.DataFrame:
    """What the scorers reached on one experiment's bank, Kronfluence included."""
    rows = pd.concat([read_table("judgement"), read_table("kronfluence")], ignore_index=True)
    return rows[rows["experiment"] == experiment].reset_index(drop=True)


def rows_of(table: pd.DataFrame, chosen: Recommendation) -> pd.DataFrame:
    """The rows with these settings, one per experiment."""
    for setting, value in vars(chosen).items():
        table = table[table[setting] == value]
    return table


def one_row_for_each(table: pd.DataFrame) -> pd.DataFrame:
    """For every scorer, place and normalisation the λ that is best on the queries to choose by; and
    what is customary, whatever it reaches.

    The columns of the table, and `name`. Of the places, the end, a fifth, and the means.
    """
    exact = table["scorer"].str.startswith(("exact", "K-FAC"))
    skipped = table["where"].isin(ON_THE_WAY) | (exact & (table["where"] != END))
    skipped |= (table["normalisation"] == "relative") & (table["where"] != END)
    rows = []
    for _, group in table[~skipped].groupby(["scorer", "where", "normalisation"], sort=False):
        rows.append(group.loc[group["choice"].idxmax()])
        at_the_end = (group["normalisation"] == "plain") & (group["where"] == END)
        customary = group["regularization"].isin(CUSTOMARY) & at_the_end
        rows += [row for _, row in group[customary].iterrows()]
    found = pd.DataFrame(rows)
    return found.assign(name=found.apply(_name, axis=1)).drop_duplicates("name", ignore_index=True)


def _name(row: pd.Series) -> str:
    if not row["normalisation"]:
        return row["scorer"]
    place = "at the end" if row["where"] == END else f"at {row['where']}"
    parts = [f"{row['scorer']} {place}", f"λ = {row['regularization']}"]
    return ", ".join(parts if row["normalisation"] == "plain" else [*parts, row["normalisation"]])


def scores_along_the_path(experiment: str, scorer: str, regularization: str) -> pd.DataFrame:
    """LDS by checkpoint (a share of training) and normalisation."""
    rows = read_table("judgement").query(
        "experiment == @experiment and scorer == @scorer and regularization == @regularization"
    )
    rows = rows[rows["where"].str.endswith("%")]
    shares = rows["where"].str.rstrip("%").astype(int) / 100
    return rows.assign(share=shares).pivot_table(
        index="share", columns="normalisation", values="report", sort=False
    )


def rises() -> pd.DataFrame:
    """Columns scorer, removed, rise: how far the loss rose above that with all reviews, mean over the
    queries whose most helpful reviews were removed."""
    table = read_table("removal")
    whole = table[table["removed"] == 0].set_index(["scorer", "query"])["loss"]
    before = table.set_index(["scorer", "query"]).index.map(whole)
    rise = table.assign(rise=table["loss"] - before)
    return rise.groupby(["scorer", "removed"], sort=False)["rise"].mean().reset_index()


def predicted_and_retrained(
    predictions: Mapping[str, tuple[np.ndarray, float]], outcomes: np.ndarray, title: str
) -> None:
    """For one query: the summed influence of each subset against the loss after training on it.

    `predictions` has sums and LDS by the scorer's name; one panel each.
    """
    panels = np.atleast_1d(new_axes(8, 3, panels=len(predictions)))
    for axes, (name, (sums, score)) in zip(panels, predictions.items(), strict=True):
        axes.scatter(sums, outcomes, s=14, color=POSITIVE, alpha=0.6, linewidths=0)
        axes.set(xlabel="summed influence of the half", title=f"{name}\nLDS {score:.2f}")
        axes.locator_params(axis="x", nbins=4)
    panels[0].set_ylabel("loss after training on it")
    panels[0].figure.suptitle(title, x=0, ha="left", fontweight="bold")
    show(panels)


def scores_with_intervals(
    table: pd.DataFrame, ceiling: float, emphasised: Sequence[str], title: str
) -> None:
    """LDS of every scorer with its interval, best on top, and the noise ceiling.

    `table` has columns name, report, low, high.
    """
    table = table.sort_values("report")
    axes = new_axes(7.5, 0.9 + 0.23 * len(table))
    for place, row in enumerate(table.itertuples()):
        color = POSITIVE if row.name in emphasised else NEUTRAL
        axes.plot([row.low, row.high], [place, place], color=color, linewidth=2)
        axes.plot(row.report, place, "o", color=color, markersize=5)
        axes.annotate(
            f"{row.report:.2f}", (row.low, place), (-4, 0), textcoords="offset points",
            ha="right", va="center", fontsize=8,
        )  # fmt: skip
    axes.axvline(ceiling, color=NEGATIVE, linestyle="--", linewidth=1)
    axes.annotate(
        f"noise ceiling {ceiling:.2f}", (ceiling, 0), (-4, 0), textcoords="offset points",
        ha="right", color=NEGATIVE, fontsize=8,
    )  # fmt: skip
    axes.set_yticks(range(len(table)), table["name"])
    axes.axvline(0, color=NEUTRAL, linewidth=0.6)
    # Room for the number beside a score of zero.
    axes.set(xlabel="linear datamodeling score", title=title, xlim=(-0.12, 1.0))
    axes.grid(axis="x", alpha=0.3)
    show(axes)


def score_and_stability(
    regularizations: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    stability: Sequence[float],
    title: str,
) -> None:
    """LDS against λ for each of `curves`, and how alike the rankings of neighbouring λ are."""
    axes = new_axes(7, 3.2)
    colors = [POSITIVE, "#55a868", "#8172b3"]
    for (name, values), color in zip(curves.items(), colors, strict=False):
        axes.plot(regularizations, values, "o-", color=color, markersize=4, label=name)
    between = np.sqrt(np.array(regularizations[1:]) * np.array(regularizations[:-1]))
    axes.plot(
        between, stability, "s--", color=NEGATIVE, markersize=4,
        label="rank correlation of neighbouring λ",
    )  # fmt: skip
    axes.set(xscale="log", xlabel="regularization λ", ylabel="correlation", title=title)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8)
    show(axes)


def along_the_path(table: pd.DataFrame, title: str) -> None:
    """LDS by the share of training after which influences were taken, a line per normalisation.

    `table` has a row per share (its index) and a column per normalisation.
    """
    axes = new_axes(7, 3)
    colors = [NEUTRAL, POSITIVE, "#55a868"]
    for name, color in zip(table.columns, colors, strict=False):
        axes.plot(100 * table.index, table[name], "o-", color=color, markersize=4, label=name)
    axes.set(xlabel="checkpoint, % of training", ylabel="LDS", title=title)
    axes.legend(frameon=False)
    show(axes)


def removals(table: pd.DataFrame, title: str) -> None:
    """Mean rise of the queries' loss against the number of removed reviews, a line per scorer.

    `table` has columns scorer, removed, rise; lines end in the scorer's name.
    """
    axes = new_axes(7.5, 3.4)
    ends = table[table["removed"] == table["removed"].max()].set_index("scorer")["rise"]
    places = _apart(ends.sort_values(), 0.055 * (ends.max() - min(ends.min(), 0)))
    colors = plt.get_cmap("tab10").colors
    for color, (name, rows) in zip(colors, table.groupby("scorer", sort=False), strict=False):
        color = NEUTRAL if name == RANDOM else color
        axes.plot(rows["removed"], rows["rise"], "o-", color=color, markersize=4)
        end = rows["removed"].max()
        axes.annotate(
            name, (end, places[name]), (8, 0), textcoords="offset points", va="center",
            color=color, fontsize=8,
        )  # fmt: skip
    axes.hlines(0, 0, table["removed"].max(), color=NEUTRAL, linewidth=0.6)
    axes.set(xlabel="reviews removed, of 1,000", ylabel="rise of the query's loss", title=title)
    show(axes)


def _apart(values: pd.Series, gap: float) -> dict[str, float]:
    """Places for labels at ascending values, at least `gap` from each other."""
    places: dict[str, float] = {}
    last = -np.inf
    for name, value in values.items():
        last = max(value, last + gap)
        places[name] = last
    return places
