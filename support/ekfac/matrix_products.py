"""How matrix products are taken: the engine's own, and the model's while the engine looks on.

On the CPU torch hands products in float32 to MKL, which leaves half of an AMD processor's AVX-512 unused.
oneDNN, which comes with torch as well, uses it; there it is twice as fast, and elsewhere no slower.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LARGE = 2**24
"""Multiply-adds from which on a product is worth the copies that oneDNN wants."""

Arithmetic = Callable[[], AbstractContextManager]
"""A context for each forward pass; backward passes follow it."""


def matrix_product(left: Float[Tensor, "n k"], right: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """left · right, outside autograd.

    Quickest when the rows of `left` and the columns of `right` each stand together in memory.
    """
    return _by_onednn(left, right) if is_worth_it(left, right) else left @ right


def _by_onednn(left: Tensor, right: Tensor) -> Tensor:
    return nn.functional.linear(left.to_mkldnn(), right.T.to_mkldnn()).to_dense()


def is_worth_it(left: Float[Tensor, "n k"], right: Float[Tensor, "k m"]) -> bool:
    """Whether `matrix_product` goes another way than torch."""
    adds = left.shape[0] * left.shape[1] * right.shape[1]
    if adds < LARGE or left.dtype != torch.float32 or right.dtype != torch.float32:
        return False
    return (
        left.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
    )


def nonzero_rows(rows: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
    """Whether a row has any entry but zeros; NaN is one."""
    # Largest and smallest are told much faster than one comparison per entry.
    return (rows.amax(dim=1) != 0) | (rows.amin(dim=1) != 0)


def arithmetic(precision: torch.dtype | None, device: torch.device) -> Arithmetic:
    """In `precision` as `torch.autocast` does it, or, with None, as it is and as fast as it goes."""
    if precision is not None:
        return partial(torch.autocast, device.type, precision)
    linears = FrozenLinears()
    return lambda: linears


class FrozenLinears(TorchFunctionMode):
    """Linear layers whose weights are out of autograd, multiplied by `matrix_product` both ways.

    Backwards, rows without gradient are left out: in a classifier's last block nearly all are. Weights
    must not change as long as the object lives: it keeps their transposes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._transposed: dict[Tensor, Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return self._linear(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        frozen = isinstance(weight, nn.Parameter) and not weight.requires_grad
        if not frozen or inputs.ndim < 2 or not is_worth_it(inputs.flatten(0, -2), weight.T):
            return nn.functional.linear(inputs, weight, bias)
        return _FrozenLinear.apply(inputs, weight, bias, self)

    def transposed(self, weight: nn.Parameter) -> Tensor:
        """Made when a gradient first comes back to the layer: to most of a large model none does."""
        if weight not in self._transposed:
            self._transposed[weight] = weight.detach().T.contiguous()
        return self._transposed[weight]


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None, linears: FrozenLinears):
        ctx.weight, ctx.linears = weight, linears
        outputs = matrix_product(inputs.flatten(0, -2), weight.T)
        if bias is not None:
            outputs += bias
        return outputs.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        rows, weight = gradient.flatten(0, -2), ctx.linears.transposed(ctx.weight).T
        # Looking at one column is cheap, and enough to tell where looking at all is worth it.
        if rows[:, 0].count_nonzero() > len(rows) // 2:
            result = matrix_product(rows, weight)
        else:
            kept = nonzero_rows(rows).nonzero()[:, 0]
            result = rows.new_zeros(len(rows), weight.shape[1])
            result[kept] = matrix_product(rows[kept], weight)
        return result.view(*gradient.shape[:-1], -1), None, None, None
