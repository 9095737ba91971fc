"""Are the influences true? Retraining on many random subsets, and how well scores agree with it. Positive
scores say that more weight on this training example would lower the loss of this query.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from support.assets import AssetDamaged
from support.retraining import Retraining, Reviews, losses, margins

Membership = Bool[Tensor, "subsets train"]
Outcomes = Float[Tensor, "subsets queries"]
Scores = Float[Tensor, "queries train"]
PerQuery = Float[np.ndarray, " queries"]


@dataclass(frozen=True)
class Design:
    """`subsets` random subsets, drawn from `draw`, each trained on with `seeds` seeds. They hold `share`
    of the reviews, `balanced` ones that share of either label."""

    subsets: int = 100
    seeds: int = 4
    share: float = 0.5
    balanced: bool = False
    draw: int = 0

    def membership(self, labels: Int[Tensor, " train"]) -> Membership:
        """Which reviews are in each subset."""
        generator = torch.Generator().manual_seed(self.draw)
        groups = [labels == 0, labels == 1] if self.balanced else [torch.ones_like(labels).bool()]
        member = torch.zeros(self.subsets, len(labels), dtype=torch.bool)
        for subset in member:
            for group in groups:
                rows = group.nonzero()[:, 0]
                chosen = torch.randperm(len(rows), generator=generator)
                subset[rows[chosen[: round(self.share * len(rows))]]] = True
        return member


@dataclass(frozen=True)
class Bank:
    """`membership` (subsets, train), and `margins` (subsets, seeds, queries) after each retraining."""

    membership: Membership
    margins: Float[Tensor, "subsets seeds queries"]

    @property
    def outcomes(self) -> Outcomes:
        """Cross-entropy of each query, mean over seeds."""
        return losses(self.margins).mean(dim=1)

    def of_queries(self, queries: slice) -> "Bank":
        """The same retrainings, some of the queries."""
        return Bank(self.membership, self.margins[:, :, queries])


def halves(queries: int) -> tuple[slice, slice]:
    """Queries on which λ, normalisation and checkpoints are chosen, and those that are reported."""
    return slice(0, queries // 2), slice(queries // 2, queries)


def retrained_margins(
    retraining: Retraining, queries: Reviews, design: Design, first: int = 0
) -> Iterator[Float[Tensor, "seeds queries"]]:
    """Margins of the queries after training on each subset of the design, from subset `first` on."""
    seeds = range(1, design.seeds + 1)  # 0 is the seed of the run that the scores come from
    for member in design.membership(retraining.reviews.labels)[first:]:
        rows = member.nonzero()[:, 0]
        yield torch.stack([margins(retraining.run(rows, seed), queries) for seed in seeds])


def make_bank(retraining: Retraining, queries: Reviews, design: Design, progress: bool = False) -> Bank:
    """The bank of this design, trained one subset and seed after the other."""
    made = retrained_margins(retraining, queries, design)
    bar = tqdm(made, "retraining", design.subsets, unit="subset", disable=not progress)
    return Bank(design.membership(retraining.reviews.labels), torch.stack(list(bar)))


def load_bank(path: Path) -> Bank:
    """A bank from its file. Raises `FileNotFoundError`, and `AssetDamaged` when it cannot be read."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        cure = "Take it from the repository, or delete it and make it again: python -m experiments banks"
        raise AssetDamaged(f"{path} cannot be read ({error}). {cure}") from error
    return Bank(tensors["membership"], tensors["margins"].float())


@dataclass(frozen=True)
class Agreement:
    """One number per query, and their mean with a bootstrap interval over queries."""

    per_query: PerQuery

    @property
    def mean(self) -> float:
        return float(self.per_query.mean())

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """The 95 % percentile interval of the mean over resampled queries."""
        if np.ptp(self.per_query) == 0:
            return self.mean, self.mean
        found = stats.bootstrap((self.per_query,), np.mean, method="percentile", rng=seed)
        return tuple(map(float, found.confidence_interval))


def subset_scores(scores: Scores, membership: Membership) -> Outcomes:
    """Σ over each subset's reviews of their influence on each query."""
    return membership.to(scores) @ scores.T


def linear_datamodeling_score(scores: Scores, bank: Bank) -> Agreement:
    """For each query, Spearman's correlation over the subsets between the summed influence of a
    subset and how low the loss came out after training on it (Ilyas et al. 2022; Park et al. 2023)."""
    return Agreement(rank_correlations(subset_scores(scores.double(), bank.membership), -bank.outcomes))


def rank_correlations(predicted: Outcomes, observed: Outcomes) -> PerQuery:
    """Spearman's correlation of each column; 0 where a column is constant."""
    # Sums of equal numbers in another order differ by rounding, which is no order of subsets.
    rounded = np.stack([side.double().numpy().round(10) for side in (predicted, observed)])
    ranks = stats.rankdata(rounded, axis=1)
    left, right = ranks - ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=0)
    products = (left * right).sum(axis=0)
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)


def reliability(bank: Bank) -> Agreement:
    """Rank correlation over subsets between two halves of a bank's seeds, mean over the ways of halving
    them. Raises `ValueError` for a bank of one seed."""
    seeds, found = set(range(bank.margins.shape[1])), []
    if len(seeds) == 1:
        told = "This bank has one seed for each subset, and noise shows only between two."
        raise ValueError(f"{told} Make it with more: Design(seeds=2).")
    for left in itertools.combinations(seeds, len(seeds) // 2):
        right = sorted(seeds - set(left))[: len(left)]
        one, other = (-losses(bank.margins[:, list(side)]).mean(dim=1) for side in (left, right))
        found.append(rank_correlations(one, other))
    return Agreement(np.mean(found, axis=0))


def noise_ceiling(bank: Bank) -> float:
    """The score that one who knows the expected outcomes would get, about: √ of the outcomes' reliability,
    which is k r / (1 + (k − 1) r) of k times as many seeds as have r (Spearman–Brown). 0 where all is
    noise. Raises as `reliability`."""
    half, seeds = max(reliability(bank).mean, 0.0), bank.margins.shape[1]
    times = seeds / (seeds // 2)
    return float(np.sqrt(times * half / (1 + (times - 1) * half)))
