"""Which examples go through the model together: those of like length, as many as fit a number of
tokens, so that little of a forward pass is spent on padding.

Results don't depend on it. Examples can be told apart by length only if the model has a `token_mask`
and its inputs are `(batch, tokens)`; all others are taken in the order in which they come.
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.utils.data import DataLoader

from support.ekfac.errors import LabelsMismatch

EXAMPLES_AT_A_TIME = 16
"""At most, however short: per-example gradients are as large as weights."""

TOKENS_AT_A_TIME = 1024
"""Padding included; an example that is longer goes alone."""

EXAMPLES_AHEAD = 256
"""So many examples at least are read from a loader before they are sorted by length."""

TokenMask = Callable[[Tensor], Tensor]
Batch = tuple[Tensor, Tensor | None]
"""Inputs, and labels where they matter."""


@dataclass(frozen=True)
class Block:
    """Examples for one forward pass. `rows` says where each stands among those it was chosen from."""

    rows: list[int]
    inputs: Shaped[Tensor, "examples ..."]
    labels: Shaped[Tensor, "examples ..."] | None

    def halves(self) -> list["Block"]:
        """The same examples in two blocks."""
        middle = len(self.rows) // 2
        return [self._part(slice(middle)), self._part(slice(middle, None))]

    def ordinary(self) -> "Block":
        """The block, its tensors copied where they were made in inference mode: autograd takes no such."""
        x, y = self.inputs, self.labels
        x, y = (t.clone() if t is not None and t.is_inference() else t for t in (x, y))
        return Block(self.rows, x, y)

    def _part(self, part: slice) -> "Block":
        labels = None if self.labels is None else self.labels[part]
        return Block(self.rows[part], self.inputs[part], labels)


def blocks_of(
    inputs: Shaped[Tensor, "batch ..."],
    labels: Shaped[Tensor, "labels ..."] | None,
    token_mask: TokenMask | None,
    first: int = 0,
) -> list[Block]:
    """The examples of one batch, longest first, trimmed of the columns that are padding to all.

    `first` is the row of the first of them. Raises `LabelsMismatch` when there isn't one label per
    example.
    """
    refuse_other_labels(inputs, labels)
    mask = _mask(inputs, token_mask)
    if mask is None:
        rows = range(len(inputs))
        chosen = [
            (list(rows[n : n + EXAMPLES_AT_A_TIME]), None) for n in rows[::EXAMPLES_AT_A_TIME]
        ]
    else:
        # Up to where each example has real tokens.
        ends = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask
        chosen = _by_length(ends.amax(dim=1).clamp(min=1).tolist())
    return [
        Block(
            [first + row for row in rows],
            inputs[rows] if length is None else inputs[rows, :length],
            None if labels is None else labels[rows],
        )
        for rows, length in chosen
    ]


def refuse_other_labels(inputs: Tensor, labels: Tensor | None) -> None:
    """Raise `LabelsMismatch` when there isn't one label per example."""
    if labels is not None and len(inputs) != len(labels):
        raise LabelsMismatch(
            f"{len(inputs)} examples come with {len(labels)} labels: one label each."
        )


def _mask(inputs: Tensor, token_mask: TokenMask | None) -> Bool[Tensor, "batch tokens"] | None:
    if token_mask is None or inputs.ndim != 2 or not inputs.numel():
        return None
    mask = token_mask(inputs)
    return mask if mask.shape == inputs.shape else None


def _by_length(lengths: list[int]) -> Iterator[tuple[list[int], int]]:
    """Rows for each block, and its length. Longest first: what does not fit fails at once."""
    waiting = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while waiting:
        longest = lengths[waiting[0]]
        count = min(EXAMPLES_AT_A_TIME, max(1, TOKENS_AT_A_TIME // longest))
        yield waiting[:count], longest
        waiting = waiting[count:]


def loader_blocks(batches: Iterable[Batch], token_mask: TokenMask | None) -> Iterator[Block]:
    """The examples of a loader, some hundred at a time regrouped by length; rows count through it.

    Raises as `blocks_of` does.
    """
    ahead: list[Batch] = []
    waiting = first = 0
    for inputs, labels in batches:
        refuse_other_labels(inputs, labels)  # before they meet others
        ahead.append((inputs, labels))
        waiting += len(inputs)
        if token_mask is None or waiting >= EXAMPLES_AHEAD:
            yield from _regrouped(ahead, token_mask, first)
            ahead, first, waiting = [], first + waiting, 0
    yield from _regrouped(ahead, token_mask, first)


def _regrouped(batches: list[Batch], token_mask: TokenMask | None, first: int) -> Iterator[Block]:
    merged = _merged(batches, token_mask) if len(batches) > 1 else None
    for inputs, labels in batches if merged is None else [merged]:
        yield from blocks_of(inputs, labels, token_mask, first)
        first += len(inputs)


def _merged(batches: list[Batch], token_mask: TokenMask) -> Batch | None:
    """All batches as one, or None when nothing says how to pad the narrower ones."""
    inputs, labels = zip(*batches, strict=True)
    masks = [_mask(x, token_mask) for x in inputs]
    if any(mask is None for mask in masks) or len({(x.dtype, x.device) for x in inputs}) > 1:
        return None
    if len({None if y is None else (y.shape[1:], y.dtype) for y in labels}) > 1:
        return None
    width = max(x.shape[1] for x in inputs)
    padding = [x[~mask][0] for x, mask in zip(inputs, masks, strict=True) if not mask.all()]
    if not padding and any(x.shape[1] < width for x in inputs):
        return None
    filler = padding[0].item() if padding else 0
    wide = torch.cat([_widened(x, width, filler) for x in inputs])
    expected = torch.cat([_widened(mask, width, False) for mask in masks])
    if not torch.equal(token_mask(wide), expected):
        return None
    return wide, None if labels[0] is None else torch.cat(labels)


def _widened(x: Tensor, width: int, filler: float | int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=filler)


def number_of_examples(loader: Iterable) -> int | None:
    """How many examples a loader will give; None when only going over it would tell."""
    if isinstance(loader, DataLoader):
        if not isinstance(loader.sampler, Sized) or loader.batch_size is None:
            return None
        drawn = len(loader.sampler)
        return drawn - drawn % loader.batch_size if loader.drop_last else drawn
    if isinstance(loader, list | tuple):
        return sum(len(inputs) for inputs, *_ in loader)
    return None


def first_examples(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """The first examples of a loader, in its batches, the last one cut."""
    for inputs, labels in batches:
        if count <= 0:
            return
        yield inputs[:count], None if labels is None else labels[:count]
        count -= len(inputs)
