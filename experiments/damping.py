"""`python -m experiments.damping`: does λ transfer as a number, or by the scale of a layer? `damping.csv`.

Before the nine banks of the tail, fed with its vectors: EK-FAC for λ as it is, as so many times the mean of a
layer's corrected eigenvalues, and as so many times their 0.99 quantile; on `main` in all bases that vectors
tell apart. About twenty minutes on one thread.
"""

from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from experiments.bank_making import EXPERIMENTS, bank_path, queries, retraining
from experiments.bases import BASES, Share, curvatures, scored
from experiments.judgement import agreement_row
from support.ekfac import EkfacInfluence
from support.judge import load_bank
from support.retraining import batches

TABLE = Path(__file__).parent / "damping.csv"
DAMPINGS = (
    *(1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    *(Share(factor, "mean") for factor in (0.1, 1.0, 10.0, 100.0, 1000.0)),
    *(Share(factor, "0.99 quantile") for factor in (0.01, 0.1, 1.0, 10.0, 100.0)),
)
PLACES = (0.2, 1.0)


def table() -> pd.DataFrame:
    """One row for each bank, place, basis, λ and normalisation."""
    rows = []
    for name in tqdm(EXPERIMENTS, "banks", unit="bank"):
        run, asked = retraining(EXPERIMENTS[name]), queries(EXPERIMENTS[name])
        bank, train = load_bank(bank_path(name)), list(batches(run.reviews))
        everything = torch.arange(len(run.reviews))
        for share, checkpoint in zip(PLACES, run.path(everything, seed=0, shares=PLACES), strict=True):
            engine = EkfacInfluence(checkpoint.model())
            kinds = BASES[1:] if name == "main" else ("gradient",)
            for kind, curvature in curvatures(engine, train, kinds).items():
                told = {"experiment": name, "where": f"{share:.0%}", "basis": kind}
                for value, scores in scored(engine, curvature, list(batches(asked)), train, DAMPINGS).items():
                    told["regularization"] = str(value)
                    plain, own = scores.influences.sum(dim=0), scores.self_influences.sum(dim=0)
                    rows.append(agreement_row(bank, plain, **told, normalisation="plain"))
                    rows.append(agreement_row(bank, plain / own.sqrt(), **told, normalisation="relative"))
    return pd.DataFrame(rows)


if __name__ == "__main__":
    table().round(5).to_csv(TABLE, index=False)
