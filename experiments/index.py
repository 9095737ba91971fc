"""`python -m experiments.index`: how much of the agreement with retraining an index keeps, `index.csv`.

EK-FAC at 20 % of the steps with the recommended λ, on the nine banks of the tail and on that of whole models,
from so many numbers of two bytes of each training review: the entries that `EkfacIndex` keeps, and on the
tails the same with K-FAC's eigenvalues, and random projections of gradients, on both sides of every layer,
whose products with projected factors estimate the influences without bias. Some ten minutes on one thread for
the tails, and as many for the whole models.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from experiments.bank_making import (
    EXPERIMENTS,
    QUERIES,
    TRAIN_REVIEWS,
    bank_path,
    finished,
    queries,
    retraining,
)
from experiments.judgement import agreement_row
from experiments.whole_judgement import engine_at
from experiments.whole_model import BANK, reviews
from support.ekfac import EkfacInfluence
from support.ekfac.blocks import loader_blocks
from support.ekfac.index import EkfacIndex
from support.judge import Bank, load_bank
from support.retraining import batches

TABLE = Path(__file__).parent / "index.csv"
SHARE, BYTES = 0.2, 2
NUMBERS = (32, 128, 256, 512, 1024, 2048, 4096)
WIDTHS = (4, 8, 16, 32)
"""Of a projection: so many numbers squared for every layer."""

Batches = list[tuple[Tensor, Tensor]]


def projected(
    engine: EkfacInfluence, train: Batches, asked: Batches, width: int, seed: int = 0
) -> tuple[Tensor, int]:
    """Influences `(queries, train)` from random projections to `width` on both sides of each layer, and how
    many numbers a training example has."""
    generator = torch.Generator().manual_seed(seed)
    sides = {
        name: tuple(
            torch.randn(d, width, generator=generator).to(layer.dtype) / width**0.5
            for d in (layer.d_out, layer.d_in)
        )
        for name, layer in engine.layers.items()
    }
    factors = [engine.influence_factors(*batch) for batch in asked]
    scores = 0
    for name, (left, right) in sides.items():
        of_queries = torch.cat([(left.T @ one[name] @ right).flatten(1) for one in factors])
        scores = scores + of_queries @ _gradients(engine, train, name, left, right).T
    return scores, width**2 * len(sides)


def _gradients(engine: EkfacInfluence, train: Batches, name: str, left: Tensor, right: Tensor) -> Tensor:
    found, rows = [], []
    for one in engine._losses(loader_blocks(train, *engine.passes.together)):
        gradients = dict(one.gradients())[name]
        seen = replace(
            gradients,
            activations=gradients.activations @ right,
            output_gradients=gradients.output_gradients @ left,
        )
        found.append(seen.per_example().flatten(1))
        rows += one.rows
    return torch.cat(found)[torch.tensor(rows).argsort()]


def rows(
    name: str, engine: EkfacInfluence, bank: Bank, train: Batches, asked: Batches, compared: bool
) -> Iterator[dict]:
    """One row for all of the scores, and one for each size of an index; if they are to be `compared`, also
    for projections and K-FAC."""
    told = {"experiment": name, "sketch": "none", "numbers": 0, "bytes": 0, "share": 1.0}
    yield agreement_row(bank, engine.fit(train).score(asked, train), **told)
    for width in WIDTHS if compared else ():
        scores, numbers = projected(engine, train, asked, width)
        sizes = {"numbers": numbers, "bytes": BYTES * numbers, "share": float("nan")}
        yield agreement_row(bank, scores, **told | {"sketch": "random projection"} | sizes)
    for sketch in ("EK-FAC entries", "K-FAC entries") if compared else ("EK-FAC entries",):
        if sketch == "K-FAC entries":
            engine.update_diagonal = False
            engine.fit(train)
        for numbers in NUMBERS:
            index = EkfacIndex(engine, numbers)
            sizes = {"numbers": numbers, "bytes": BYTES * numbers, "share": index.share}
            scores = index.sketched(asked).float() @ index.sketched(train).half().float().T
            yield agreement_row(bank, scores, **told | {"sketch": sketch} | sizes)


def table() -> pd.DataFrame:
    """All banks."""
    found = []
    for name, experiment in tqdm(EXPERIMENTS.items(), "banks", unit="bank"):
        run = retraining(experiment)
        (checkpoint,) = run.path(torch.arange(len(run.reviews)), seed=0, shares=[SHARE])
        engine, bank = EkfacInfluence(checkpoint.model()), load_bank(bank_path(name))
        sides = batches(run.reviews), batches(queries(experiment))
        found += rows(name, engine, bank, *sides, compared=True)
    train, asked = (
        [(ids, labels) for ids, labels, _ in reviews(split, count).loader(50)]
        for split, count in (("train", TRAIN_REVIEWS), ("test", QUERIES))
    )
    found += rows("whole models", engine_at(SHARE, "chapters"), finished(BANK), train, asked, compared=False)
    return pd.DataFrame(found)


if __name__ == "__main__":
    table().round(5).to_csv(TABLE, index=False)
