"""Factors of queries at low rank: U Vᵀ for each query and layer, small enough to keep many.

A training example's score is then Σ_t (g_t·U)(a_t·V), r (d_out + d_in) multiplications per position and
query instead of d_out·d_in (Grosse et al. 2023, §3.2.2).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from support.ekfac.gradients import LayerGradients
from support.ekfac.matrix_products import matrix_product

OVERSAMPLING = 8


@dataclass(frozen=True)
class LowRank:
    """One layer's factors `left` · `right`ᵀ, and the squared norm that they had `whole`."""

    left: Float[Tensor, "test d_out rank"]
    right: Float[Tensor, "test d_in rank"]
    whole: Float[Tensor, " test"]

    def __len__(self) -> int:
        return len(self.left)

    @property
    def shape(self) -> tuple[int, int, int]:
        """As of the factors that it stands for, (test, d_out, d_in)."""
        return len(self.left), self.left.shape[1], self.right.shape[1]

    def dense(self) -> Float[Tensor, "test d_out d_in"]:
        """left · rightᵀ."""
        return self.left @ self.right.mT

    def kept(self) -> Float[Tensor, " test"]:
        """The squared norm that is left."""
        return ((self.left.mT @ self.left) * (self.right.mT @ self.right)).sum(dim=(1, 2))


def no_factors(
    zeros: Callable[..., Tensor], shape: tuple[int, int, int], rank: int | None
) -> Float[Tensor, "test d_out d_in"] | LowRank:
    """Factors of one layer of this shape, whole or at a rank, all zero; `zeros` makes tensors."""
    if rank is None:
        return zeros(*shape)
    queries, *widths = shape
    left, right = (zeros(queries, width, min(rank, *widths)) for width in widths)
    return LowRank(left, right, zeros(queries))


def tensors_of(factors: Tensor | LowRank) -> list[Tensor]:
    """What factors are made of."""
    return list(vars(factors).values()) if isinstance(factors, LowRank) else [factors]


def of_rank(factors: Float[Tensor, "test d_out d_in"], rank: int) -> LowRank:
    """The nearest factors of so low a rank, by a singular value decomposition (a randomised one, with two
    power iterations and a seed of its own, where the rank is well below the layer's widths)."""
    rank = min(rank, *factors.shape[1:])
    if rank + OVERSAMPLING < min(factors.shape[1:]):
        with torch.random.fork_rng(devices=[factors.device] if factors.is_cuda else []):
            torch.manual_seed(0)
            u, values, v = torch.svd_lowrank(factors, q=rank + OVERSAMPLING, niter=2)
    else:
        u, values, vt = torch.linalg.svd(factors, full_matrices=False)
        v = vt.mT
    left = u[..., :rank] * values[:, None, :rank]
    return LowRank(left.contiguous(), v[..., :rank].contiguous(), factors.square().sum(dim=(1, 2)))


def low_rank_rows(factors: LowRank, gradients: LayerGradients) -> Float[Tensor, "test positions"]:
    """(g_t·U)(a_t·V) for every row."""
    queries, rank = len(factors), factors.left.shape[2]
    sides = (gradients.activations, factors.right), (gradients.output_gradients, factors.left)
    right, left = (
        matrix_product(rows, vectors.permute(1, 0, 2).flatten(1)).view(len(rows), queries, rank)
        for rows, vectors in sides
    )
    return right.mul_(left).sum(dim=2).T


def joined(parts: list[LowRank], rows: list[int]) -> LowRank:
    """All queries, those of part after part standing in these rows."""
    order = torch.tensor(rows).argsort()
    sides = zip(*((one.left, one.right, one.whole) for one in parts), strict=True)
    return LowRank(*(torch.cat(side)[order.to(side[0].device)] for side in sides))
