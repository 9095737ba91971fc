"""The engine's one layout for what a layer saw: a row for each position that carries gradient.

Activations are `(positions, d_in)` and output gradients `(positions, d_out)`: the positions of all
examples of a block, one example after the other. `d_in` counts the 1 that is appended to the
activations of a layer with a bias, so that weight and bias are one matrix; gradients and everything
shaped like a weight are `(d_out, d_in)`. Padding has no row, and neither has a position without
gradient, which adds nothing to any gradient: in a classifier's last block that is every position but
the first. A layer fed with one vector per example has one position per example.

`activation_rows` and `layer_gradients` bring what hooks saw into this layout; nothing further in
knows another. They ask the device of all layers at once what the layout depends on: each question is an
idle moment of a GPU.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from support.ekfac.errors import LayerNotSupported, NotFinite
from support.ekfac.layers import TrackedLayer
from support.ekfac.matrix_products import matrix_product, nonzero_rows

NUMBERS_AT_A_TIME = 2**29
"""In the matrices that are there at once where several are taken in one product: 2 GB in float32."""

TokenMask = Bool[Tensor, "batch tokens"]
"""True at real tokens, False at padding."""


@dataclass(frozen=True)
class LayerGradients:
    """Gradients of a layer for a block, G_n = Σ_t g_t a_tᵀ over the positions t of example n.

    Row r belongs to token `token[r]` of example `example[r]`; each example has so many rows: `counts`.
    """

    activations: Float[Tensor, "positions d_in"]
    output_gradients: Float[Tensor, "positions d_out"]
    example: Int[Tensor, " positions"]
    token: Int[Tensor, " positions"]
    counts: list[int]

    @property
    def examples(self) -> int:
        return len(self.counts)

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
        """G_n of the examples, as many at a time as `matrices_at_a_time` says: which, and theirs."""
        sides = self.output_gradients.shape[1], self.activations.shape[1]
        size = matrices_at_a_time(self.activations.device, *sides)
        if size == 1:
            for example, activations, output_gradients in self.one_by_one():
                yield slice(example, example + 1), matrix_product(output_gradients.T, activations)[None]
            return
        for start in range(0, self.examples, size):
            part = slice(start, min(start + size, self.examples))
            yield part, (self if size >= self.examples else self.part(part)).at_once()

    def part(self, examples: slice) -> "LayerGradients":
        """Those of some examples, counted from the first of them."""
        rows = slice(sum(self.counts[: examples.start]), sum(self.counts[: examples.stop]))
        return LayerGradients(
            self.activations[rows],
            self.output_gradients[rows],
            self.example[rows] - examples.start,
            self.token[rows],
            self.counts[examples],
        )

    def at_once(self) -> Float[Tensor, "batch d_out d_in"]:
        """G_n of every example, by one product of rows that are filled up with zeros to the most an example
        has."""
        ends = self.example.new_zeros(self.examples + 1)
        ends.index_add_(0, self.example + 1, self.example.new_ones(len(self.example)))
        place = torch.arange(len(self.example), device=self.example.device)
        place -= ends.cumsum(0)[self.example]

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


def matrices_at_a_time(device: torch.device, d_out: int, d_in: int) -> int:
    """How many matrices of this shape are taken in one product: on a CPU, whose caches hold no more, one."""
    return 1 if device.type == "cpu" else max(1, NUMBERS_AT_A_TIME // (d_out * d_in))


def activation_rows(
    layer: TrackedLayer, seen: Tensor, mask: TokenMask | None, examples: int, real: Tensor | None
) -> Float[Tensor, "positions d_in"]:
    """What a hook saw as the layer's input, at all real positions, at least float32. `real` are their
    numbers, counted through the mask, None where all are.

    Raises `LayerNotSupported` when its shape is neither `(batch, d)` nor `(batch, positions, d)` with
    the mask's positions.
    """
    flat = _flat(layer, seen, mask, examples, "activations")
    return _with_bias(layer, _chosen(flat, real if seen.ndim == 3 else None))


def layer_gradients(
    layers: Mapping[str, TrackedLayer],
    seen: Mapping[str, Tensor],
    received: Mapping[str, Tensor | None],
    mask: TokenMask | None,
    examples: int,
) -> Iterator[tuple[str, LayerGradients]]:
    """The layers' inputs and the gradients of their outputs, as hooks saw them, in the engine's layout.

    None is the gradient of a layer that no gradient reached: it has no rows. Raises `LayerNotSupported` as
    `activation_rows` does, and `NotFinite`.
    """
    flat, carries = {}, {}
    for name, layer in layers.items():
        gradient = received.get(name)
        activations = _flat(layer, seen[name], mask, examples, "activations")
        if gradient is None:
            flat[name] = activations, activations.new_zeros(0, layer.d_out)
            carries[name] = activations.new_zeros(len(activations), dtype=torch.bool)
            continue
        flat[name] = activations, _flat(layer, gradient, mask, examples, "output gradients")
        carries[name] = nonzero_rows(flat[name][1])
        if mask is not None and gradient.ndim == 3:
            carries[name] &= mask.flatten()
    finite = all_finite([gradient.sum() for _, gradient in flat.values()])
    for (name, layer), (places, counts) in zip(
        layers.items(), _places(carries.values(), examples), strict=True
    ):
        activations, gradients = flat[name]
        chosen = None if len(places) == len(carries[name]) else places
        output_gradients = _chosen(gradients, chosen).to(layer.dtype)
        if not finite:
            check_finite(layer, output_gradients, "output gradients")
        tokens = max(len(carries[name]) // examples, 1)
        activations = _with_bias(layer, _chosen(activations, chosen))
        yield name, LayerGradients(activations, output_gradients, places // tokens, places % tokens, counts)


def _places(
    carries: Iterable[Bool[Tensor, " positions"]], examples: int
) -> Iterator[tuple[Int[Tensor, " rows"], list[int]]]:
    """Where each of these is true, and how often for each example: looked up on the CPU, all at once."""
    carries = list(carries)
    parts = torch.cat(carries).cpu().split([len(one) for one in carries])
    counts = [part.view(examples, len(part) // examples).sum(dim=1).tolist() for part in parts]
    places = torch.cat([part.nonzero()[:, 0] for part in parts]).to(carries[0].device, non_blocking=True)
    return zip(places.split([sum(one) for one in counts]), counts, strict=True)


def all_finite(sums: list[Tensor]) -> bool:
    """Whether all sums are finite, and so every number in them; False, too, where a sum overflows."""
    return bool(torch.stack(sums).isfinite().all())


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


def check_finite(layer: TrackedLayer, rows: Tensor, what: str) -> None:
    """Raise `NotFinite` unless all entries of some rows of a layer are finite."""
    if not is_finite(rows):
        raise NotFinite(
            f"{layer.name!r} has NaN or infinite {what}. Check the weights of the layers up to it "
            "and the inputs of this batch."
        )
