"""How the model's own matrix products are taken while the engine looks on."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from support.ekfac.matrix_products import is_worth_it, matrix_product
from support.ekfac.positions import is_loud

Arithmetic = Callable[[], AbstractContextManager]
"""A context for each forward pass; backward passes follow it."""


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
        if weight not in self._transposed:
            self._transposed[weight] = weight.detach().T.contiguous()
        return _FrozenLinear.apply(inputs, weight, bias, self._transposed[weight])


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None, transposed: Tensor):
        ctx.transposed = transposed
        outputs = matrix_product(inputs.flatten(0, -2), weight.T)
        if bias is not None:
            outputs += bias
        return outputs.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        rows, weight = gradient.flatten(0, -2), ctx.transposed.T
        # Looking at one column is cheap, and enough to tell where looking at all is worth it.
        if rows[:, 0].count_nonzero() > len(rows) // 2:
            result = matrix_product(rows, weight)
        else:
            loud = is_loud(rows).nonzero()[:, 0]
            result = rows.new_zeros(len(rows), weight.shape[1])
            result[loud] = matrix_product(rows[loud], weight)
        return result.view(*gradient.shape[:-1], -1), None, None, None
