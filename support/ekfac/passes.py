"""Loss gradients of many examples, sent back through the model a few examples at a time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from jaxtyping import Shaped
from torch import Tensor, nn

from support.ekfac.capture import Consume, Trace, ordinary, undisturbed
from support.ekfac.errors import LabelsMismatch
from support.ekfac.layers import TrackedLayer
from support.ekfac.likelihood import Likelihood, loss_direction

Item = TypeVar("Item")

Bar = Callable[[Iterable, str, str], Iterable]
"""Wraps items in a progress bar with a description and a unit."""

EXAMPLES_AT_A_TIME = 8


@dataclass(frozen=True)
class LossGradients:
    """The model whose gradients are wanted, its layers, and the loss.

    Both methods call `into` once per block of examples, or per block and direction; it returns the
    consumer of that block's backward pass. Both raise `ModelInTrainingMode`, `LabelsMismatch`,
    `LayerNotSupported` and `NotFinite`.
    """

    model: nn.Module
    layers: dict[str, TrackedLayer]
    likelihood: Likelihood
    bar: Bar

    def of_labels(
        self,
        x: Shaped[Tensor, "batch ..."],
        y: Shaped[Tensor, "labels ..."],
        into: Callable[[list[int], Trace], Consume],
        description: str,
    ) -> None:
        """Gradients of the loss of each example's own label: `into(rows, trace)`."""
        if len(x) != len(y):
            raise LabelsMismatch(f"{len(x)} examples come with {len(y)} labels: one label each.")
        with undisturbed(self.model):
            for rows, trace in self._traces(x, description):
                direction = loss_direction(self.likelihood, trace.outputs, ordinary(y[rows]))
                trace.backward(direction, into(rows, trace))
                del trace  # before the next block, not after it

    def of_every_label(
        self,
        x: Shaped[Tensor, "batch ..."],
        into: Callable[[list[int], Tensor], Consume],
        description: str,
    ) -> None:
        """Gradients from which those of every possible label are combined: `into(rows, weights)`.

        The gradient of label c is Σ over the calls of weights[:, c] times what the consumer gets;
        `weights` is `(batch, classes)`.
        """
        with undisturbed(self.model):
            for rows, trace in self._traces(x, description):
                directions = self.likelihood.label_directions(trace.outputs.detach())
                for (direction, weights), more in with_more_to_come(directions):
                    trace.backward(direction, into(rows, weights), keep_graph=more)
                del trace

    def _traces(self, x: Tensor, description: str) -> Iterable[tuple[list[int], Trace]]:
        starts = range(0, len(x), EXAMPLES_AT_A_TIME)
        for start in self.bar(starts, description, "batch"):
            rows = list(range(start, min(start + EXAMPLES_AT_A_TIME, len(x))))
            yield rows, Trace(self.model, self.layers, x[rows])


def with_more_to_come(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Each item, and whether another follows: the last direction needs no graph kept behind it."""
    ahead = iter(items)
    for item in ahead:
        for following in ahead:
            yield item, True
            item = following
        yield item, False
