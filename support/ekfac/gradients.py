"""The engine's one layout for what a layer saw: a row for each position that carries gradient.

Activations are `(positions, d_in)` and output gradients `(positions, d_out)`: the positions of all
examples of a block, one example after the other. `d_in` counts the 1 that is appended to the
activations of a layer with a bias, so that weight and bias are one matrix; gradients and everything
shaped like a weight are `(d_out, d_in)`. Padding has no row, and neither has a position without
gradient, which adds nothing to any gradient: in a classifier's last block that is every position but
the first. A layer fed with one vector per example has one position per example.

`activation_rows` and `layer_gradients` bring what a hook saw into this layout; nothing further in
knows another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from support.ekfac.errors import LayerNotSupported, NotFinite
from support.ekfac.layers import TrackedLayer
from support.ekfac.matrix_products import matrix_product, nonzero_rows

NUMBERS_AT_A_TIME = 2**29
"""In the gradients that are there at once where `in_parts` takes several examples: 2 GB in float32."""

TokenMask = Bool[Tensor, "batch tokens"]
"""True at real tokens, False at padding."""


@dataclass(frozen=True)
class LayerGradients:
    """Gradients of a layer for a block, G_n = Σ_t g_t a_tᵀ over the positions t of example n.

    Row r belongs to token `token[r]` of example `example[r]`, of so many `examples`.
    """

    activations: Float[Tensor, "positions d_in"]
    output_gradients: Float[Tensor, "positions d_out"]
    example: Int[Tensor, " positions"]
    token: Int[Tensor, " positions"]
    examples: int

    @cached_property
    def counts(self) -> list[int]:
        """How many rows each example has."""
        return torch.bincount(self.example, minlength=self.examples).tolist()

    @property
    def is_rank_one(self) -> bool:
        """Whether no example has more than one row, so that every G_n is one product g aᵀ."""
        return max(self.counts, default=0) <= 1

    @property
    def nbytes(self) -> int:
        """What the rows take."""
        return self.activations.nbytes + self.output_gradients.nbytes

    def one_by_one(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each example with its rows of activations and of output gradients."""
        start = 0
        for example, count in enumerate(self.counts):
            rows = slice(start, start + count)
            yield example, self.activations[rows], self.output_gradients[rows]
            start += count

    def in_parts(self) -> Iterator[tuple[slice, Float[Tensor, "part d_out d_in"]]]:
        """G_n of the examples, some at a time: which, and theirs. On a CPU, whose caches hold no more than
        one, that is each for itself; elsewhere as many as there is room for, in one product."""
        if self.activations.device.type == "cpu":
            for example, activations, output_gradients in self.one_by_one():
                yield slice(example, example + 1), matrix_product(output_gradients.T, activations)[None]
            return
        size = max(1, NUMBERS_AT_A_TIME // (self.output_gradients.shape[1] * self.activations.shape[1]))
        for start in range(0, self.examples, size):
            part = slice(start, min(start + size, self.examples))
            yield part, self.part(part).at_once()

    def part(self, examples: slice) -> "LayerGradients":
        """Those of some examples, counted from the first of them."""
        rows = slice(sum(self.counts[: examples.start]), sum(self.counts[: examples.stop]))
        return LayerGradients(
            self.activations[rows],
            self.output_gradients[rows],
            self.example[rows] - examples.start,
            self.token[rows],
            examples.stop - examples.start,
        )

    def at_once(self) -> Float[Tensor, "batch d_out d_in"]:
        """G_n of every example, by one product of rows that are filled up with zeros to the most an example
        has."""
        counts = torch.bincount(self.example, minlength=self.examples)
        place = torch.arange(len(self.example), device=self.example.device)
        place -= (counts.cumsum(0) - counts)[self.example]

        def side_by_side(rows: Tensor) -> Tensor:
            filled = rows.new_zeros(self.examples, max(self.counts, default=0), rows.shape[1])
            filled[self.example, place] = rows
            return filled

        return side_by_side(self.output_gradients).mT @ side_by_side(self.activations)

    def per_example(self) -> Float[Tensor, "batch d_out d_in"]:
        """G_n of every example, summed over its positions."""
        if self.is_rank_one and len(self.example) == self.examples:
            return self.output_gradients.unsqueeze(2) * self.activations.unsqueeze(1)
        shape = self.examples, self.output_gradients.shape[1], self.activations.shape[1]
        result = self.activations.new_empty(shape)
        for examples, products in self.in_parts():
            result[examples] = products
        return result


def activation_rows(
    layer: TrackedLayer, seen: Tensor, mask: TokenMask | None, examples: int
) -> Float[Tensor, "positions d_in"]:
    """What a hook saw as the layer's input, at all real positions, at least float32.

    Raises `LayerNotSupported` when its shape is neither `(batch, d)` nor `(batch, positions, d)` with
    the mask's positions, and `NotFinite`.
    """
    flat = _flat(layer, seen, mask, examples, "activations")
    real = None
    if mask is not None and seen.ndim == 3 and not mask.all():
        real = mask.flatten().nonzero().squeeze(1)
    rows = _with_bias(layer, _chosen(flat, real))
    if not is_finite(rows):
        raise _not_finite(layer, "activations")
    return rows


def layer_gradients(
    layer: TrackedLayer, seen: Tensor, gradient: Tensor | None, mask: TokenMask | None, examples: int
) -> LayerGradients:
    """A layer's input and the gradient of its output, as hooks saw them, in the engine's layout.

    None is the gradient of a layer that no gradient reached: it has no rows. Raises as
    `activation_rows` does.
    """
    if gradient is None:
        gradient = seen.new_zeros(*seen.shape[:-1], layer.d_out)
    activations = _flat(layer, seen, mask, examples, "activations")
    gradients = _flat(layer, gradient, mask, examples, "output gradients")
    carries = nonzero_rows(gradients)
    if mask is not None and gradient.ndim == 3:
        carries &= mask.flatten()
    places = carries.nonzero().squeeze(1)
    chosen = None if len(places) == len(carries) else places
    output_gradients = _chosen(gradients, chosen).to(layer.dtype)
    if not is_finite(output_gradients):
        raise _not_finite(layer, "output gradients")
    tokens = max(len(gradients) // examples, 1)
    return LayerGradients(
        _with_bias(layer, _chosen(activations, chosen)),
        output_gradients,
        places // tokens,
        places % tokens,
        examples,
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    # One number tells it many times faster than one per entry; only an overflowing sum needs them.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _flat(layer: TrackedLayer, seen: Tensor, mask: Tensor | None, examples: int, what: str) -> Tensor:
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


def _with_bias(layer: TrackedLayer, rows: Tensor) -> Tensor:
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
