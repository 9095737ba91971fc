"""How much memory curvature and factors take, and how many queries and layers that allows at a time."""

import math
import re
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from support.ekfac.blocks import Block
from support.ekfac.errors import BadSetting
from support.ekfac.layers import TrackedLayer

SHARE_OF_FREE_MEMORY = 0.25
"""The rest is for the graph of a forward pass, for the caller, and for a wrong guess."""

SHARE_FOR_A_FIT = 0.75
"""What a fit makes stays, so there is less to be careful about."""

OUTPUTS_AT_A_TIME = 2**25
"""Numbers that a layer may give for a block: logits over a vocabulary are larger than all else, and a pass
holds them three times over."""


def check_budget(budget: int | float | None) -> None:
    """Raise `BadSetting` unless it is a number of bytes above zero, or None."""
    if budget is not None and budget <= 0:
        raise BadSetting(
            f"memory_budget={budget!r}: use a number of bytes above zero, or None for "
            f"{SHARE_OF_FREE_MEMORY} of the memory that is free ({SHARE_FOR_A_FIT} for a fit)."
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had where the layers live."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def most_held(device: torch.device) -> int:
    """Bytes that this process has held at most so far, where the layers live."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status")
    # What `getrusage` says begins with what the parent held.
    if status.exists() and (peak := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return 1024 * int(peak[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def factor_bytes(layers: dict[str, TrackedLayer], rank: int | None = None) -> int:
    """What the influence factors of one example take, whole or at low rank."""
    numbers = 0
    for layer in layers.values():
        low = layer.d_out * layer.d_in if rank is None else min(rank, layer.d_out, layer.d_in)
        numbers += low if rank is None else low * (layer.d_out + layer.d_in)
    return numbers * next(iter(layers.values())).dtype.itemsize


def curvature_bytes(layers: dict[str, TrackedLayer]) -> int:
    """What a fit leaves: two bases, Λ, and the eigenvalues of the two covariances of every layer."""
    return sum(
        layer.dtype.itemsize
        * (layer.d_in**2 + layer.d_out**2 + layer.d_in * layer.d_out + layer.d_in + layer.d_out)
        for layer in layers.values()
    )


def parts_that_fit(examples: int, tokens: int, outputs: int) -> int:
    """In how many parts a block of such examples goes through layers with so many `outputs` for each of
    their `tokens`; an example that is larger goes alone."""
    return max(1, min(examples, math.ceil(examples * tokens * outputs / OUTPUTS_AT_A_TIME)))


def queries_at_a_time(
    layers: dict[str, TrackedLayer], budget: int | float | None, rank: int | None = None
) -> int:
    """How many examples' factors fit the budget; one at least."""
    return max(1, int(room_for(layers, budget) // factor_bytes(layers, rank)))


def room_for(
    layers: dict[str, TrackedLayer], budget: int | float | None, share: float = SHARE_OF_FREE_MEMORY
) -> int | float:
    """Bytes that may be taken where the layers live: the budget, or else a share of those that are free."""
    return int(share * free_memory(next(iter(layers.values())).device)) if budget is None else budget


def layer_groups(
    layers: dict[str, TrackedLayer], room: int | float, taken: Callable[[dict[str, TrackedLayer]], int]
) -> list[dict[str, TrackedLayer]]:
    """The layers, from input to output, cut wherever one more would take more bytes than there is room for;
    one layer at least goes into each group."""
    groups: list[dict[str, TrackedLayer]] = [{}]
    for name, layer in layers.items():
        if groups[-1] and taken(groups[-1] | {name: layer}) > room:
            groups.append({})
        groups[-1][name] = layer
    return groups


def in_groups(blocks: Iterable[Block], size: int) -> Iterator[tuple[list[Block], list[int]]]:
    """The blocks in lists of `size` examples, cut where a list is full; the last may have fewer. The
    examples of each list are numbered through, and the rows that they stood in are told beside it."""
    group: list[Block] = []
    rows: list[int] = []
    for block in blocks:
        while block.rows:
            own = block.part(slice(size - len(rows)))
            block = block.part(slice(size - len(rows), None))
            group.append(replace(own, rows=list(range(len(rows), len(rows) + len(own.rows)))))
            rows += own.rows
            if len(rows) == size:
                yield group, rows
                group, rows = [], []
    if group:
        yield group, rows
