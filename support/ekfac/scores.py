"""What is asked of a layer's gradients once the curvature is known, as pure mathematics.

Factors are preconditioned gradients (F + λ)⁻¹ G, `(test, d_out, d_in)` for each layer.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from support.ekfac.curvature import (
    DEFAULT_REGULARIZATION,
    LayerCurvature,
    Regularization,
    damped_inverse,
    rotated_in_parts,
    rotated_rows,
)
from support.ekfac.errors import FactorsMismatch, NotFinite
from support.ekfac.gradients import LayerGradients, is_finite
from support.ekfac.layers import TrackedLayer
from support.ekfac.low_rank import LowRank, low_rank_rows

NORMALISATIONS = ("plain", "relative")
"""What influences are divided by: nothing, or √self-influence of the training example."""

ByLayer = dict[str, Float[Tensor, "test train"]]
"""Scores of each layer, from input to output."""

Factors = dict[str, Float[Tensor, "test d_out d_in"] | LowRank]
"""Factors of each layer, from input to output."""


def kept_share(factors: Factors) -> Float[Tensor, " test"]:
    """How much of the squared norm of each query's factors their low rank has kept; 1 where nothing was
    there to lose."""
    whole = sum(layer.whole for layer in factors.values())
    return torch.where(whole > 0, sum(layer.kept() for layer in factors.values()) / whole, 1)


def check_factors(factors: Factors, layers: dict[str, TrackedLayer]) -> None:
    """Raise `FactorsMismatch` unless these are factors of these layers."""
    if list(factors) != list(layers):
        raise FactorsMismatch(
            f"The factors belong to layers {list(factors)}, this engine tracks {list(layers)}. Make "
            "them with this engine's influence_factors."
        )
    for name, layer in layers.items():
        if factors[name].shape[1:] != (layer.d_out, layer.d_in):
            raise FactorsMismatch(
                f"The factors of {name!r} have shape {tuple(factors[name].shape)}, expected "
                f"(test, {layer.d_out}, {layer.d_in})."
            )


def products(
    factors: Float[Tensor, "test d_out d_in"] | LowRank, gradients: LayerGradients
) -> Float[Tensor, "test batch"]:
    """⟨factors, G⟩ for every pair, in the order that costs fewer multiplications.

    With T positions per example and Q queries, in units of d_out·d_in: G first is T products and Q
    more to compare them; carrying every row of activations through every factor is Q·T.
    """
    queries, positions = len(factors), len(gradients.example)
    if isinstance(factors, LowRank):
        by_row = low_rank_rows(factors, gradients)
        return by_row.new_zeros(queries, gradients.examples).index_add_(1, gradients.example, by_row)
    if queries * positions > positions + queries * gradients.examples:
        return factors.flatten(1) @ gradients.per_example().flatten(1).T
    carried = factors.flatten(0, 1) @ gradients.activations.T
    by_row = carried.view((*factors.shape[:2], positions)).mul_(gradients.output_gradients.T)
    result = by_row.new_zeros(queries, gradients.examples)
    return result.index_add_(1, gradients.example, by_row.sum(dim=1))


def products_by_row(
    factors: Float[Tensor, "test d_out d_in"] | LowRank, gradients: LayerGradients
) -> Float[Tensor, "test positions"]:
    """g_tᵀ · factors · a_t for every row; those of an example add up to its `products`."""
    if isinstance(factors, LowRank):
        return low_rank_rows(factors, gradients)
    by_row = [
        (gradients.output_gradients @ factor).mul_(gradients.activations).sum(dim=1) for factor in factors
    ]
    return torch.stack(by_row)


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
        return result.index_add_(0, gradients.example, by_row)
    root = inverse.sqrt_()
    for examples, rotated in rotated_in_parts(gradients, curvature.basis):
        scaled = rotated.mul_(root).flatten(1)
        result[examples] = torch.linalg.vecdot(scaled, scaled)
    return result


def of_each_other(
    rotated: dict[str, Float[Tensor, "batch d_out d_in"]],
    curvature: dict[str, LayerCurvature],
    regularization: Regularization,
) -> dict[str, Float[Tensor, "batch batch"]]:
    """⟨(F + λ)⁻¹ G_n, G_m⟩ of every pair, layer by layer, from gradients in the eigenbasis."""
    found = {}
    for name, gradients in rotated.items():
        inverse = damped_inverse(curvature[name].eigenvalues, regularization)
        found[name] = (gradients * inverse).flatten(1) @ gradients.flatten(1).T
    return found


def refuse_not_finite(result: Tensor, regularization: Regularization) -> Tensor:
    """The result itself. Raises `NotFinite` when some of it is NaN or infinite."""
    if not is_finite(result):
        raise NotFinite(
            f"With hessian_regularization={regularization!r} influences are NaN or infinite: the "
            f"curvature is too small to be divided by. Use a larger one, {DEFAULT_REGULARIZATION} say."
        )
    return result


def sum_over_layers(by_layer: ByLayer) -> Float[Tensor, "test train"]:
    """Σ over layers of by-layer influences."""
    return torch.stack(list(by_layer.values())).sum(dim=0)


def divided_by_root(
    scores: Float[Tensor, "test train"], own: Float[Tensor, " train"]
) -> Float[Tensor, "test train"]:
    """Relative influences: each column over the root of its self-influence, zero where that is."""
    norms = own.sqrt()
    return torch.where(norms > 0, scores / norms, 0)
