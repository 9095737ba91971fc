"""The engine's one layout for what a layer saw: real positions only, one row each.

Activations are `(positions, d_in)` and output gradients `(positions, d_out)`: the positions of all
examples of a batch, one example after the other. `d_in` counts the 1 that is appended to the
activations of a layer with a bias, so that weight and bias are one matrix; gradients and everything
shaped like a weight are `(d_out, d_in)`. Padding has no row, and neither has a position without
gradient, which adds nothing to any gradient: in a classifier's last block all but the first are
silent. A layer fed with one vector per example has one position per example.

`real_positions`, `activation_rows` and `layer_gradients` bring what a hook saw into this layout;
nothing further in knows another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from support.ekfac.errors import LayerNotSupported, NotFinite
from support.ekfac.layers import TrackedLayer
from support.ekfac.matrix_products import matrix_product


@dataclass(frozen=True)
class LayerGradients:
    """Gradients of a layer for a batch, G_n = Σ_t g_t a_tᵀ over the positions t of example n.

    `places` says where the rows stand, counted through the batch: row r belongs to token
    `places[r] % tokens` of example `places[r] // tokens`.
    """

    activations: Float[Tensor, "positions d_in"]
    output_gradients: Float[Tensor, "positions d_out"]
    places: Int[Tensor, " positions"]
    examples: int
    tokens: int

    @property
    def owners(self) -> Int[Tensor, " positions"]:
        """The example that each row belongs to."""
        return self.places // self.tokens

    @cached_property
    def counts(self) -> list[int]:
        """How many rows each example has."""
        return torch.bincount(self.owners, minlength=self.examples).tolist()

    @property
    def is_rank_one(self) -> bool:
        """Whether no example has more than one row, so that every G_n is one product g aᵀ."""
        return max(self.counts, default=0) <= 1

    def one_by_one(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each example with its rows of activations and of output gradients."""
        start = 0
        for example, count in enumerate(self.counts):
            rows = slice(start, start + count)
            yield example, self.activations[rows], self.output_gradients[rows]
            start += count

    def per_example(self) -> Float[Tensor, "batch d_out d_in"]:
        """G_n of every example, summed over its positions."""
        if self.is_rank_one and len(self.places) == self.examples:
            return self.output_gradients.unsqueeze(2) * self.activations.unsqueeze(1)
        shape = self.examples, self.output_gradients.shape[1], self.activations.shape[1]
        result = self.activations.new_empty(shape)
        for example, activations, output_gradients in self.one_by_one():
            result[example] = matrix_product(output_gradients.T, activations)
        return result


def real_positions(
    seen: Tensor, mask: Bool[Tensor, "batch tokens"] | None
) -> Int[Tensor, " positions"] | None:
    """Places of the real positions in a layer's input as a hook saw it; None when all are."""
    if mask is None or seen.ndim != 3 or bool(mask.all()):
        return None
    return mask.flatten().nonzero().squeeze(1)


def activation_rows(
    layer: TrackedLayer, seen: Tensor, mask: Bool[Tensor, "batch tokens"] | None, examples: int
) -> Float[Tensor, "positions d_in"]:
    """What a hook saw as the layer's input, at real positions, at least float32.

    Raises `LayerNotSupported` when its shape is neither `(batch, d)` nor `(batch, positions, d)` with
    the mask's positions, and `NotFinite`.
    """
    flat = _flat(layer, seen, mask, examples, "activations")
    rows = _rows(layer, flat, real_positions(seen, mask))
    if not is_finite(rows):
        raise _not_finite(layer, "activations")
    return rows


def layer_gradients(
    layer: TrackedLayer,
    seen: Tensor,
    gradient: Tensor,
    mask: Bool[Tensor, "batch tokens"] | None,
    examples: int,
) -> LayerGradients:
    """A layer's input and the gradient of its output, as hooks saw them, in the engine's layout.

    Raises as `activation_rows` does.
    """
    activations = _flat(layer, seen, mask, examples, "activations")
    gradients = _flat(layer, gradient, mask, examples, "output gradients")
    tokens = len(gradients) // examples
    loud = is_loud(gradients)
    if mask is not None and gradient.ndim == 3:
        loud &= mask.flatten()
    places = loud.nonzero().squeeze(1)
    chosen = None if len(places) == len(loud) else places
    output_gradients = _chosen(gradients, chosen).to(layer.dtype)
    if not is_finite(output_gradients):
        raise _not_finite(layer, "output gradients")
    rows = _rows(layer, activations, chosen)
    return LayerGradients(rows, output_gradients, places, examples, tokens)


def is_loud(rows: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
    """Whether a row has any entry but zeros. NaN is louder than nothing."""
    # Largest and smallest are told much faster than one comparison per entry.
    return (rows.amax(dim=1) != 0) | (rows.amin(dim=1) != 0)


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    # One number tells it many times faster than one per entry; only an overflowing sum needs them.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _flat(
    layer: TrackedLayer, seen: Tensor, mask: Tensor | None, examples: int, what: str
) -> Tensor:
    """`(batch · positions, d)`, padding included."""
    if seen.ndim not in (2, 3) or len(seen) != examples:
        raise LayerNotSupported(
            f"{layer.name!r} has {what} of shape {tuple(seen.shape)} for a batch of {examples}. "
            "EK-FAC covers (batch, features) and (batch, positions, features)."
        )
    if mask is not None and seen.ndim == 3 and seen.shape[:2] != mask.shape:
        raise LayerNotSupported(
            f"{layer.name!r} has {what} of shape {tuple(seen.shape)}, but the token mask has "
            f"shape {tuple(mask.shape)}. EK-FAC must know which positions are padding."
        )
    return seen.reshape(-1, seen.shape[-1])


def _rows(layer: TrackedLayer, flat: Tensor, chosen: Tensor | None) -> Tensor:
    rows = _chosen(flat, chosen)
    if not layer.has_bias:
        return rows.to(layer.dtype)
    with_one = rows.new_empty(len(rows), layer.d_in, dtype=layer.dtype)
    with_one[:, :-1] = rows
    with_one[:, -1] = 1
    return with_one


def _chosen(flat: Tensor, chosen: Tensor | None) -> Tensor:
    return flat if chosen is None else flat.index_select(0, chosen)


def _not_finite(layer: TrackedLayer, what: str) -> NotFinite:
    return NotFinite(
        f"{layer.name!r} has NaN or infinite {what}. Check the weights of the layers up to it "
        "and the inputs of this batch."
    )
