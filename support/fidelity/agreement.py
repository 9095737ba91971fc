"""How well scores agree with retraining: the linear datamodeling score, and the best it could be.

Scores are `(queries, train)`; positive says that more weight on this training example would lower the
loss of this query. Any scorer that gives such a matrix can be judged.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from support.fidelity.bank import Bank
from support.fidelity.retraining import losses

LEVEL = 0.95


@dataclass(frozen=True)
class Agreement:
    """One number per query, and their mean with a bootstrap interval over queries."""

    per_query: Float[np.ndarray, " queries"]

    @property
    def mean(self) -> float:
        return float(self.per_query.mean())

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """The 95 % percentile interval of the mean over resampled queries."""
        if np.ptp(self.per_query) == 0:
            return self.mean, self.mean
        found = stats.bootstrap(
            (self.per_query,), np.mean, confidence_level=LEVEL, method="percentile", rng=seed
        ).confidence_interval
        return float(found.low), float(found.high)


def subset_scores(
    scores: Float[Tensor, "queries train"], membership: Bool[Tensor, "subsets train"]
) -> Float[Tensor, "subsets queries"]:
    """Σ over each subset's reviews of their influence on each query."""
    return membership.to(scores) @ scores.T


def linear_datamodeling_score(scores: Float[Tensor, "queries train"], bank: Bank) -> Agreement:
    """For each query, Spearman's correlation over the subsets between the summed influence of a
    subset and how low the loss came out after training on it (Ilyas et al. 2022; Park et al. 2023).

    A scorer that gives every subset the same sum orders nothing: 0.
    """
    predicted = subset_scores(scores.double(), bank.membership)
    return Agreement(rank_correlations(predicted, -bank.outcomes))


def rank_correlations(
    predicted: Float[Tensor, "subsets queries"], observed: Float[Tensor, "subsets queries"]
) -> Float[np.ndarray, " queries"]:
    """Spearman's correlation of each column; 0 where a column is constant."""
    left, right = (_centred_ranks(side) for side in (predicted, observed))
    norms = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=0)
    products = (left * right).sum(axis=0)
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)


def _centred_ranks(values: Tensor) -> Float[np.ndarray, "subsets queries"]:
    # Sums of equal numbers in another order differ by rounding, which is no order of subsets.
    ranks = stats.rankdata(np.round(values.double().numpy(), 10), axis=0)
    return ranks - ranks.mean(axis=0)


def reliability(bank: Bank) -> Agreement:
    """Rank correlation over subsets between two halves of a bank's seeds, query by query, mean over
    the ways of halving them."""
    seeds = set(range(bank.margins.shape[1]))
    half = len(seeds) // 2
    found = []
    for left in itertools.combinations(seeds, half):
        right = sorted(seeds - set(left))[:half]
        one, other = (-losses(bank.margins[:, list(side)]).mean(dim=1) for side in (left, right))
        found.append(rank_correlations(one, other))
    return Agreement(np.mean(found, axis=0))


def noise_ceiling(bank: Bank) -> float:
    """The score that one who knows the expected outcomes would get, about.

    The correlation between truth and a noisy measurement is √ of the measurement's reliability. With
    r that of half the seeds, k times as many have k r / (1 + (k − 1) r) (Spearman–Brown).
    """
    half, seeds = reliability(bank).mean, bank.margins.shape[1]
    times = seeds / (seeds // 2)
    return float(np.sqrt(times * half / (1 + (times - 1) * half)))


def rank_stability(
    one: Float[Tensor, "queries train"], other: Float[Tensor, "queries train"]
) -> float:
    """How alike two scorers order the training reviews: Spearman's correlation, mean over queries."""
    return float(rank_correlations(one.T, other.T).mean())
