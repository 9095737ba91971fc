"""The tables that chapter 09 shows, from those of scores and removals and from the banks."""

from pathlib import Path

import pandas as pd

from experiments.bank_making import EXPERIMENTS, QUERIES, bank_path
from support.chapters.fidelity import Recommendation, read_table, rows_of
from support.judge import halves, load_bank, noise_ceiling

FOLDER = Path(__file__).parent
HALVES = dict(zip(("choice", "report"), halves(QUERIES), strict=True))
STAND_IN, END = "exact, per layer", "100%"
ON_THE_WAY = ("0%", "5%", "10%", "35%", "50%", "75%")
CUSTOMARY = ("1e-05", "auto", "heuristic", "1e-08 (default)")


def ceiling(experiment: str, half: str = "report") -> float:
    """The noise ceiling of a committed bank, on one half of its queries."""
    return noise_ceiling(load_bank(bank_path(experiment)).of_queries(HALVES[half]))


def across_experiments() -> pd.DataFrame:
    """What holds beyond `main`: LDS of a few scorers on every bank, and each bank's noise ceiling.

    The per-layer exact solve stands in for EK-FAC, which approximates it, at λ = 1e-2.
    """
    table = read_table("judgement")
    shown = {
        "at the end, λ = 1e-5": Recommendation(STAND_IN, END, "1e-05", "plain"),
        "at the end": Recommendation(STAND_IN, END, "0.01", "plain"),
        "at the end, unit residual": Recommendation(STAND_IN, END, "0.01", "unit residual"),
        "at 20 %": Recommendation(STAND_IN, "20%", "0.01", "plain"),
        "at 20 %, unit residual": Recommendation(STAND_IN, "20%", "0.01", "unit residual"),
    }
    columns = {
        name: rows_of(table, chosen).set_index("experiment")["report"] for name, chosen in shown.items()
    }
    signed = table[table["scorer"] == "representation cosine, label sign"]
    columns["representation × label"] = signed.set_index("experiment")["report"]
    frame = pd.DataFrame(columns).loc[list(EXPERIMENTS)]
    frame["noise ceiling"] = [ceiling(name) for name in EXPERIMENTS]
    frame.index = [f"{name}: {EXPERIMENTS[name].about}" for name in EXPERIMENTS]
    return frame.rename_axis("bank")


def shares_of_ceiling(half: str) -> pd.DataFrame:
    """For every place, λ and normalisation of the stand-in: LDS as a share of the noise ceiling, on
    each bank, and their mean; best mean first. `half` of the queries: "choice" or "report"."""
    table = read_table("judgement").query("scorer == @STAND_IN")
    ceilings = pd.Series({name: ceiling(name, half) for name in EXPERIMENTS})
    frame = table.assign(share=table[half] / table["experiment"].map(ceilings)).pivot_table(
        index=["where", "regularization", "normalisation"], columns="experiment", values="share"
    )
    return frame.assign(mean=frame.mean(axis=1)).sort_values("mean", ascending=False)


def judgement(experiment: str) -> pd.DataFrame:
    """What the scorers reached on one experiment's bank, Kronfluence included."""
    rows = pd.concat([read_table("judgement"), read_table("kronfluence")], ignore_index=True)
    return rows[rows["experiment"] == experiment].reset_index(drop=True)


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


def whole_models() -> pd.DataFrame:
    """Of the bank of whole models: for every scorer, place, tracked layers and basis the λ that is best on
    the queries to choose by, and `name`."""
    table = read_table("whole_model").query("layer == '' and normalisation != 'relative'")
    best = table.loc[table.groupby(["scorer", "where", "tracked", "basis"])["choice"].idxmax()]
    return best.assign(name=best.apply(_name_of_whole, axis=1)).sort_values("report", ascending=False)


def _name_of_whole(row: pd.Series) -> str:
    if not row["where"]:
        return row["scorer"]
    alone = row["basis"] == "gradients alone"
    place = "at the end" if row["where"] == END else f"at {row['where']}"
    parts = [f"{row['basis'] if alone else row['scorer']} {place}"]
    parts += ["LoRA's matrices"] if row["tracked"] == "LoRA" else []
    return ", ".join(parts if alone else [*parts, row["basis"], f"λ = {row['regularization']}"])


def whole_by_layer() -> pd.DataFrame:
    """Of the bank of whole models: LDS by place, layer from input to output, and λ, in the basis of positions
    with gradient; `best` where λ is the best on the queries to choose by, `auto` the LDS with that."""
    table = read_table("whole_model").query("layer != '' and basis == 'gradient'")
    auto = table.query("regularization == '0.1 × mean'").set_index(["where", "layer"])["report"]
    table = table[~table["regularization"].str.contains("×")].join(auto.rename("auto"), on=["where", "layer"])
    best = table.groupby(["where", "layer"])["choice"].transform("max") == table["choice"]
    columns = ["where", "layer", "regularization", "choice", "report", "low", "high", "auto"]
    return table[columns].assign(best=best)


def write_all() -> None:
    """The committed tables."""
    one_row_for_each(judgement("main")).to_csv(FOLDER / "shown.csv", index=False)
    scores_along_the_path("main", "EK-FAC", "0.01").to_csv(FOLDER / "along_the_path.csv")
    rises().round(5).to_csv(FOLDER / "rises.csv", index=False)
    across_experiments().round(5).to_csv(FOLDER / "across.csv")
    for half in HALVES:
        shares_of_ceiling(half).round(5).to_csv(FOLDER / f"shares_{half}.csv")
    whole_models().to_csv(FOLDER / "whole_shown.csv", index=False)
    whole_by_layer().to_csv(FOLDER / "whole_layers.csv", index=False)
