"""Random numbers that belong to an example: the same in whatever block, order or process it comes."""

import hashlib
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from support.ekfac.batches import Inputs, count_of

Draws = Callable[[], list[torch.Generator]]
"""A source of random numbers, where the inputs are, for each example of a block."""


def drawn(seed: str, inputs: Inputs, mask: Tensor | None) -> list[torch.Generator]:
    """A source for each example that depends on `seed` and on what the example is, padding apart: that a
    batch has in common with its neighbours."""
    parts = [inputs] if isinstance(inputs, Tensor) else [inputs[name] for name in sorted(inputs)]
    device, parts = parts[0].device, [part.detach().cpu() for part in parts]
    found = []
    for row in range(count_of(inputs)):
        digest = hashlib.sha256(seed.encode())
        for part in parts:
            by_token = mask is not None and part.shape[:2] == mask.shape
            own = part[row][mask[row].cpu()] if by_token else part[row : row + 1]
            digest.update(own.contiguous().flatten().view(torch.uint8).numpy())
        found.append(torch.Generator(device).manual_seed(int.from_bytes(digest.digest()[:7])))
    return found


def labels_of(logits: Float[Tensor, "rows classes"], source: torch.Generator) -> Int[Tensor, " rows"]:
    """A class for each row, by its softmax: the first to arrive, when each class takes a time from an
    exponential distribution with its probability for a rate.

    Rounding of the logits changes a label only where the first two arrive nearly together. Of a
    cumulative sum it would move every one of its many steps.
    """
    times = torch.empty(logits.shape, dtype=logits.dtype, device=source.device)
    times.exponential_(generator=source)
    return (logits - times.to(logits.device).log()).argmax(dim=1)
