"""Random numbers that belong to an example: the same in whatever block, order or process it comes."""

import hashlib
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from support.ekfac.blocks import Inputs, count_of

Draws = Callable[[int], Float[Tensor, "batch numbers"]]
"""So many numbers for each example of a block, uniform in [0, 1), float64, on the CPU."""


def drawn(seed: str, inputs: Inputs, mask: Tensor | None, numbers: int) -> Float[Tensor, "batch numbers"]:
    """Uniform numbers in [0, 1) for each example, float64, that depend on `seed` and on what the example
    is, padding apart: a batch has it in common with its neighbours."""
    parts = [inputs] if isinstance(inputs, Tensor) else [inputs[name] for name in sorted(inputs)]
    parts = [part.detach().cpu() for part in parts]
    rows = []
    for row in range(count_of(inputs)):
        found = hashlib.sha256(seed.encode())
        for part in parts:
            by_token = mask is not None and part.shape[:2] == mask.shape
            own = part[row][mask[row].cpu()] if by_token else part[row : row + 1]
            found.update(own.contiguous().flatten().view(torch.uint8).numpy())
        generator = torch.Generator().manual_seed(int.from_bytes(found.digest()[:7]))
        rows.append(torch.rand(numbers, generator=generator, dtype=torch.float64))
    return torch.stack(rows)
