"""Gradients of many examples, sent back through the model one block of examples at a time."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from support.ekfac.arithmetic import Arithmetic, arithmetic
from support.ekfac.blocks import Batch, Block, Pool, TokenMask, blocks_of, pools_of
from support.ekfac.capture import Consume, Trace, ordinary, undisturbed
from support.ekfac.errors import BlockHalved
from support.ekfac.layers import TrackedLayer
from support.ekfac.likelihood import Direction, Likelihood, loss_direction
from support.ekfac.positions import LayerGradients

Item = TypeVar("Item")

Bar = Callable[[Iterable, str, str], Iterable]
"""Wraps items in a progress bar with a description and a unit."""


class Once:
    """Lets a consumer hear of each layer once, even if its block is begun again in halves.

    What a consumer adds to its result it adds in its last step: a layer on which memory ran out has
    added nothing, and those before it are not repeated.
    """

    def __init__(self, finished: frozenset = frozenset()):
        self.finished = set(finished)

    def is_first(self, direction: int | str, name: str) -> bool:
        """Whether a layer is not finished with a direction."""
        return (direction, name) not in self.finished

    def finish(self, direction: int | str, name: str) -> None:
        """Its result is in."""
        self.finished.add((direction, name))

    def __call__(self, direction: int | str, consume: Consume) -> Consume:
        """The consumer of one direction, deaf to layers that are finished."""

        def consume_once(name: str, gradients: LayerGradients) -> None:
            if self.is_first(direction, name):
                consume(name, gradients)
                self.finish(direction, name)

        return consume_once


Work = Callable[[Block, Trace, Once], None]
"""What to do with one forward pass."""


@dataclass(frozen=True)
class Passes:
    """The model that examples are sent through, its layers, and how progress is shown.

    `precision` is the dtype of the model's matrix products, None for the model's own.
    """

    model: nn.Module
    layers: dict[str, TrackedLayer]
    bar: Bar
    precision: torch.dtype | None = None

    @property
    def token_mask(self) -> TokenMask | None:
        return getattr(self.model, "token_mask", None)

    def blocks(
        self, x: Shaped[Tensor, "batch ..."], y: Shaped[Tensor, "labels ..."] | None, what: str
    ) -> Iterable:
        """The examples of one batch in blocks. Raises `LabelsMismatch`."""
        return self.bar(blocks_of(x, y, self.token_mask), what, "batch")

    def pools(self, loader: Iterable[Batch], length: int | None, what: str) -> Iterator[Pool]:
        """The examples of a loader of `length` batches, in pools. Raises `LabelsMismatch`.

        The bar counts batches: as many of a pool as the share of its examples that went by.
        """
        ticks = itertools.count() if length is None else range(length)
        ticks = iter(self.bar(ticks, what, "batch"))
        for pool in pools_of(loader, self.token_mask):
            yield Pool(pool.batches, Ticking(pool, ticks))
        if length is not None:
            next(ticks, None)

    def over(self, blocks: Iterable, work: Work) -> None:
        """A forward pass for every block, handed to `work`.

        A block that does not fit into memory is halved and begun again, with a `BlockHalved` warning;
        a single example that does not fit raises what the model raised. Raises
        `ModelInTrainingMode`, `LayerNotSupported`, `NotFinite`, `OutputsNotSupported`.
        """
        with undisturbed(self.model):
            arithmetic = self.arithmetic()
            for block in blocks:
                self._pass_or_halve(block, work, arithmetic)

    def arithmetic(self) -> Arithmetic:
        """How the model's matrix products are taken, as long as its weights stay as they are."""
        return arithmetic(self.precision, next(iter(self.layers.values())).device)

    def _pass_or_halve(self, block: Block, work: Work, arithmetic: Arithmetic) -> None:
        waiting = [(block, Once())]
        while waiting:
            part, once = waiting.pop()
            try:
                self._pass(part, work, once, arithmetic)
            except RuntimeError as error:
                if len(part.rows) == 1 or not is_out_of_memory(error):
                    raise
                fits = False
            else:
                fits = True
            # Not while the exception is held, and with it all that the failed pass had in memory.
            if not fits:
                halves = part.halves()
                warnings.warn(
                    BlockHalved(
                        f"{len(part.rows)} examples at a time are too many for the memory; going on "
                        f"with {len(halves[0].rows)} and {len(halves[1].rows)}."
                    ),
                    stacklevel=2,
                )
                waiting += [(half, Once(frozenset(once.finished))) for half in reversed(halves)]

    def _pass(self, block: Block, work: Work, once: Once, arithmetic: Arithmetic) -> None:
        work(block, Trace(self.model, self.layers, block.inputs, arithmetic), once)


class Ticking:
    """The blocks of a pool; a step of the bar for every batch's worth of examples that went by."""

    def __init__(self, pool: Pool, ticks: Iterator):
        self.pool = pool
        self.ticks = ticks

    def __iter__(self) -> Iterator[Block]:
        gone = ticked = 0
        for block in self.pool.blocks:
            yield block
            gone += len(block.rows)
            due = gone * len(self.pool.batches) // self.pool.examples
            for _ in range(due - ticked):
                next(self.ticks, None)
            ticked = due


def labelled(
    likelihood: Likelihood,
    into: Callable[[list[int], Trace], Consume],
    direction: Direction = loss_direction,
) -> Work:
    """Gradients of the loss of each example's own label, to the consumer `into(rows, trace)`.

    Raises `LabelsMismatch`.
    """

    def work(block: Block, trace: Trace, once: Once) -> None:
        sent = direction(likelihood, in_float32(trace.outputs), ordinary(block.labels))
        trace.backward(sent, once(0, into(block.rows, trace)))

    return work


def every_label(likelihood: Likelihood, into: Callable[[list[int], Tensor], Consume]) -> Work:
    """Gradients from which those of every possible label are combined, to `into(rows, weights)`.

    The gradient of label c is Σ over the calls of weights[:, c] times what the consumer gets;
    `weights` is `(batch, classes)`. Raises `LabelsMismatch` when labels are not classes.
    """

    def work(block: Block, trace: Trace, once: Once) -> None:
        directions = likelihood.label_directions(in_float32(trace.outputs.detach()))
        for (number, (direction, weights)), more in with_more_to_come(enumerate(directions)):
            trace.backward(direction, once(number, into(block.rows, weights)), keep_graph=more)

    return work


def in_float32(outputs: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
    """The outputs in float32 at least: probabilities are worth more digits than matrix products."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def with_more_to_come(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Each item, and whether another follows: the last direction needs no graph kept behind it."""
    ahead = iter(items)
    for item in ahead:
        for following in ahead:
            yield item, True
            item = following
        yield item, False


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def length_of(loader: Iterable) -> int | None:
    """How many batches a loader says it has; None if it doesn't know."""
    try:
        return len(loader)
    except TypeError:
        return None
