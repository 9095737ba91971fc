"""Damped inverses of a layer's curvature."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from support.ekfac.errors import BadRegularization

Regularization = float | int | str
"""λ ≥ 0, the same for every layer, or "auto"."""

AUTO_SHARE = 0.1


def check_regularization(regularization: Regularization) -> None:
    """Raise `BadRegularization` unless it is a finite number ≥ 0 or "auto"."""
    if regularization == "auto":
        return
    if isinstance(regularization, str) or not (
        math.isfinite(regularization) and regularization >= 0
    ):
        raise BadRegularization(
            f"hessian_regularization={regularization!r}: use a number ≥ 0, or 'auto' "
            f"({AUTO_SHARE} times the mean eigenvalue of each layer)."
        )


def damping(eigenvalues: Float[Tensor, "d_out d_in"], regularization: Regularization) -> float:
    """λ for one layer; "auto" is 0.1 · mean(Λ), the heuristic of Grosse et al. 2023."""
    if regularization == "auto":
        return AUTO_SHARE * eigenvalues.mean().item()
    return float(regularization)


def damped_inverse(
    eigenvalues: Float[Tensor, "d_out d_in"], regularization: Regularization
) -> Float[Tensor, "d_out d_in"]:
    """1 / (Λ + λ), and 0 where both are 0: without damping, the pseudo-inverse."""
    damped = eigenvalues + damping(eigenvalues, regularization)
    return torch.where(damped > 0, 1 / damped, 0)
