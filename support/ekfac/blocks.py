"""Which examples go through the model together: those of like length, as many as fit a number of
tokens, so that little of a forward pass is spent on padding.

A batch is `(inputs, labels, …)` or `(inputs, …)`. Inputs are a tensor, or a mapping of tensors with one row
for each example, as a Hugging Face collator makes it; such a mapping may be the batch and hold its
`labels`. Results don't depend on how examples are taken together. They can be told apart by length only
if a mask `(batch, tokens)` says which tokens are real; all others are taken in the order in which they come.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from support.ekfac.errors import BatchNotSupported, LabelsMismatch, LoaderShuffles

EXAMPLES_AT_A_TIME = 16
"""At most, however short: per-example gradients are as large as weights."""

TOKENS_AT_A_TIME = 1024
"""Padding included; an example that is longer goes alone."""

EXAMPLES_AHEAD = 256
"""So many examples at least are read from a loader before they are sorted by length."""

Inputs = Tensor | Mapping[str, Tensor]
TokenMask = Callable[[Inputs], Tensor | None]
"""Says which tokens are real, None when it can't."""

DRAWN = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
"""Samplers that give another order each time; others say so by `shuffle`."""

Batch = tuple[Inputs, Tensor | None]
"""Inputs, and labels where they matter."""


@dataclass(frozen=True)
class Block:
    """Examples for one forward pass. `rows` says where each stands among those it was chosen from."""

    rows: list[int]
    inputs: Inputs
    labels: Shaped[Tensor, "examples ..."] | None

    def halves(self) -> list["Block"]:
        """The same examples in two blocks."""
        middle = len(self.rows) // 2
        return [self.part(slice(middle)), self.part(slice(middle, None))]

    def part(self, part: slice) -> "Block":
        """Some of the examples."""
        labels = None if self.labels is None else self.labels[part]
        return Block(self.rows[part], of_each(self.inputs, lambda x: x[part]), labels)

    def ordinary(self) -> "Block":
        """The block outside autograd, with copies of tensors made in inference mode: it takes no such."""

        def ordinary(x: Tensor) -> Tensor:
            return x.clone() if x.is_inference() else x.detach()

        labels = None if self.labels is None else ordinary(self.labels)
        return Block(self.rows, of_each(self.inputs, ordinary), labels)


def of_each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with every tensor changed."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    return {name: change(tensor) for name, tensor in inputs.items()}


def count_of(inputs: object) -> int:
    """How many examples. Raises `BatchNotSupported` for what are no inputs."""
    inputs, _ = _read((inputs, None))
    return len(inputs) if isinstance(inputs, Tensor) else max(map(len, inputs.values()))


def unlabelled(loader: Iterable) -> Iterator[Batch]:
    """The inputs of every batch. Raises `BatchNotSupported`."""
    return ((inputs, None) for inputs, _ in map(_read, loader))


def labelled(loader: Iterable) -> Iterator[Batch]:
    """The inputs and labels of every batch. Raises `BatchNotSupported`."""
    for inputs, labels in map(_read, loader):
        if not isinstance(labels, Tensor):
            raise BatchNotSupported(
                f"A batch has {type(labels).__name__} for labels: the engine wants (inputs, labels, …) "
                "with a tensor of labels, or a mapping that holds labels. Use torch.tensor(labels)."
            )
        yield inputs, labels


class InOrder:
    """The labelled batches of a loader whose order gives rows or columns their meaning.

    Raises `LoaderShuffles` when it draws them at random, or gives others, or another order, when it
    is gone over again.
    """

    def __init__(self, loader: Iterable):
        self.loader, self._digest = loader, ""

    def __iter__(self) -> Iterator[Batch]:
        for of in (self.loader, getattr(self.loader, "batch_sampler", None)):
            sampler = getattr(of, "sampler", None)
            if not isinstance(sampler, DRAWN) and getattr(sampler, "shuffle", False) is not True:
                continue
            raise LoaderShuffles(
                f"The loader draws its examples by a {type(sampler).__name__}, so nobody could tell "
                "which score is whose. Give a DataLoader with shuffle=False: scores don't depend on "
                "the order."
            )
        found = hashlib.sha256()
        digest = ""
        for inputs, labels in labelled(self.loader):
            for part in (inputs,) if isinstance(inputs, Tensor) else inputs.values():
                found.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            digest = found.hexdigest()
            yield inputs, labels
        if digest and self._digest and digest != self._digest:
            raise LoaderShuffles(
                "The loader gave other examples, or another order, than the time before. It must give "
                "the same for every group of queries; give a DataLoader with shuffle=False, or a list."
            )
        self._digest = digest


def _read(batch: object) -> tuple[Inputs, object]:
    if isinstance(batch, Mapping):
        inputs: object = {name: part for name, part in batch.items() if name != "labels"}
        labels = batch.get("labels")
    elif isinstance(batch, tuple | list) and len(batch):
        inputs, labels = batch[0], batch[1] if len(batch) > 1 else None
    else:
        inputs, labels = None, None
    if isinstance(labels, Tensor) and _is_mask(batch):
        raise BatchNotSupported(
            "A batch looks like (input_ids, attention_mask, labels), where the engine takes the second for "
            'labels. Use a mapping: {"input_ids": …, "attention_mask": …, "labels": …}.'
        )
    parts = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    if not parts or not all(isinstance(part, Tensor) and part.ndim for part in parts):
        raise BatchNotSupported(
            f"A batch is a {type(batch).__name__}, its inputs are "
            f"{', '.join(type(part).__name__ for part in parts) or 'nothing'}: the engine wants "
            "(inputs, labels, …) with tensors, or a mapping of tensors. Use torch.as_tensor."
        )
    return inputs, labels


def _is_mask(batch: object) -> bool:
    """Whether a mask seems to stand where labels do, and labels third."""
    if isinstance(batch, Mapping) or not all(isinstance(part, Tensor) for part in batch):
        return False
    ids, mask, *others = batch
    whole = not ids.is_floating_point() and not mask.is_floating_point()
    return whole and ids.ndim == 2 and ids.shape == mask.shape and bool(others) and others[0].ndim == 1


def blocks_of(inputs: Inputs, labels: Tensor | None, token_mask: TokenMask, first: int = 0) -> list[Block]:
    """The examples of one batch, longest first, trimmed of the columns that are padding to all.

    `first` is the row of the first of them. Raises `LabelsMismatch` when there isn't one label per
    example, and `BatchNotSupported`.
    """
    refuse_other_labels(inputs, labels)
    mask = _mask(inputs, token_mask)
    if mask is None:
        rows = range(count_of(inputs))
        chosen = [(list(rows[n : n + EXAMPLES_AT_A_TIME]), None) for n in rows[::EXAMPLES_AT_A_TIME]]
    else:
        empty = (~mask.any(dim=1)).nonzero()[:, 0].tolist()
        if empty:
            raise BatchNotSupported(
                f"Row {empty[0]} of a batch is all padding, an empty text perhaps: leave it out."
            )
        # Up to where each example has real tokens.
        ends = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask
        chosen = _by_length(ends.amax(dim=1).tolist())
    return [
        Block(
            [first + row for row in rows],
            taken(inputs, mask, rows, slice(length)),
            None if labels is None else labels[rows],
        )
        for rows, length in chosen
    ]


def taken(inputs: Inputs, mask: Tensor | None, rows: list[int], columns: slice) -> Inputs:
    """Some rows of the inputs, and of what stands at their tokens some columns."""
    examples = count_of(inputs)

    def cut(x: Tensor) -> Tensor:
        if mask is not None and x.shape[:2] == mask.shape and (x.ndim > 2 or not x.is_floating_point()):
            return x[rows, columns]
        return x[rows] if len(x) == examples else x  # else it is the same for every example

    return of_each(inputs, cut)


def refuse_other_labels(inputs: Inputs, labels: object) -> None:
    """Raise `BatchNotSupported` unless labels are a tensor or nothing, `LabelsMismatch` when there isn't
    one per example."""
    _read((inputs, labels))
    if labels is None:
        return
    if not isinstance(labels, Tensor):
        raise BatchNotSupported(
            f"Labels are a {type(labels).__name__}: use torch.tensor(labels), one for each example."
        )
    if labels.ndim == 0 or count_of(inputs) != len(labels):
        labelled = len(labels) if labels.ndim else 1
        raise LabelsMismatch(f"{count_of(inputs)} examples come with {labelled} labels: one label each.")


def _mask(inputs: Inputs, token_mask: TokenMask) -> Bool[Tensor, "batch tokens"] | None:
    mask = token_mask(inputs)
    if mask is None or mask.ndim != 2 or not mask.numel():
        return None
    return mask if isinstance(inputs, Mapping) or mask.shape == inputs.shape else None


def _by_length(lengths: list[int]) -> Iterator[tuple[list[int], int]]:
    """Rows for each block, and its length. Longest first: what does not fit fails at once."""
    waiting = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while waiting:
        longest = lengths[waiting[0]]
        count = min(EXAMPLES_AT_A_TIME, max(1, TOKENS_AT_A_TIME // longest))
        yield waiting[:count], longest
        waiting = waiting[count:]


def loader_blocks(batches: Iterable[Batch], token_mask: TokenMask) -> Iterator[Block]:
    """The examples of a loader, some hundred at a time regrouped by length; rows count through it.

    Raises as `blocks_of` does.
    """
    ahead: list[Batch] = []
    waiting = first = 0
    for inputs, labels in batches:
        refuse_other_labels(inputs, labels)  # before they meet others
        ahead.append((inputs, labels))
        waiting += count_of(inputs)
        if waiting >= EXAMPLES_AHEAD or _mask(inputs, token_mask) is None:
            yield from _regrouped(ahead, token_mask, first)
            ahead, first, waiting = [], first + waiting, 0
    yield from _regrouped(ahead, token_mask, first)


def _regrouped(batches: list[Batch], token_mask: TokenMask, first: int) -> Iterator[Block]:
    merged = _merged(batches, token_mask) if len(batches) > 1 else None
    for inputs, labels in batches if merged is None else [merged]:
        yield from blocks_of(inputs, labels, token_mask, first)
        first += count_of(inputs)


def _merged(batches: list[Batch], token_mask: TokenMask) -> Batch | None:
    """All batches as one, or None when nothing says how to pad the narrower ones."""
    inputs, labels = zip(*batches, strict=True)
    masks = [_mask(x, token_mask) for x in inputs]
    if any(mask is None or isinstance(x, Mapping) for x, mask in zip(inputs, masks, strict=True)):
        return None
    if len({(x.dtype, x.device) for x in inputs}) > 1:
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
        return sum(count_of(inputs) for inputs, _ in map(_read, loader))
    return None
