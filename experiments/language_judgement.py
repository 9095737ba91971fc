"""`python -m experiments.language_judgement`: scorers before the bank of a model that writes, `language.csv`,
and trainings without what they call most helpful, `language_removal.csv`.

Half of the queries are to choose by, the other half is reported. Scorers that look at texts alone; the loss
of a training text; products of gradients; EK-FAC for a grid of λ before training, a fifth of the way, at its
end, and the last two added up; at the end K-FAC, EK-FAC with weighted covariances, the exact solve and
queries at low rank as well. Of the bank's model products are taken in bfloat16, as in its training.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from experiments.bank_making import digest, finished
from experiments.judgement import agreement_row
from experiments.language_bank import BANK, WriterRetraining, retraining, reviews_and_queries
from experiments.language_scorers import LOW_RANK, SOLVERS, WEIGHTED, Place, kept, settings, similarities
from experiments.removal import cached_curve
from support.judge import Bank, halves, reliability
from support.language import load_language_model
from support.retraining import Checkpoint, Reviews, losses

FOLDER = Path(__file__).parent
TABLE, REMOVAL = FOLDER / "language.csv", FOLDER / "language_removal.csv"
PLACES = (0.0, 0.2, 1.0)
ASKED = dict.fromkeys((*SOLVERS, LOW_RANK), (1.0,)) | {"EK-FAC": PLACES}
"""Where on the way of a training on all reviews each solver is asked."""
COUNTS, REMOVED_FOR = (8, 24), 8
"""How many texts are left out, for so many of the reported queries."""


def kept_influences(run: WriterRetraining, queries: Reviews) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """Solver, where on the way, and what is `kept` of it there; last come EK-FAC's sums over the places on
    the way and at the end."""
    told = [digest(run.reviews), digest(queries), run.recipe]
    path = cache(lambda: run.path(torch.arange(len(run.reviews)), seed=0, shares=PLACES))
    found = []
    for number, share in enumerate(tqdm(PLACES, "places", unit="place")):
        place = cache(partial(_place, path, number, run.reviews, queries))
        for solver in (solver for solver, places in ASKED.items() if share in places):
            scores = kept([*told, share], place, solver)
            yield solver, f"{share:.0%}", scores
            if solver == "EK-FAC" and share:
                found.append(scores)
    yield "EK-FAC", "both", {name: sum(one[name] for one in found) for name in found[0]}


def _place(path: Callable[[], list[Checkpoint]], number: int, train: Reviews, queries: Reviews) -> Place:
    return Place(path()[number].model(), train, queries, precision="bfloat16")


def ceiling(bank: Bank, twice: Bank) -> float:
    """The noise ceiling of a bank, as `noise_ceiling`, with the reliability of one seed from `twice`: its
    subsets that were trained on with two."""
    one, seeds = max(reliability(twice).mean, 0.0), bank.margins.shape[1]
    return float(np.sqrt(seeds * one / (1 + (seeds - 1) * one)))


def table(bank: Bank, twice: Bank, run: WriterRetraining, queries: Reviews) -> pd.DataFrame:
    """One row for each scorer, place, λ and normalisation, and one for what noise leaves to be reached."""
    train = run.reviews
    rows = [agreement_row(bank, scores, scorer=name) for name, scores in similarities(train, queries)]
    for solver, where, found in kept_influences(run, queries):
        for name, scores in found.items():
            rows.append(agreement_row(bank, scores, **settings(solver, name), where=where))
    run.run_on_all(seed=0)
    loss = losses(run.margins(train)).expand(len(queries), -1)
    rows.append(agreement_row(bank, loss, scorer="training_loss", where="100%"))
    limit = ceiling(bank, twice)
    rows.append({"scorer": "ceiling"} | dict.fromkeys(("choice", "report", "low", "high"), limit))
    return pd.DataFrame(rows)


def scorers_to_remove_by(run: WriterRetraining, queries: Reviews) -> dict[str, Tensor]:
    """The scorers that are tried: the recommended one, what it is compared with, and chance."""
    found = {(solver, where): scores for solver, where, scores in kept_influences(run, queries)}
    generator = torch.Generator().manual_seed(0)
    return {
        f"{WEIGHTED}, λ = 0.1": found[WEIGHTED, "100%"]["0.1/plain"],
        "BM25": dict(similarities(run.reviews, queries))["bm25"],
        "random": torch.rand(len(queries), len(run.reviews), generator=generator),
    }


def removal(run: WriterRetraining, queries: Reviews) -> pd.DataFrame:
    """Columns scorer, query, removed, loss: after a training without the texts that the scorer calls most
    helpful. A count of 0 is the loss with all texts."""
    first, parts = halves(len(queries))[1].start, []
    asked = range(first, first + REMOVED_FOR)
    for name, scores in tqdm(scorers_to_remove_by(run, queries).items(), "removal", unit="scorer"):
        curve = cached_curve(run, queries, scores, asked, COUNTS, seeds=1)
        parts.append(curve.assign(scorer=name)[["scorer", "query", "removed", "loss"]])
    return pd.concat(parts, ignore_index=True)


def main() -> None:
    model, tokenizer = load_language_model()
    train, queries = reviews_and_queries(model, tokenizer)
    bank, twice, run = finished(BANK), finished(BANK, seeds=2), retraining(model, train)
    table(bank, twice, run, queries).round(5).to_csv(TABLE, index=False)
    removal(run, queries).round(5).to_csv(REMOVAL, index=False)


if __name__ == "__main__":
    main()
