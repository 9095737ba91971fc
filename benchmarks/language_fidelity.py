"""`python -m benchmarks.language_fidelity`: Kronfluence and Bergson before the bank of a model that writes.

Each is fitted on the bank's training reviews at one place of a training on all of them, and scores with its
default damping, with a tenth of the mean of the eigenvalues, and with the λ that is best for ours. Writes
`experiments/language_peers.csv`, a peer and a place at a time. Kronfluence draws its labels as ours
does, with one sample; Bergson, installed without the dependencies that bring another torch, draws its own.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from benchmarks.language_engines import Work, bergson_parts, kronfluence_parts
from experiments.bank_making import finished
from experiments.judgement import agreement_row
from experiments.language_bank import BANK, BLOCKS, TOKENS, chosen_rows, retraining, reviews_and_queries
from support.imdb import load_imdb
from support.language import encoded, load_language_model

TABLE = Path(__file__).parents[1] / "experiments" / "language_peers.csv"
KRONFLUENCE = {"1e-08 (default)": 1e-8, "heuristic": None, "0.1": 0.1}
BERGSON = {"0.1 × mean (default)": ("damped_inverse", 0.1), "0.1": ("absolute_damped_inverse", 0.1)}


class BankWork(Work):
    """The model of the bank at a share of a training on all its reviews."""

    def __init__(self, share: float):
        self.model, self.tokenizer = load_language_model()
        train = reviews_and_queries(self.model, self.tokenizer)[0]
        run = retraining(self.model, train)
        if share:
            (place,) = run.path(torch.arange(len(train)), seed=0, shares=[share])
            run.part.load_state_dict(place.part.state_dict())
        last = self.model.config.num_hidden_layers
        parts = ("gate_proj", "up_proj", "down_proj")
        blocks = range(last - BLOCKS, last)
        self.tracked = [f"model.layers.{block}.mlp.{part}" for block in blocks for part in parts]
        imdb = load_imdb()["train"]
        self.train, self.queries = (
            [encoded(self.tokenizer, text, max_tokens=TOKENS) for text in imdb[rows]["text"]]
            for rows in chosen_rows(imdb, self.tokenizer)
        )


def scores(peer: str, work: BankWork) -> Iterator[tuple[str, Tensor]]:
    """Its scores for one damping after the other."""
    fit, score = (kronfluence_parts if peer == "Kronfluence" else bergson_parts)(work)
    fit()
    if peer == "Kronfluence":
        yield from ((name, score(None, value).float()) for name, value in KRONFLUENCE.items())
    else:
        yield from ((name, score(*value)) for name, value in BERGSON.items())


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.language_fidelity", description=__doc__)
    parser.add_argument("--peer", choices=("Kronfluence", "Bergson"), required=True)
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the training, where scores are taken (1)"
    )
    chosen = parser.parse_args()
    where = {"scorer": chosen.peer, "where": f"{chosen.share:.0%}"}
    known = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame()
    rows = [
        agreement_row(finished(BANK), found, **where, regularization=name, normalisation="plain")
        for name, found in scores(chosen.peer, BankWork(chosen.share))
    ]
    table = pd.concat([known, pd.DataFrame(rows).round(5)], ignore_index=True)
    table.drop_duplicates(["scorer", "where", "regularization"], keep="last").to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
