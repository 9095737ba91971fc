"""The other tests: train again without the reviews that a scorer calls most helpful, or without a single one.

If the scorer is right, the query's loss rises, and more than after removing as many at random. Of a single
review it says how much every query's loss changes: its influence over the number of reviews.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from experiments.bank_making import QUERIES, digest
from experiments.judgement import Asked, Judge
from experiments.scorers import SIMILARITIES, Question, Scores, gradient_products
from support.cache import cache_folder
from support.chapters.fidelity import RECOMMENDED
from support.ekfac.storage import replacing
from support.judge import halves
from support.retraining import Retraining, Reviews, losses

REMOVAL = Path(__file__).parent / "removal.csv"
SINGLE = Path(__file__).parent / "single_removal.csv"
COUNTS = (10, 30, 100)
SEEDS = 3
SINGLE_REVIEWS, SINGLE_SEEDS = 40, 16
PREDICTED = {
    "recommended": (RECOMMENDED.where, RECOMMENDED.regularization),
    "EK-FAC, end, λ = 1e-2": ("100%", "0.01"),
    "EK-FAC, end, λ = 1e-5": ("100%", "1e-05"),
}
REMOVED_FOR = range(halves(QUERIES)[1].start, halves(QUERIES)[1].start + 20)
"""Queries whose most helpful reviews are removed: the first of those that are reported on."""


def most_helpful(scores: Float[Tensor, " train"], count: int) -> Tensor:
    """Rows of the `count` reviews with the largest scores."""
    return scores.argsort(descending=True, stable=True)[:count]


def losses_without(
    retraining: Retraining, queries: Reviews, removed: Tensor, seeds: Sequence[int]
) -> Float[Tensor, " queries"]:
    """Cross-entropy of every query after training without the removed rows, mean over seeds."""
    left = torch.ones(len(retraining.reviews), dtype=torch.bool)
    left[removed] = False
    rows = left.nonzero()[:, 0]
    return torch.stack([losses(_after(retraining, rows, seed, queries)) for seed in seeds]).mean(dim=0)


def _after(
    retraining: Retraining, rows: Tensor, seed: int, queries: Reviews, without: int = -1
) -> Float[Tensor, " queries"]:
    """Margins of the queries."""
    retraining.run(rows, seed, without)
    return retraining.margins(queries)


def removal_curve(
    retraining: Retraining,
    queries: Reviews,
    scores: Scores,
    asked: Sequence[int],
    counts: Sequence[int],
    seeds: Sequence[int],
) -> pd.DataFrame:
    """For each asked query and count: its loss without the reviews that help it most, by these scores.

    Columns query, removed, loss. A count of 0 is the loss with all reviews, trained once for all.
    """
    nothing = torch.tensor([], dtype=torch.long)
    whole = losses_without(retraining, queries, nothing, seeds)
    rows = [{"query": query, "removed": 0, "loss": whole[query].item()} for query in asked]
    for query in asked:
        for count in counts:
            removed = most_helpful(scores[query], count)
            after = losses_without(retraining, queries, removed, seeds)
            rows.append({"query": query, "removed": count, "loss": after[query].item()})
    return pd.DataFrame(rows)


def single_removals(
    retraining: Retraining,
    queries: Reviews,
    removed: Sequence[int],
    seeds: Sequence[int],
    progress: bool = False,
) -> Float[Tensor, "removed seeds queries"]:
    """How far every query's loss rises when one review is left out; seed by seed, with all others in the
    same batches."""
    everything = torch.arange(len(retraining.reviews))
    whole = [losses(_after(retraining, everything, seed, queries)) for seed in seeds]
    changes = torch.empty(len(removed), len(seeds), len(queries))
    for place, row in enumerate(tqdm(removed, "single removals", unit="review", disable=not progress)):
        for number, seed in enumerate(seeds):
            without = losses(_after(retraining, everything, seed, queries, row))
            changes[place, number] = without - whole[number]
    return changes


def removed_one_by_one(progress: bool = False) -> pd.DataFrame:
    """The committed table of single reviews, spread evenly over the ranks of their mean |influence|: for each
    of them and each reported query, mean change of the loss over seeds, its standard error, and what the
    recommended scorer and the customary one predict."""
    judge = Judge("main", progress)
    scores = {
        (row["where"], row["regularization"]): row["scores"]
        for row in judge.scores(Asked("EK-FAC", (1e-2, 1e-5), ("20%", "100%")))
        if row["normalisation"] == "plain"
    }
    sizes = scores[PREDICTED["recommended"]].abs().mean(dim=0)
    every = len(sizes) // SINGLE_REVIEWS
    removed = sizes.argsort(stable=True)[every - 1 :: every].tolist()
    changes = single_removals(judge.retraining, judge.queries, removed, range(1, SINGLE_SEEDS + 1), progress)
    mean, error = changes.mean(dim=1), changes.std(dim=1) / SINGLE_SEEDS**0.5
    columns = {"change": mean, "standard error": error}
    columns |= {name: scores[key][:, removed].T / len(sizes) for name, key in PREDICTED.items()}
    reported = halves(QUERIES)[1]
    table = pd.DataFrame({name: part[:, reported].flatten().numpy() for name, part in columns.items()})
    places = pd.MultiIndex.from_product([removed, range(QUERIES)[reported]], names=["review", "query"])
    return table.set_index(places).reset_index()


def scorers_to_remove_by(judge: Judge) -> dict[str, Scores]:
    """The scorers that are tried: the recommended one, what it is compared with, and chance."""
    question: Question = judge.question
    end = Asked("EK-FAC", (1e-5, 1e-2), ("100%",))
    found = {(row["regularization"], row["normalisation"]): row["scores"] for row in judge.scores(end)}
    recommended = Asked(RECOMMENDED.scorer, (float(RECOMMENDED.regularization),), (RECOMMENDED.where,))
    generator = torch.Generator().manual_seed(0)
    return {
        "recommended": next(
            row["scores"]
            for row in judge.scores(recommended)
            if row["normalisation"] == RECOMMENDED.normalisation
        ),
        "EK-FAC, end, λ = 1e-2": found["0.01", "plain"],
        "EK-FAC, end, λ = 1e-5": found["1e-05", "plain"],
        "gradient dot product": gradient_products(question.path[-1], question)["gradient dot product"],
        "representation cosine, label sign": SIMILARITIES["representation cosine, label sign"](question),
        "random": torch.rand(len(question.queries), len(question.train), generator=generator),
    }


def remove_all(progress: bool = False) -> pd.DataFrame:
    """The committed table: every scorer, on the reviews and the recipe of `main`."""
    judge = Judge("main", progress)
    parts = []
    for name, scores in tqdm(
        scorers_to_remove_by(judge).items(), "removal", unit="scorer", disable=not progress
    ):
        curve = cached_curve(judge.retraining, judge.queries, scores, REMOVED_FOR, COUNTS, SEEDS)
        curve.insert(0, "scorer", name)
        parts.append(curve)
    return pd.concat(parts, ignore_index=True)


def cached_curve(
    retraining: Retraining,
    queries: Reviews,
    scores: Scores,
    asked: Sequence[int],
    counts: Sequence[int],
    seeds: int,
) -> pd.DataFrame:
    """`removal_curve` with seeds 1 to `seeds`; from the cache, if the same reviews were removed before."""
    removed = [most_helpful(scores[query], max(counts)).tolist() for query in asked]
    run = [digest(retraining.reviews), digest(queries), retraining.recipe, counts, seeds]
    key = hashlib.sha256(repr([*run, removed]).encode()).hexdigest()[:32]
    path = cache_folder() / "fidelity" / f"removal-{key}.csv"
    if not path.exists():
        curve = removal_curve(retraining, queries, scores, asked, counts, range(1, seeds + 1))
        with replacing(path) as fresh:
            curve.to_csv(fresh, index=False)
    return pd.read_csv(path)
