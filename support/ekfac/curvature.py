"""Covariances → eigenbasis → corrected eigenvalues: the curvature of one layer, as pure mathematics.

The Fisher of a layer, over vec G with G of shape (d_out, d_in), is approximated by
(Q_a ⊗ Q_g) diag(Λ) (Q_a ⊗ Q_g)ᵀ. Q_a and Q_g are eigenvectors of the covariances of activations and
output gradients (Martens & Grosse 2015); Λ is the Fisher's own second moment along each pair of them
(George et al. 2018), or the product of the two eigenvalues (K-FAC).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from support.ekfac.errors import BadSetting
from support.ekfac.gradients import LayerGradients, matrices_at_a_time
from support.ekfac.matrix_products import FULL, Precision, matrix_product

GRAM_PARTS = 4

ORTHONORMAL = 1e-4
"""How far QᵀQ may be from the identity, at its worst entry: more than rounding in float32 leaves."""


def add_gram(total: Float[Tensor, "d d"], rows: Float[Tensor, "n d"]) -> None:
    """total += Σ x xᵀ over the rows. It is symmetric: in so many parts, blocks below the diagonal are those
    above it, and ten products of sixteen are left."""
    columns = rows.T.contiguous()
    size = -(-len(columns) // GRAM_PARTS)
    for first in range(0, len(columns), size):
        end = first + size
        product = matrix_product(columns[first:end], columns[first:].T)
        total[first:end, first:] += product
        total[end:, first:end] += product[:, size:].T


@dataclass
class Eigenbasis:
    """Eigenvectors in columns, and the eigenvalues they belong to, in ascending order.

    `products` is the dtype in which rows are rotated, None for their own.
    """

    activation: Float[Tensor, "d_in d_in"]
    output_gradient: Float[Tensor, "d_out d_out"]
    activation_eigenvalues: Float[Tensor, " d_in"]
    output_gradient_eigenvalues: Float[Tensor, " d_out"]
    products: torch.dtype | None = None

    def __post_init__(self) -> None:
        # Each vector in one piece: so `matrix_product` wants them when rows are rotated.
        self.activation = self.activation.T.contiguous().T
        self.output_gradient = self.output_gradient.T.contiguous().T

    def rotated(self, rows: Float[Tensor, "n d"], vectors: Float[Tensor, "d d"]) -> Float[Tensor, "n d"]:
        """Qᵀ x for every row x, with Q one of the two matrices of eigenvectors."""
        if self.products is None:
            return matrix_product(rows, vectors)
        return (rows.to(self.products) @ vectors.to(self.products)).to(rows.dtype)

    def to(self, device: str | torch.device) -> "Eigenbasis":
        """The same on another device."""
        tensors = {key: part.to(device) for key, part in vars(self).items() if key != "products"}
        return Eigenbasis(**tensors, products=self.products)


def eigenbasis(
    activation: Float[Tensor, "d_in d_in"],
    output_gradient: Float[Tensor, "d_out d_out"],
    precision: Precision = FULL,
) -> Eigenbasis:
    """Eigenvectors of both covariances, computed in `precision.eigenproblems` and returned in their dtype.

    Eigenvalues that rounding has pushed below zero are set to zero.
    """
    activation_values, activation_vectors = _eigenvectors(activation, precision.eigenproblems)
    gradient_values, gradient_vectors = _eigenvectors(output_gradient, precision.eigenproblems)
    return Eigenbasis(
        activation_vectors, gradient_vectors, activation_values, gradient_values, precision.products
    )


def _eigenvectors(covariance: Float[Tensor, "d d"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """In float64 where the dtype doesn't lead to an orthonormal basis: Λ is corrected in any such basis, be
    it a little turned, and in no other."""
    try:
        values, vectors = torch.linalg.eigh(covariance.to(dtype))
        sound = dtype == torch.float64 or _error_of_orthonormality(vectors) <= ORTHONORMAL
    except torch.linalg.LinAlgError:
        sound = False
    if not sound:
        values, vectors = torch.linalg.eigh(covariance.double())
    return values.clamp(min=0).to(covariance.dtype), vectors.to(covariance.dtype)


def _error_of_orthonormality(vectors: Float[Tensor, "d d"]) -> float:
    product = vectors.T @ vectors
    product.diagonal().sub_(1)
    return product.abs().max().item()


def take_out_of_basis(rotated: Float[Tensor, "batch d_out d_in"], basis: Eigenbasis) -> None:
    """R ← Q_g R Q_aᵀ for many gradients, in place."""
    # In the memory order that `matrix_product` wants, here that of Q and not of its transpose.
    q_a, q_g = basis.activation.contiguous(), basis.output_gradient.contiguous()
    for part in rotated.split(matrices_at_a_time(rotated.device, *rotated.shape[1:])):
        part.copy_(_from_the_left(q_g, _from_the_left(q_a, part.mT).mT))


def rotated_in_parts(
    gradients: LayerGradients, basis: Eigenbasis
) -> Iterator[tuple[slice, Float[Tensor, "part d_out d_in"]]]:
    """Some examples at a time, and Q_gᵀ G Q_a of each, in the order that costs fewer multiplications.

    The matrices are the caller's to change. With T positions, rotating
    the rows of g first costs T·d_out², rotating their product d_in·d_out²; so the side whose
    width is above the number of positions is done afterwards, each side for itself.
    """
    a, g = gradients.activations, gradients.output_gradients
    d_out, d_in = g.shape[1], a.shape[1]
    positions = len(a) / gradients.examples
    a_first, g_first = positions < d_out, positions < d_in
    if a_first:
        a = basis.rotated(a, basis.activation)
    if g_first:
        g = basis.rotated(g, basis.output_gradient)
    for examples, products in replace(gradients, activations=a, output_gradients=g).in_parts():
        if not a_first:
            products = matrix_product(products.flatten(0, 1), basis.activation).view(products.shape)
        if not g_first:
            products = _from_the_left(basis.output_gradient.T, products)
        yield examples, products


def _from_the_left(left: Float[Tensor, "n n"], matrices: Float[Tensor, "part n m"]) -> Tensor:
    """left · each of the matrices."""
    return matrix_product(left, matrices[0])[None] if len(matrices) == 1 else left @ matrices


def rotated_rows(
    gradients: LayerGradients, basis: Eigenbasis
) -> tuple[Float[Tensor, "positions d_in"], Float[Tensor, "positions d_out"]]:
    """Q_aᵀ a and Q_gᵀ g for every row: all there is to rotate when each example has one."""
    return (
        basis.rotated(gradients.activations, basis.activation),
        basis.rotated(gradients.output_gradients, basis.output_gradient),
    )


def add_squares(total: Float[Tensor, "d_out d_in"], gradients: LayerGradients, basis: Eigenbasis) -> None:
    """total += Σ_n (Q_gᵀ G_n Q_a)², entry by entry: the batch's share of the corrected eigenvalues.

    With one position per example the squares are products of squares, and their sum a matrix product.
    Dividing by the number of examples is the caller's, who knows it. George et al. 2018, eq. 8.
    """
    if gradients.is_rank_one:
        a, g = rotated_rows(gradients, basis)
        total.addmm_(g.square_().T, a.square_())
        return
    for _, rotated in rotated_in_parts(gradients, basis):
        if len(rotated) == 1:
            total.addcmul_(rotated[0], rotated[0])
        else:
            total += rotated.square_().sum(dim=0)


def kfac_eigenvalues(basis: Eigenbasis) -> Float[Tensor, "d_out d_in"]:
    """The outer product of the two covariances' eigenvalues."""
    return torch.outer(basis.output_gradient_eigenvalues, basis.activation_eigenvalues)


@dataclass
class LayerCurvature:
    """What `fit` leaves of one layer: its eigenbasis and Λ, (d_out, d_in)."""

    basis: Eigenbasis
    eigenvalues: Float[Tensor, "d_out d_in"]

    def to(self, device: str | torch.device) -> "LayerCurvature":
        """The same on another device."""
        return LayerCurvature(self.basis.to(device), self.eigenvalues.to(device))


Regularization = float | int | str
"""λ ≥ 0, the same for every layer, or "auto"."""

AUTO_SHARE = 0.1

DEFAULT_REGULARIZATION = 1e-2
"""What predicted best, on nine banks, how a last block and a head come out of retraining (chapter 09)."""


def check_regularization(regularization: Regularization) -> None:
    """Raise `BadSetting` unless it is a finite number ≥ 0 or "auto"."""
    if regularization == "auto":
        return
    is_number = isinstance(regularization, int | float)
    if not is_number or not (math.isfinite(regularization) and regularization >= 0):
        raise BadSetting(
            f"hessian_regularization={regularization!r}: use a number ≥ 0, or 'auto' "
            f"({AUTO_SHARE} times the mean eigenvalue of each layer)."
        )


def damping(eigenvalues: Float[Tensor, "d_out d_in"], regularization: Regularization) -> float:
    """λ for one layer; "auto" is 0.1 · mean(Λ), the heuristic of Grosse et al. 2023.

    Where Λ is all zeros that is 1: nothing is divided by it but zeros.
    """
    if regularization == "auto":
        return AUTO_SHARE * eigenvalues.mean().item() or 1.0
    return float(regularization)


def damped_inverse(
    eigenvalues: Float[Tensor, "d_out d_in"], regularization: Regularization
) -> Float[Tensor, "d_out d_in"]:
    """1 / (Λ + λ). Without damping it is the pseudo-inverse: 0 where Λ is 0 to rounding."""
    damped = eigenvalues + damping(eigenvalues, regularization)
    if regularization == 0:
        # Below it, differences of the largest eigenvalue's size would be rounding.
        floor = torch.finfo(eigenvalues.dtype).eps * eigenvalues.max()
        return torch.where(damped > floor, 1 / damped, 0)
    return 1 / damped
