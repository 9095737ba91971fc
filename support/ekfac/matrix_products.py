"""Products of large matrices by the library that is quickest at them here.

On the CPU torch hands products in float32 to MKL, which leaves half of an AMD processor's AVX-512 unused.
oneDNN, which comes with torch as well, uses it; there it is twice as fast, and elsewhere no slower.
"""

import torch
from jaxtyping import Float
from torch import Tensor

LARGE = 2**24
"""Multiply-adds from which on a product is worth the copies that oneDNN wants."""


def matrix_product(left: Float[Tensor, "n k"], right: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """left · right, outside autograd.

    Quickest when the rows of `left` and the columns of `right` each stand together in memory.
    """
    if not is_worth_it(left, right):
        return left @ right
    return torch.nn.functional.linear(left.to_mkldnn(), right.T.to_mkldnn()).to_dense()


def is_worth_it(left: Float[Tensor, "n k"], right: Float[Tensor, "k m"]) -> bool:
    """Whether `matrix_product` goes another way than torch."""
    adds = left.shape[0] * left.shape[1] * right.shape[1]
    if adds < LARGE or left.dtype != torch.float32 or right.dtype != torch.float32:
        return False
    return _onednn_is_wider(left.device)


def _onednn_is_wider(device: torch.device) -> bool:
    return (
        device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
    )
