"""`python -m experiments.sketches`: ways to keep a training example in few bytes, compared, `sketches.csv`.

EK-FAC at 20 % of the steps with λ = 0.01, on three banks of the tail. In the whitened eigenbasis an influence
is an inner product of two vectors of 1.3 million entries; every way below keeps less of them and estimates
the product: the entries with the largest expected share, at two bytes or one; projections of the whitened
vector, by random signs or Kronecker-shaped in each layer; and half of the numbers for entries with the other
half for the projection of the rest, which is unbiased. Low rank is left out: on the tail each gradient has
rank one in every layer, which keeps it exactly in 4,998 numbers, more than any of these. Some four minutes on
one thread.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm

from experiments.bank_making import EXPERIMENTS, bank_path, queries, retraining
from experiments.index import SHARE, WIDTHS, Batches
from experiments.judgement import agreement_row
from support.ekfac import EkfacInfluence
from support.ekfac.blocks import loader_blocks
from support.ekfac.curvature import damped_inverse, rotated_in_parts
from support.ekfac.index import EkfacIndex, in_bytes
from support.judge import load_bank
from support.retraining import batches

TABLE = Path(__file__).parent / "sketches.csv"
BANKS = ("main", "again", "converged")
SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SAMPLE = 100
"""Training examples on which the error of an answer is measured, drawn at random."""


class Projections:
    """Of the whitened gradients of an engine: `signs`, each entry with a random sign added to one of the
    largest of `SIZES` sums; and `sides`, Gaussian projections to the largest of `WIDTHS` on both sides of
    every layer. Their first sums and sides are smaller projections."""

    def __init__(self, engine: EkfacInfluence, seed: int = 0):
        self.engine, generator = engine, torch.Generator().manual_seed(seed)
        self.place, self.sign, self.sides, self.root = {}, {}, {}, {}
        for name, layer in engine.layers.items():
            inverse = damped_inverse(engine.curvature_of(name).eigenvalues, engine.hessian_regularization)
            self.root[name] = inverse.sqrt()
            self.place[name] = torch.randint(SIZES[-1], (inverse.numel(),), generator=generator)
            signs = torch.randint(2, (inverse.numel(),), generator=generator)
            self.sign[name] = (2 * signs - 1).to(layer.dtype)
            self.sides[name] = tuple(
                torch.randn(d, WIDTHS[-1], generator=generator).to(layer.dtype) for d in inverse.shape
            )

    def of(self, loader: Batches, examples: int) -> tuple[Tensor, dict[str, Tensor]]:
        """`(examples, sums)`, and of each layer `(examples, width, width)`."""
        dtype = next(iter(self.sign.values())).dtype
        sums = torch.zeros(examples, SIZES[-1], dtype=dtype)
        narrow = {name: torch.zeros(examples, WIDTHS[-1], WIDTHS[-1], dtype=dtype) for name in self.root}
        for one in self.engine._losses(loader_blocks(loader, *self.engine.passes.together)):
            rows = torch.tensor(one.rows)
            for name, gradients in one.gradients():
                left, right = self.sides[name]
                for part, rotated in rotated_in_parts(gradients, self.engine.curvature_of(name).basis):
                    rotated *= self.root[name]
                    narrow[name][rows[part]] = left.T @ (rotated @ right)
                    signed = rotated.flatten(1).mul_(self.sign[name])
                    for row, entries in zip(rows[part].tolist(), signed, strict=True):
                        sums[row].index_add_(0, self.place[name], entries)
        return sums, narrow


def folded(sums: Tensor, size: int) -> Tensor:
    """So many sums, of those: each of the new ones is one of several."""
    return sums.view(len(sums), -1, size).sum(dim=1)


def projected(
    projections: Projections, train: Batches, asked: Batches, counts: tuple[int, int]
) -> tuple[tuple[Tensor, Tensor], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The sums of questions and training examples, and the narrow products of both."""
    (train_sums, train_narrow), (asked_sums, asked_narrow) = (
        projections.of(side, count) for side, count in zip((train, asked), counts, strict=True)
    )
    return (asked_sums, train_sums), (asked_narrow, train_narrow)


def sorted_entries(index: EkfacIndex) -> tuple[Tensor, list[tuple[str, int]]]:
    """The order of an index's entries by expected share, largest first, and each one's layer and place."""
    places = [(name, place) for name, part in index.entries.items() for place in part.places.tolist()]
    shares = torch.cat([index._expected(name).flatten()[part.places] for name, part in index.entries.items()])
    order = shares.argsort(descending=True, stable=True)
    return order, [places[number] for number in order.tolist()]


def estimates(
    engine: EkfacInfluence, train: Batches, asked: Batches
) -> Iterator[tuple[str, int, int, Tensor]]:
    """Of every way and size: its name, numbers, bytes an example, and scores `(queries, train)`."""
    index = EkfacIndex(engine, SIZES[-1])
    order, places = sorted_entries(index)
    own, theirs = (index.sketched(side)[:, order] for side in (asked, train))
    for size in SIZES:
        yield "entries, float16", size, 2 * size, own[:, :size] @ theirs[:, :size].half().to(own.dtype).T
        numbers, scales = in_bytes(theirs[:, :size])
        yield "entries, int8", size, size + 4, own[:, :size] @ (numbers * scales[:, None]).to(own.dtype).T
    projections = Projections(engine)
    sums, narrow = projected(projections, train, asked, (len(theirs), len(own)))
    for size in SIZES:
        asked_sums, train_sums = (folded(side, size) for side in sums)
        yield "random signs", size, 2 * size, asked_sums @ train_sums.T
    buckets = torch.tensor([projections.place[name][place] for name, place in places])
    signs = torch.stack([projections.sign[name][place] for name, place in places])
    for half in SIZES[:-1]:
        rest = [
            folded(whole.index_add(1, buckets[:half], -entries[:, :half] * signs[:half]), half)
            for whole, entries in zip(sums, (own, theirs), strict=True)
        ]
        scores = own[:, :half] @ theirs[:, :half].T + rest[0] @ rest[1].T
        yield "entries and signs of the rest", 2 * half, 4 * half, scores
    for width in WIDTHS:
        scores = sum(
            narrow[0][name][:, :width, :width].flatten(1) @ narrow[1][name][:, :width, :width].flatten(1).T
            for name in engine.layers
        )
        numbers = width**2 * len(engine.layers)
        yield "Kronecker-shaped", numbers, 2 * numbers, scores / width**2


def measured_error(scores: Tensor, whole: Tensor) -> float:
    """The error that a sample of training examples tells of a question, over the one of all of them, median
    of the questions."""
    sample = torch.randperm(whole.shape[1], generator=torch.Generator().manual_seed(0))[:SAMPLE]
    squares = (scores - whole).square()
    return (squares[:, sample].mean(dim=1) / squares.mean(dim=1)).sqrt().median().item()


def table() -> pd.DataFrame:
    """Every way on every bank: agreement, Spearman's ρ with the whole scores (mean of the questions), the
    mean error over the whole scores' root mean square, and how well a sample foretells that error."""
    found = []
    for name in tqdm(BANKS, "banks", unit="bank"):
        run, bank = retraining(EXPERIMENTS[name]), load_bank(bank_path(name))
        (checkpoint,) = run.path(torch.arange(len(run.reviews)), seed=0, shares=[SHARE])
        train, asked = batches(run.reviews), batches(queries(EXPERIMENTS[name]))
        engine = EkfacInfluence(checkpoint.model()).fit(train)
        whole = engine.score(asked, train)
        told = {"experiment": name, "sketch": "none", "numbers": 0, "bytes": 0, "rank": 1.0, "error": 0.0}
        found.append(agreement_row(bank, whole, **told | {"sampled": float("nan")}))
        for sketch, numbers, size, scores in estimates(engine, train, asked):
            ranks = [spearmanr(*pair).statistic for pair in zip(scores.numpy(), whole.numpy(), strict=True)]
            told = {"experiment": name, "sketch": sketch, "numbers": numbers, "bytes": size}
            told["rank"] = sum(ranks) / len(ranks)
            told["error"] = ((scores - whole).norm() / whole.norm()).item()
            told["sampled"] = measured_error(scores, whole)
            found.append(agreement_row(bank, scores, **told))
    return pd.DataFrame(found)


if __name__ == "__main__":
    table().round(5).to_csv(TABLE, index=False)
