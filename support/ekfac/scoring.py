"""What is computed from a layer's gradients once the curvature is known.

Each function returns the consumer of one backward pass for a block of examples: it is called once per
layer and writes that layer's part into a result, which is given first, at the block's `rows`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from support.ekfac.capture import Consume
from support.ekfac.curvature import (
    LayerCurvature,
    Regularization,
    damped_inverse,
    rotated_one_by_one,
    rotated_rows,
)
from support.ekfac.positions import LayerGradients

Rows = list[int]
"""Where the examples of a block stand in the result."""

Factors = dict[str, Float[Tensor, "test d_out d_in"]]
"""Preconditioned gradients, layer by layer, from input to output."""

Curvature = dict[str, LayerCurvature]


def keep_solved(
    solved: Factors, rows: Rows, curvature: Curvature, regularization: Regularization
) -> Consume:
    """solved[rows] = Q_gᵀ (F + λ)⁻¹ G Q_a: factors, still in the eigenbasis."""

    def consume(name: str, gradients: LayerGradients) -> None:
        layer = curvature[name]
        inverse = damped_inverse(layer.eigenvalues, regularization)
        for example, rotated in rotated_one_by_one(gradients, layer.basis):
            torch.mul(rotated, inverse, out=solved[name][rows[example]])

    return consume


def keep_rotated(
    rotated: dict[str, Float[Tensor, "batch d_out d_in"]], rows: Rows, curvature: Curvature
) -> Consume:
    """rotated[rows] = Q_gᵀ G Q_a."""

    def consume(name: str, gradients: LayerGradients) -> None:
        for example, matrix in rotated_one_by_one(gradients, curvature[name].basis):
            rotated[name][rows[example]] = matrix

    return consume


def keep_scores(
    scores: dict[str, Float[Tensor, "test train"]], rows: Rows, factors: Factors
) -> Consume:
    """scores[:, rows] = ⟨factors, G⟩."""

    def consume(name: str, gradients: LayerGradients) -> None:
        scores[name][:, rows] = products(factors[name], gradients)

    return consume


def add_scores_by_label(
    scores: Float[Tensor, "test train classes"],
    rows: Rows,
    factors: Factors,
    weights: Float[Tensor, "batch classes"],
) -> Consume:
    """scores[:, rows, c] += weights[:, c] · ⟨factors, G⟩."""

    def consume(name: str, gradients: LayerGradients) -> None:
        by_label = products(factors[name], gradients).unsqueeze(-1) * weights.to(scores)
        scores[:, rows] += by_label

    return consume


def add_scores_by_token(
    scores: Float[Tensor, "test train tokens"], rows: Rows, factors: Factors
) -> Consume:
    """scores[:, rows, t] += g_tᵀ · factors · a_t.

    A layer with one position adds to the first token.
    """

    def consume(name: str, gradients: LayerGradients) -> None:
        examples = torch.tensor(rows, device=scores.device)[gradients.owners]
        tokens = gradients.places % gradients.tokens
        by_token = [
            (gradients.output_gradients @ factor).mul_(gradients.activations).sum(dim=1)
            for factor in factors[name]
        ]
        scores[:, examples, tokens] += torch.stack(by_token)

    return consume


def add_self_influences(
    self_influences: Float[Tensor, " train"],
    rows: Rows,
    curvature: Curvature,
    regularization: Regularization,
) -> Consume:
    """self_influences[rows] += ⟨G, (F + λ)⁻¹ G⟩."""

    def consume(name: str, gradients: LayerGradients) -> None:
        own = squared_norms(gradients, curvature[name], regularization)
        self_influences[rows] += own

    return consume


def both(first: Consume, second: Consume) -> Consume:
    """Two results from one backward pass."""

    def consume(name: str, gradients: LayerGradients) -> None:
        first(name, gradients)
        second(name, gradients)

    return consume


def products(
    factors: Float[Tensor, "test d_out d_in"], gradients: LayerGradients
) -> Float[Tensor, "test batch"]:
    """⟨factors, G⟩ for every pair, in the order that costs fewer multiplications.

    With T positions per example and Q queries, in units of d_out·d_in: G first is T products and Q
    more to compare them; carrying every row of activations through every factor is Q·T.
    """
    queries, positions = len(factors), len(gradients.places)
    if queries * positions > positions + queries * gradients.examples:
        return factors.flatten(1) @ gradients.per_example().flatten(1).T
    carried = factors.flatten(0, 1) @ gradients.activations.T
    by_row = carried.view(queries, -1, positions).mul_(gradients.output_gradients.T).sum(dim=1)
    result = by_row.new_zeros(queries, gradients.examples)
    return result.index_add_(1, gradients.owners, by_row)


def squared_norms(
    gradients: LayerGradients, curvature: LayerCurvature, regularization: Regularization
) -> Float[Tensor, " batch"]:
    """⟨G, (F + λ)⁻¹ G⟩ per example: one layer's share of the self-influence.

    With one position per example it is (Q_gᵀ g)² · 1/(Λ + λ) · (Q_aᵀ a)², without forming G.
    """
    inverse = damped_inverse(curvature.eigenvalues, regularization)
    result = inverse.new_zeros(gradients.examples)
    if gradients.is_rank_one:
        a, g = rotated_rows(gradients, curvature.basis)
        by_row = (g.square_() @ inverse).mul_(a.square_()).sum(dim=1)
        return result.index_add_(0, gradients.owners, by_row)
    root = inverse.sqrt_()
    for example, rotated in rotated_one_by_one(gradients, curvature.basis):
        scaled = rotated.mul_(root).flatten()
        result[example] = torch.dot(scaled, scaled)
    return result
