"""Covariances → eigenbasis → corrected eigenvalues: the curvature of one layer, as pure mathematics.

The Fisher of a layer, over vec G with G of shape (d_out, d_in), is approximated by
(Q_a ⊗ Q_g) diag(Λ) (Q_a ⊗ Q_g)ᵀ. Q_a and Q_g are eigenvectors of the covariances of activations and
output gradients (Martens & Grosse 2015); Λ is the Fisher's own second moment along each pair of them
(George et al. 2018), or the product of the two eigenvalues (K-FAC).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from support.ekfac.layers import per_example_gradients, without_silent_positions


class Covariances:
    """Running sums of a aᵀ and g gᵀ for one layer.

    `activation` is their mean over real positions, (d_in, d_in); `output_gradient` is summed over
    positions and over the Fisher's directions, mean over examples, (d_out, d_out).
    """

    def __init__(self, d_out: int, d_in: int, dtype: torch.dtype, device: torch.device):
        self._activation_sum = torch.zeros(d_in, d_in, dtype=dtype, device=device)
        self._output_gradient_sum = torch.zeros(d_out, d_out, dtype=dtype, device=device)
        self._positions = 0
        self._examples = 0

    def add_activations(
        self, activations: Float[Tensor, "batch positions d_in"], real_positions: int
    ) -> None:
        """Add a batch, whose padded positions are zero."""
        rows = activations.flatten(0, 1)
        self._activation_sum.addmm_(rows.T, rows)
        self._positions += real_positions
        self._examples += len(activations)

    def add_output_gradients(
        self, output_gradients: Float[Tensor, "batch positions d_out"]
    ) -> None:
        """Add the output gradients of one direction of the Fisher for a batch."""
        rows = output_gradients.flatten(0, 1)
        self._output_gradient_sum.addmm_(rows.T, rows)

    @property
    def activation(self) -> Float[Tensor, "d_in d_in"]:
        return self._activation_sum / self._positions

    @property
    def output_gradient(self) -> Float[Tensor, "d_out d_out"]:
        return self._output_gradient_sum / self._examples


@dataclass
class Eigenbasis:
    """Eigenvectors in columns, and the eigenvalues they belong to, in ascending order."""

    activation: Float[Tensor, "d_in d_in"]
    output_gradient: Float[Tensor, "d_out d_out"]
    activation_eigenvalues: Float[Tensor, " d_in"]
    output_gradient_eigenvalues: Float[Tensor, " d_out"]


def eigenbasis(
    activation: Float[Tensor, "d_in d_in"], output_gradient: Float[Tensor, "d_out d_out"]
) -> Eigenbasis:
    """Eigenvectors of both covariances, computed in float64, returned in the covariances' dtype.

    Eigenvalues that rounding has pushed below zero are set to zero.
    """
    activation_values, activation_vectors = torch.linalg.eigh(activation.double())
    gradient_values, gradient_vectors = torch.linalg.eigh(output_gradient.double())
    return Eigenbasis(
        activation_vectors.to(activation.dtype).contiguous(),
        gradient_vectors.to(output_gradient.dtype).contiguous(),
        activation_values.clamp(min=0).to(activation.dtype),
        gradient_values.clamp(min=0).to(output_gradient.dtype),
    )


def into_basis(
    gradients: Float[Tensor, "batch d_out d_in"], basis: Eigenbasis
) -> Float[Tensor, "batch d_out d_in"]:
    """Q_gᵀ G Q_a, example by example."""
    return basis.output_gradient.T @ gradients @ basis.activation


def out_of_basis(
    rotated: Float[Tensor, "batch d_out d_in"], basis: Eigenbasis
) -> Float[Tensor, "batch d_out d_in"]:
    """Q_g R Q_aᵀ, example by example: the inverse of `into_basis`."""
    return basis.output_gradient @ rotated @ basis.activation.T


def rotated_gradients(
    activations: Float[Tensor, "batch positions d_in"],
    output_gradients: Float[Tensor, "batch positions d_out"],
    basis: Eigenbasis,
) -> Float[Tensor, "batch d_out d_in"]:
    """Q_gᵀ (Σ_t g_t a_tᵀ) Q_a, example by example, in the order that costs fewer multiplications.

    Rotating a and g first costs T(d_in² + d_out²) per example with T positions, rotating their
    product d_out·d_in·(d_out + d_in).
    """
    activations, output_gradients = without_silent_positions(activations, output_gradients)
    positions, d_in = activations.shape[1:]
    d_out = output_gradients.shape[2]
    if positions * (d_in**2 + d_out**2) < d_out * d_in * (d_out + d_in):
        return per_example_gradients(
            activations @ basis.activation, output_gradients @ basis.output_gradient
        )
    return into_basis(per_example_gradients(activations, output_gradients), basis)


def squared_sum(
    rotated: Float[Tensor, "batch d_out d_in"],
) -> Float[Tensor, "d_out d_in"]:
    """Σ_n (Q_gᵀ G_n Q_a)², entry by entry: the batch's share of the corrected eigenvalues.

    Dividing by the number of examples is the caller's, who knows it. George et al. 2018, eq. 8.
    """
    return rotated.square().sum(dim=0)


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
        parts = {name: part.to(device) for name, part in vars(self.basis).items()}
        return LayerCurvature(Eigenbasis(**parts), self.eigenvalues.to(device))
