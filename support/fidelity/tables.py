"""The committed tables, read, and the rows of them that the chapter shows."""

from pathlib import Path

import pandas as pd

from support.fidelity.agreement import noise_ceiling
from support.fidelity.bank import load_bank
from support.fidelity.experiments import COMMITTED, EXPERIMENTS, QUERIES, bank_path, halves
from support.fidelity.judgement import JUDGEMENT, Recommendation
from support.fidelity.removal import REMOVAL

KRONFLUENCE = Path(__file__).parent / "kronfluence.csv"
COSTS = Path(__file__).parent / "costs.csv"
END, STAND_IN = "100%", "exact, per layer"
ON_THE_WAY = ("0%", "5%", "10%", "35%", "50%", "75%")
CHOICE, REPORT = halves(QUERIES)


def read_table(path: Path) -> pd.DataFrame:
    """A committed table; settings that a scorer doesn't have are empty."""
    return pd.read_csv(path, keep_default_na=False)


def judgement(experiment: str) -> pd.DataFrame:
    """What the scorers reached on one experiment's bank, Kronfluence included."""
    rows = pd.concat([read_table(JUDGEMENT), read_table(KRONFLUENCE)], ignore_index=True)
    return rows[rows["experiment"] == experiment].reset_index(drop=True)


def ceiling(experiment: str, queries: slice = REPORT) -> float:
    """The noise ceiling of a committed bank, on some of its queries."""
    return noise_ceiling(load_bank(bank_path(experiment)).of_queries(queries))


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
        customary = group["regularization"].isin(["1e-05", "auto", "heuristic", "1e-08 (default)"])
        at_the_end = (group["normalisation"] == "plain") & (group["where"] == END)
        rows += [row for _, row in group[customary & at_the_end].iterrows()]
    found = pd.DataFrame(rows)
    return found.assign(name=found.apply(_name, axis=1)).drop_duplicates("name", ignore_index=True)


def _name(row: pd.Series) -> str:
    if not row["normalisation"]:
        return row["scorer"]
    place = "at the end" if row["where"] == END else f"at {row['where']}"
    parts = [f"{row['scorer']} {place}", f"λ = {row['regularization']}"]
    return ", ".join(parts if row["normalisation"] == "plain" else [*parts, row["normalisation"]])


def along_the_path(experiment: str, scorer: str, regularization: str) -> pd.DataFrame:
    """LDS by checkpoint (a share of training) and normalisation."""
    rows = read_table(JUDGEMENT).query(
        "experiment == @experiment and scorer == @scorer and regularization == @regularization"
    )
    rows = rows[rows["where"].str.endswith("%")]
    shares = rows["where"].str.rstrip("%").astype(int) / 100
    return rows.assign(share=shares).pivot_table(
        index="share", columns="normalisation", values="report", sort=False
    )


def across_experiments() -> pd.DataFrame:
    """What holds beyond `main`: LDS of a few scorers on every bank, and each bank's noise ceiling.

    The per-layer exact solve stands in for EK-FAC, which approximates it, at λ = 1e-2.
    """
    table = read_table(JUDGEMENT)
    shown = {
        "at the end, λ = 1e-5": Recommendation(STAND_IN, END, "1e-05", "plain"),
        "at the end": Recommendation(STAND_IN, END, "0.01", "plain"),
        "at the end, unit residual": Recommendation(STAND_IN, END, "0.01", "unit residual"),
        "at 20 %": Recommendation(STAND_IN, "20%", "0.01", "plain"),
        "at 20 %, unit residual": Recommendation(STAND_IN, "20%", "0.01", "unit residual"),
    }
    columns = {
        name: rows_of(table, chosen).set_index("experiment")["report"]
        for name, chosen in shown.items()
    }
    signed = table[table["scorer"] == "representation cosine, label sign"]
    columns["representation × label"] = signed.set_index("experiment")["report"]
    frame = pd.DataFrame(columns).loc[COMMITTED]
    frame["noise ceiling"] = [ceiling(name) for name in COMMITTED]
    frame.index = [f"{name}: {EXPERIMENTS[name].about}" for name in COMMITTED]
    return frame


def shares_of_ceiling(half: str = "choice") -> pd.DataFrame:
    """For every place, λ and normalisation of the stand-in: LDS as a share of the noise ceiling, on
    each bank, and their mean; best mean first.

    `half` of the queries that the scores are taken on: "choice" or "report".
    """
    table = read_table(JUDGEMENT).query("scorer == @STAND_IN")
    queries = {"choice": CHOICE, "report": REPORT}[half]
    ceilings = pd.Series({name: ceiling(name, queries) for name in COMMITTED})
    frame = table.assign(share=table[half] / table["experiment"].map(ceilings)).pivot_table(
        index=["where", "regularization", "normalisation"], columns="experiment", values="share"
    )
    return frame.assign(mean=frame.mean(axis=1)).sort_values("mean", ascending=False)


def rises() -> pd.DataFrame:
    """Columns scorer, removed, rise: how far the loss rose above that with all reviews, mean over the
    queries whose most helpful reviews were removed."""
    table = read_table(REMOVAL)
    whole = table[table["removed"] == 0].set_index(["scorer", "query"])["loss"]
    before = table.set_index(["scorer", "query"]).index.map(whole)
    rise = table.assign(rise=table["loss"] - before)
    return rise.groupby(["scorer", "removed"], sort=False)["rise"].mean().reset_index()
