"""How matrix products are taken: the engine's own, and the model's while the engine looks on.

On the CPU torch hands products in float32 to MKL. oneDNN, which comes with torch as well, is twice as fast
on some processors and slower on others of the same name, so both are timed once, when it first matters.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

LARGE = 2**24
"""Multiply-adds from which on a product is worth the copies that oneDNN wants."""

TIMED, ROUNDS, MUCH = (1024, 384, 1536), 8, 1.3
"""Rows, columns and rows of the two sides of the product that is timed; how often; by what to be quicker."""

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All kernels but cuDNN's: it seems to plan anew for every shape that it meets, and of blocks sorted by
length nearly each has its own (benchmarks/gpu.md: first rounds in bfloat16)."""


@dataclass(frozen=True)
class Precision:
    """The dtype of the model's and the rotations' matrix products, None for their own, summed in float32 in
    any case; and that of eigenproblems."""

    products: torch.dtype | None = None
    eigenproblems: torch.dtype = torch.float64


FULL = Precision()
PRECISIONS = {
    "full": FULL,
    "float32": Precision(eigenproblems=torch.float32),
    "bfloat16": Precision(torch.bfloat16, torch.float32),
}

Arithmetic = Callable[[], AbstractContextManager]
"""A context for each forward pass; backward passes follow it."""


def matrix_product(left: Float[Tensor, "n k"], right: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """left · right, outside autograd.

    Quickest when the rows of `left` and the columns of `right` each stand together in memory.
    """
    return _by_onednn(left, right) if is_large(left, right) and onednn_is_quicker() else left @ right


def _by_onednn(left: Tensor, right: Tensor) -> Tensor:
    return nn.functional.linear(left.to_mkldnn(), right.T.to_mkldnn()).to_dense()


def is_large(left: Float[Tensor, "n k"], right: Float[Tensor, "k m"]) -> bool:
    """Whether it may matter by which library a product is taken: on a CPU, in float32, from `LARGE` on."""
    adds = left.shape[0] * left.shape[1] * right.shape[1]
    return adds >= LARGE and left.device.type == "cpu" and left.dtype == right.dtype == torch.float32


@cache
def onednn_is_quicker() -> bool:
    """Whether oneDNN, copies included, takes products of a usual size in much less time than MKL does.

    Timed once in a process. A small gain is none: on a busy machine it might be found in one process and
    not in the next, and their results would differ in the last digits.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    left, right = torch.ones(TIMED[0], TIMED[1]), torch.ones(TIMED[2], TIMED[1]).T
    seconds = {torch.matmul: math.inf, _by_onednn: math.inf}
    for product in ROUNDS * (*seconds,):
        start = time.perf_counter()
        product(left, right)
        seconds[product] = min(seconds[product], time.perf_counter() - start)
    return MUCH * seconds[_by_onednn] < seconds[torch.matmul]


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 in float32 inside, though torch was told to round what goes into them, to TF32
    say; outside it is as it was told."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    told = [one.fp32_precision for one in backends]
    try:
        in_one_word = torch.get_float32_matmul_precision()
    except RuntimeError:  # told by backend, which torch can't put into one word, nor hear in one
        in_one_word = None
        for one in backends:
            one.fp32_precision = "ieee"
    else:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if in_one_word:
            torch.set_float32_matmul_precision(in_one_word)
        for one, precision in zip(backends, told, strict=True):
            one.fp32_precision = precision


def has_bfloat16(device: torch.device) -> bool:
    """Whether there are instructions for products in bfloat16; of anything but a CPU it is believed."""
    known = torch.cpu.get_capabilities()
    return device.type != "cpu" or any(known[name] for name in known if "bf16" in name)


@contextmanager
def on_one_thread() -> Iterator[int]:
    """Torch on a single thread; gives how many it has otherwise."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield threads
    finally:
        torch.set_num_threads(threads)


def nonzero_rows(rows: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
    """Whether a row has any entry but zeros; NaN is one."""
    # Largest and smallest are told much faster than one comparison per entry.
    return (rows.amax(dim=1) != 0) | (rows.amin(dim=1) != 0)


def arithmetic(products: torch.dtype | None, device: torch.device) -> Arithmetic:
    """In `products` as `torch.autocast` does it, or, with None, as it is and as fast as it goes."""
    linears = FrozenLinears()

    @contextmanager
    def entered() -> Iterator[None]:
        with sdpa_kernel(ATTENTION), linears if products is None else torch.autocast(device.type, products):
            yield

    return entered


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
        if not frozen or inputs.ndim < 2 or not is_large(inputs.flatten(0, -2), weight.T):
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
