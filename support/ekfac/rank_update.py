"""Sums of x xᵀ over many rows, half of whose entries need no computing."""

import torch
from jaxtyping import Float
from scipy.linalg import blas
from torch import Tensor

SYMMETRIC_UPDATE = {torch.float32: blas.ssyrk, torch.float64: blas.dsyrk}


def add_gram(total: Float[Tensor, "d d"], rows: Float[Tensor, "n d"]) -> None:
    """total += Σ x xᵀ over the rows, for the lower triangle at least.

    On the CPU it is a symmetric rank-k update: half the multiplications. Elsewhere, and in other
    dtypes, a matrix product. `fill_other_triangle` makes the total symmetric, once, at the end.
    """
    update = SYMMETRIC_UPDATE.get(total.dtype)
    if update is None or total.device.type != "cpu":
        total.addmm_(rows.T, rows)
    elif len(rows):
        # BLAS counts columns first: it sees both transposed, and its upper triangle is our lower one.
        update(
            1.0,
            rows.contiguous().numpy().T,
            beta=1.0,
            c=total.numpy().T,
            lower=0,
            overwrite_c=True,
        )


def fill_other_triangle(total: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The total itself, its upper triangle now the mirror of the lower one."""
    return total.tril_().add_(total.tril(-1).T)
