"""What holds beyond one bank: tables of all of them, each with its noise ceiling."""

from pathlib import Path

import pandas as pd

from experiments.bank_making import EXPERIMENTS, QUERIES, bank_path
from support.chapters.fidelity import END, Recommendation, read_table, rows_of
from support.judge import halves, load_bank, noise_ceiling

ACROSS = Path(__file__).parent / "across.csv"
SHARES = {half: Path(__file__).parent / f"shares_{half}.csv" for half in ("choice", "report")}
HALVES = dict(zip(SHARES, halves(QUERIES), strict=True))
STAND_IN = "exact, per layer"


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
        name: rows_of(table, chosen).set_index("experiment")["report"]
        for name, chosen in shown.items()
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


def write_all() -> None:
    """The committed tables, from `judgement.csv` and the banks."""
    across_experiments().round(5).to_csv(ACROSS)
    for half, path in SHARES.items():
        shares_of_ceiling(half).round(5).to_csv(path)
