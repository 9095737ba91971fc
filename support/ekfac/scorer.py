"""Scores of many examples: the passes of a fitted engine, and what is kept of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from support.ekfac.blocks import Pool
from support.ekfac.capture import Consume, Trace
from support.ekfac.curvature import Regularization, take_out_of_basis
from support.ekfac.errors import BadNormalisation, EmptyLoader, LabelsMismatch
from support.ekfac.likelihood import Direction, Likelihood, loss_direction, unit_loss_direction
from support.ekfac.memory import in_groups, queries_at_a_time
from support.ekfac.passes import Passes, labelled, length_of
from support.ekfac.scoring import (
    Curvature,
    Factors,
    add_self_influences,
    both,
    keep_scores,
    keep_solved,
)

ByLayer = dict[str, Float[Tensor, "test train"]]

NORMALISATIONS = ("plain", "relative", "unit residual")
"""What influences are divided by: nothing; √self-influence of the training example; the size of its
training residual."""


@dataclass(frozen=True)
class Scorer:
    """The passes of a fitted engine, its loss, its curvature and λ.

    `training_direction` is what training examples send back through the model.
    """

    passes: Passes
    likelihood: Likelihood
    curvature: Curvature
    regularization: Regularization
    training_direction: Direction = loss_direction

    def factors(self, pools: Iterable, examples: int) -> Factors:
        """(F + λ)⁻¹ ∇loss of each example, `(test, d_out, d_in)` for each layer."""
        layers = self.passes.layers
        factors = {
            name: self.zeros(examples, layer.d_out, layer.d_in) for name, layer in layers.items()
        }
        first = 0
        for pool in pools:
            part = {name: factor[first : first + pool.examples] for name, factor in factors.items()}

            def into(rows: list[int], _: Trace, part: Factors = part) -> Consume:
                return keep_solved(part, rows, self.curvature, self.regularization)

            self.passes.over(pool.blocks, labelled(self.likelihood, into))
            first += pool.examples
        for name, matrices in factors.items():
            take_out_of_basis(matrices, self.curvature[name].basis)
        return factors

    def scores(self, factors: Factors, pool: Pool) -> ByLayer:
        """⟨factors, ∇loss⟩ for each example of a pool, layer by layer."""
        scores = self._zeros_for_scores(factors, pool.examples)

        def into(rows: list[int], _: Trace) -> Consume:
            return keep_scores(scores, rows, factors)

        work = labelled(self.likelihood, into, self.training_direction)
        self.passes.over(pool.blocks, work)
        return scores

    def scores_and_self_influences(
        self, factors: Factors, pool: Pool
    ) -> tuple[ByLayer, Float[Tensor, " train"]]:
        """The same, and the self-influence of each example of the pool, from the same passes."""
        scores = self._zeros_for_scores(factors, pool.examples)
        own = self.zeros(pool.examples)

        def into(rows: list[int], _: Trace) -> Consume:
            return both(
                keep_scores(scores, rows, factors),
                add_self_influences(own, rows, self.curvature, self.regularization),
            )

        self.passes.over(pool.blocks, labelled(self.likelihood, into))
        return scores, own

    def with_unit_residuals(self) -> "Scorer":
        """The same, with training residuals of size 1."""
        return replace(self, training_direction=unit_loss_direction)

    def over_loaders(
        self, test_loader: Iterable, train_loader: Iterable, normalisation: str, budget: int | None
    ) -> Float[Tensor, "test train"]:
        """Influence of all training on all test examples, normalised.

        As many queries at a time as have factors that fit the budget, in bytes; the training examples
        pass by once for each such group. Raises `BadNormalisation`, `EmptyLoader`, `LabelsMismatch`.
        """
        if normalisation not in NORMALISATIONS:
            raise BadNormalisation(
                f"normalisation={normalisation!r}: there are {', '.join(map(repr, NORMALISATIONS))}."
            )
        relative = normalisation == "relative"
        scorer = self.with_unit_residuals() if normalisation == "unit residual" else self
        queries = [(x, y) for x, y, *_ in test_loader]
        for x, y in queries:
            if len(x) != len(y):
                raise LabelsMismatch(
                    f"{len(x)} examples come with {len(y)} labels: one label each."
                )
        groups = list(in_groups(queries, queries_at_a_time(self.passes.layers, budget)))
        if not groups:
            raise EmptyLoader("The test loader gave no batch.")
        rows, own = [], None
        for group in groups:
            pools = self.passes.pools(iter(group), len(group), "test examples")
            factors = self.factors(pools, sum(len(x) for x, _ in group))
            with_own = relative and own is None
            columns, norms = scorer._columns(factors, train_loader, with_own)
            own = norms if with_own else own
            rows.append(columns)
        scores = torch.cat(rows)
        return divided_by_root(scores, own) if relative else scores

    def _columns(
        self, factors: Factors, loader: Iterable, with_self_influences: bool
    ) -> tuple[Float[Tensor, "test train"], Float[Tensor, " train"] | None]:
        columns, own = [], []
        for pool in self._training_pools(loader):
            if with_self_influences:
                scores, of_pool = self.scores_and_self_influences(factors, pool)
                own.append(of_pool)
            else:
                scores = self.scores(factors, pool)
            columns.append(sum_over_layers(scores))
        if not columns:
            raise EmptyLoader(
                "The training loader gave no batch. It must give all of them again for every group "
                "of queries (a DataLoader or a list, no generator)."
            )
        return torch.cat(columns, dim=1), torch.cat(own) if own else None

    def _training_pools(self, loader: Iterable) -> Iterator[Pool]:
        batches = ((x, y) for x, y, *_ in loader)
        return self.passes.pools(batches, length_of(loader), "training examples")

    def zeros(self, *shape: int) -> Tensor:
        """Room for a result, filled outside inference mode even when called inside."""
        layer = next(iter(self.passes.layers.values()))
        with torch.inference_mode(False):
            return torch.zeros(*shape, dtype=layer.dtype, device=layer.device)

    def _zeros_for_scores(self, factors: Factors, examples: int) -> ByLayer:
        return {name: self.zeros(len(factor), examples) for name, factor in factors.items()}


def sum_over_layers(by_layer: ByLayer) -> Float[Tensor, "test train"]:
    """Σ over layers of by-layer influences."""
    return torch.stack(list(by_layer.values())).sum(dim=0)


def divided_by_root(
    scores: Float[Tensor, "test train"], own: Float[Tensor, " train"]
) -> Float[Tensor, "test train"]:
    """Relative influences: each column over the root of its self-influence, zero where that is."""
    norms = own.sqrt()
    return torch.where(norms > 0, scores / norms, 0)
