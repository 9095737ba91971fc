"""Which examples go through the model together: those of like length, as many as fit a number of
tokens, so that little of a forward pass is spent on padding.

Results don't depend on how examples are taken together. They can be told apart by length only if a mask
`(batch, tokens)` says which tokens are real; all others are taken in the order in which they come.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from support.ekfac.batches import IGNORED, Batch, Inputs, TokenMask, count_of, of_each, refuse_other_labels
from support.ekfac.errors import BatchNotSupported


class AtATime(NamedTuple):
    """How many examples go together at most, however short, for their gradients are as large as weights; and
    how many tokens, padding included. An example that is longer goes alone."""

    examples: int
    tokens: int


ON_CPU = AtATime(16, 1024)
ON_GPU = AtATime(64, 16384)
"""Starting a product there costs more than most products."""

EXAMPLES_AHEAD = 256
"""So many examples at least are read from a loader before they are sorted by length."""

LABELS = "labels"


@dataclass(frozen=True)
class Block:
    """Examples for one forward pass. `rows` says where each stands among those it was chosen from."""

    rows: list[int]
    inputs: Inputs
    labels: Shaped[Tensor, "examples ..."] | None

    def parts(self, number: int) -> list["Block"]:
        """The same examples in so many blocks, as even as can be."""
        ends = [len(self.rows) * end // number for end in range(number + 1)]
        return [self.part(slice(*both)) for both in pairwise(ends)]

    def tokens(self, token_mask: TokenMask) -> int:
        """Of each example, padding included; 1 where neither mask nor labels say so."""
        said = token_mask(self.inputs)
        said = self.labels if said is None else said
        return said.shape[1] if said is not None and said.ndim > 1 and not said.is_floating_point() else 1

    def part(self, part: slice) -> "Block":
        """Some of the examples."""
        labels = None if self.labels is None else self.labels[part]
        return Block(self.rows[part], of_each(self.inputs, lambda x: x[part]), labels)

    def ordinary(self, device: torch.device) -> "Block":
        """The block on a device and outside autograd, with copies of tensors made in inference mode: it
        takes no such."""

        def ordinary(x: Tensor) -> Tensor:
            return (x.clone() if x.is_inference() else x.detach()).to(device)

        labels = None if self.labels is None else ordinary(self.labels)
        return Block(self.rows, of_each(self.inputs, ordinary), labels)


def blocks_of(
    inputs: Inputs, labels: Tensor | None, token_mask: TokenMask, at_a_time: AtATime = ON_CPU, first: int = 0
) -> list[Block]:
    """The examples of one batch, longest first, trimmed of the columns that are padding to all.

    `first` is the row of the first of them. Raises `LabelsMismatch` when there isn't one label per
    example, and `BatchNotSupported`.
    """
    refuse_other_labels(inputs, labels)
    mask = _mask(inputs, token_mask)
    if mask is None:
        rows, size = range(count_of(inputs)), at_a_time.examples
        chosen = [(list(rows[n : n + size]), None) for n in rows[::size]]
    else:
        empty = (~mask.any(dim=1)).nonzero()[:, 0].tolist()
        if empty:
            raise BatchNotSupported(
                f"Row {empty[0]} of a batch is all padding, an empty text perhaps: leave it out."
            )
        # Up to where each example has real tokens.
        ends = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask
        chosen = _by_length(ends.amax(dim=1).tolist(), at_a_time)
    return [
        Block(
            [first + row for row in rows],
            taken(inputs, mask, rows, slice(length)),
            None if labels is None else taken(labels, mask, rows, slice(length)),
        )
        for rows, length in chosen
    ]


def taken(inputs: Inputs, mask: Tensor | None, rows: list[int], columns: slice) -> Inputs:
    """Some rows of the inputs, and of what stands at their tokens some columns."""
    examples = count_of(inputs)

    def cut(x: Tensor) -> Tensor:
        if mask is not None and _stands_at_tokens(x, mask):
            return x[rows, columns]
        return x[rows] if len(x) == examples else x  # else it is the same for every example

    return of_each(inputs, cut)


def _mask(inputs: Inputs, token_mask: TokenMask) -> Bool[Tensor, "batch tokens"] | None:
    mask = token_mask(inputs)
    if mask is None or mask.ndim != 2 or not mask.numel():
        return None
    return mask if isinstance(inputs, Mapping) or mask.shape == inputs.shape else None


def _by_length(lengths: list[int], at_a_time: AtATime) -> Iterator[tuple[list[int], int]]:
    """Rows for each block, and its length. Longest first: what does not fit fails at once."""
    waiting = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while waiting:
        longest = lengths[waiting[0]]
        count = min(at_a_time.examples, max(1, at_a_time.tokens // longest))
        yield waiting[:count], longest
        waiting = waiting[count:]


def loader_blocks(
    batches: Iterable[Batch], token_mask: TokenMask, at_a_time: AtATime = ON_CPU
) -> Iterator[Block]:
    """The examples of a loader, some hundred at a time regrouped by length; rows count through it.

    Raises as `blocks_of` does.
    """
    first = 0
    for inputs, labels in _regrouped(batches, token_mask):
        yield from blocks_of(inputs, labels, token_mask, at_a_time, first)
        first += count_of(inputs)


def _regrouped(batches: Iterable[Batch], token_mask: TokenMask) -> Iterator[Batch]:
    """Batches of `EXAMPLES_AHEAD` examples, whatever the loader's have; these, where they can't be merged."""
    ahead: list[Batch] = []
    for batch in batches:
        refuse_other_labels(*batch)  # before they meet others
        ahead.append(batch)
        waiting = sum(count_of(inputs) for inputs, _ in ahead)
        if waiting < EXAMPLES_AHEAD and _mask(batch[0], token_mask) is not None:
            continue
        merged = _merged(ahead, token_mask)
        if merged is None:
            yield from ahead
            ahead = []
            continue
        starts = range(0, waiting - EXAMPLES_AHEAD + 1, EXAMPLES_AHEAD)
        yield from (_rows(merged, token_mask, range(one, one + EXAMPLES_AHEAD)) for one in starts)
        left = range(len(starts) * EXAMPLES_AHEAD, waiting)
        ahead = [_rows(merged, token_mask, left)] if left else []
    merged = _merged(ahead, token_mask) if ahead else None
    yield from ahead if merged is None else [merged]


def _rows(batch: Batch, token_mask: TokenMask, rows: range) -> Batch:
    inputs, labels = batch
    mask = _mask(inputs, token_mask)
    cut = (inputs,) if labels is None else (inputs, labels)
    chosen = [taken(one, mask, list(rows), slice(None)) for one in cut]
    return chosen[0], chosen[1] if len(chosen) > 1 else None


def _merged(batches: list[Batch], token_mask: TokenMask) -> Batch | None:
    """All batches as one, padded to the widest, or None when nothing says how."""
    masks = [_mask(inputs, token_mask) for inputs, _ in batches]
    if any(mask is None for mask in masks):
        return None
    if len(batches) == 1:
        return batches[0]
    by_name = [_by_name(batch) for batch in batches]
    if len({tuple(parts) for parts in by_name}) > 1:
        return None
    wide = {name: _joined(name, [parts[name] for parts in by_name], masks) for name in by_name[0]}
    if any(part is None for part in wide.values()):
        return None
    labels = wide.pop(LABELS, None)
    inputs = wide if isinstance(batches[0][0], Mapping) else wide[""]
    width = max(mask.shape[1] for mask in masks)
    expected = torch.cat([_widened(mask, width, False) for mask in masks])
    return (inputs, labels) if torch.equal(token_mask(inputs).bool(), expected) else None


def _by_name(batch: Batch) -> dict[str, Tensor]:
    """What a batch is made of; inputs that are one tensor have no name."""
    inputs, labels = batch
    parts = dict(inputs) if isinstance(inputs, Mapping) else {"": inputs}
    return parts if labels is None else parts | {LABELS: labels}


def _joined(name: str, parts: list[Tensor], masks: list[Tensor]) -> Tensor | None:
    """One part of all batches. What stands at tokens is padded as it is where there is padding already."""
    if len({(part.dtype, part.device, part.ndim) for part in parts}) > 1:
        return None
    if all(_stands_at_tokens(part, mask) for part, mask in zip(parts, masks, strict=True)):
        width = max(part.shape[1] for part in parts)
        padding = [part[~mask][0] for part, mask in zip(parts, masks, strict=True) if not mask.all()]
        if not padding and not name and any(part.shape[1] < width for part in parts):
            return None
        filler = padding[0].flatten()[0].item() if padding else IGNORED if name == LABELS else 0
        parts = [_widened(part, width, filler) for part in parts]
    elif any(len(part) != len(mask) for part, mask in zip(parts, masks, strict=True)):
        return None  # the same for every example of its batch
    return torch.cat(parts) if len({part.shape[1:] for part in parts}) == 1 else None


def _stands_at_tokens(part: Tensor, mask: Tensor) -> bool:
    return part.shape[:2] == mask.shape and (part.ndim > 2 or not part.is_floating_point())


def _widened(x: Tensor, width: int, filler: float | int) -> Tensor:
    """`(batch, width, …)`, from x with fewer columns."""
    sides = (0, 0) * (x.ndim - 2) + (0, width - x.shape[1])
    return torch.nn.functional.pad(x, sides, value=filler)
