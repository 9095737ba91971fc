"""What is computed from a layer's activations and output gradients once the curvature is known.

Each function returns the consumer of one backward pass for a block of examples: it is called once per
layer and writes that layer's part into a result, which is given first, at the block's `rows`.
"""

from jaxtyping import Float
from torch import Tensor

from support.ekfac.capture import Consume
from support.ekfac.curvature import LayerCurvature, rotated_gradients
from support.ekfac.layers import per_example_gradients, without_silent_positions
from support.ekfac.solve import Regularization, precondition, squared_norm

Factors = dict[str, Float[Tensor, "test d_out d_in"]]
"""Preconditioned gradients, layer by layer, from input to output."""

Curvature = dict[str, LayerCurvature]


def keep_factors(
    factors: Factors, rows: slice, curvature: Curvature, regularization: Regularization
) -> Consume:
    """factors[rows] = (F + λ)⁻¹ G."""

    def consume(name: str, activations: Tensor, output_gradients: Tensor) -> None:
        rotated = rotated_gradients(activations, output_gradients, curvature[name].basis)
        factors[name][rows] = precondition(rotated, curvature[name], regularization)

    return consume


def keep_rotated(
    rotated: dict[str, Float[Tensor, "batch d_out d_in"]], rows: slice, curvature: Curvature
) -> Consume:
    """rotated[rows] = Q_gᵀ G Q_a."""

    def consume(name: str, activations: Tensor, output_gradients: Tensor) -> None:
        basis = curvature[name].basis
        rotated[name][rows] = rotated_gradients(activations, output_gradients, basis)

    return consume


def keep_scores(
    scores: dict[str, Float[Tensor, "test train"]], rows: slice, factors: Factors
) -> Consume:
    """scores[:, rows] = ⟨factors, G⟩."""

    def consume(name: str, activations: Tensor, output_gradients: Tensor) -> None:
        scores[name][:, rows] = _products(factors[name], activations, output_gradients)

    return consume


def add_scores_by_label(
    scores: Float[Tensor, "test batch classes"],
    factors: Factors,
    weights: Float[Tensor, "batch classes"],
) -> Consume:
    """scores[:, :, c] += weights[:, c] · ⟨factors, G⟩, for the examples of one block."""

    def consume(name: str, activations: Tensor, output_gradients: Tensor) -> None:
        products = _products(factors[name], activations, output_gradients)
        scores.add_(products.unsqueeze(-1) * weights.to(products))

    return consume


def add_scores_by_token(scores: Float[Tensor, "test batch tokens"], factors: Factors) -> Consume:
    """scores[:, :, t] += g_tᵀ · factors · a_t, for the examples of one block.

    A layer with one position adds to the first token.
    """

    def consume(name: str, activations: Tensor, output_gradients: Tensor) -> None:
        positions = activations.shape[1]
        for test, factor in enumerate(factors[name]):
            by_token = ((output_gradients @ factor) * activations).sum(dim=-1)
            scores[test, :, :positions] += by_token

    return consume


def add_self_influences(
    self_influences: Float[Tensor, " batch"],
    rows: slice,
    curvature: Curvature,
    regularization: Regularization,
) -> Consume:
    """self_influences[rows] += ⟨G, (F + λ)⁻¹ G⟩."""

    def consume(name: str, activations: Tensor, output_gradients: Tensor) -> None:
        rotated = rotated_gradients(activations, output_gradients, curvature[name].basis)
        self_influences[rows] += squared_norm(rotated, curvature[name], regularization)

    return consume


def both(first: Consume, second: Consume) -> Consume:
    """Two results from one backward pass."""

    def consume(name: str, activations: Tensor, output_gradients: Tensor) -> None:
        first(name, activations, output_gradients)
        second(name, activations, output_gradients)

    return consume


def _products(
    factors: Float[Tensor, "test d_out d_in"], activations: Tensor, output_gradients: Tensor
) -> Float[Tensor, "test batch"]:
    heard = without_silent_positions(activations, output_gradients)
    return factors.flatten(1) @ per_example_gradients(*heard).flatten(1).T
