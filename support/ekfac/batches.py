"""What a loader gives: batches of examples, with labels where they matter.

A batch is `(inputs, labels, …)` or `(inputs, …)`. Inputs are a tensor, or a mapping of tensors with one row
for each example, as a Hugging Face collator makes it; such a mapping may be the batch and hold its
`labels`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from support.ekfac.errors import BatchNotSupported, LabelsMismatch, LoaderShuffles

Inputs = Tensor | Mapping[str, Tensor]
Labels = Shaped[Tensor, "..."]
"""As the likelihood takes them."""

TokenMask = Callable[[Inputs], Tensor | None]
"""Says which tokens are real, None when it can't."""

IGNORED = -100
"""The label of a position where nothing is asked, as Hugging Face has it."""

DRAWN = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
"""Samplers that give another order each time; others say so by `shuffle`."""

Batch = tuple[Inputs, Tensor | None]
"""Inputs, and labels where they matter."""


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


def as_found(loader: Iterable) -> Iterator[Batch]:
    """The inputs of every batch, and labels if they are tensors. Raises `BatchNotSupported`."""
    return ((inputs, labels if isinstance(labels, Tensor) else None) for inputs, labels in map(_read, loader))


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
                "the same for every group of queries or layers; give a DataLoader with shuffle=False, or a "
                "list."
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
