"""The engine's shortcuts, each undone for a while: the same results the long way.

Each entry of `SHORTCUTS` is a context manager inside which the engine takes the long way.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from support.ekfac import blocks, curvature, fit, influence, matrix_products, passes, scores
from support.ekfac.blocks import AtATime
from support.ekfac.curvature import Eigenbasis
from support.ekfac.fit import EkfacCurvature
from support.ekfac.gradients import LayerGradients, layer_gradients
from support.ekfac.layers import TrackedLayer

BATCH_SIZE = 8
WHISPER = 1e-30
"""A gradient that is not zero and changes nothing."""


@contextmanager
def replaced(*replacements: tuple[object, str, object]) -> Iterator[None]:
    """Attributes `(owner, name, value)` have another value inside."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    try:
        for owner, name, value in replacements:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def in_file_order(lengths: list[int], _: AtATime) -> Iterator[tuple[list[int], int]]:
    """Rows by eights as they come, each block as long as its longest."""
    rows = list(range(len(lengths)))
    for start in range(0, len(rows), BATCH_SIZE):
        block = rows[start : start + BATCH_SIZE]
        yield block, max(lengths[row] for row in block)


def product_first(
    gradients: LayerGradients, basis: Eigenbasis
) -> Iterator[tuple[slice, Float[Tensor, "part d_out d_in"]]]:
    """Each example's Q_gᵀ G Q_a from its G."""
    for examples, products in gradients.in_parts():
        yield examples, basis.output_gradient.T @ products @ basis.activation


def carried(
    factors: Float[Tensor, "test d_out d_in"], gradients: LayerGradients
) -> Float[Tensor, "test batch"]:
    """⟨factors, G⟩ by carrying every row of activations through every factor."""
    by_row = (factors @ gradients.activations.T * gradients.output_gradients.T).sum(dim=1)
    result = by_row.new_zeros(len(factors), gradients.examples)
    return result.index_add_(1, gradients.example, by_row)


def with_every_position(
    layers: Mapping[str, TrackedLayer],
    seen: Mapping[str, Tensor],
    received: Mapping[str, Tensor | None],
    mask: Bool[Tensor, "batch tokens"] | None,
    examples: int,
) -> Iterator[tuple[str, LayerGradients]]:
    """A row for every real position."""
    received = {name: not_zero(gradient) for name, gradient in received.items()}
    return layer_gradients(layers, seen, received, mask, examples)


def with_padding(
    layers: Mapping[str, TrackedLayer],
    seen: Mapping[str, Tensor],
    received: Mapping[str, Tensor | None],
    mask: Bool[Tensor, "batch tokens"] | None,
    examples: int,
) -> Iterator[tuple[str, LayerGradients]]:
    """A row for every position."""
    return with_every_position(layers, seen, received, None, examples)


def not_zero(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else torch.where(gradient == 0, WHISPER, gradient)


def with_torchs_products() -> AbstractContextManager:
    # Too large for any product to be large enough.
    return replaced((matrix_products, "LARGE", float("inf")))


def unsorted() -> AbstractContextManager:
    return replaced((blocks, "_by_length", in_file_order))


def products_rotated() -> AbstractContextManager:
    modules = curvature, scores, influence
    return replaced(*((module, "rotated_in_parts", product_first) for module in modules))


def factors_carried() -> AbstractContextManager:
    return replaced((influence, "products", carried))


def full_rank() -> AbstractContextManager:
    return replaced((LayerGradients, "is_rank_one", False))


def all_kept() -> AbstractContextManager:
    return replaced((passes, "layer_gradients", with_every_position))


def whole_gram(total: Float[Tensor, "d d"], rows: Float[Tensor, "n d"]) -> None:
    """total += Σ x xᵀ over the rows, above and below the diagonal."""
    columns = rows.T.contiguous()
    total.add_(matrix_products.matrix_product(columns, columns.T))


def both_sides_multiplied() -> AbstractContextManager:
    return replaced((fit, "add_gram", whole_gram))


def one_eigenproblem_at_a_time() -> AbstractContextManager:
    def bases(sums: fit.CovarianceSums, names: list[str]) -> Iterator[tuple[str, Eigenbasis]]:
        return ((name, sums.basis(name)) for name in names)

    return replaced((fit.CovarianceSums, "bases", bases))


def passed_twice() -> AbstractContextManager:
    return replaced((EkfacCurvature, "room_to_keep", lambda engine: 0))


@contextmanager
def everything() -> Iterator[None]:
    """No shortcut at all: unsorted batches, padding included."""
    with ExitStack() as stack:
        undos = (
            with_torchs_products,
            unsorted,
            products_rotated,
            full_rank,
            both_sides_multiplied,
            one_eigenproblem_at_a_time,
            passed_twice,
        )
        for undo in undos:
            stack.enter_context(undo())
        stack.enter_context(replaced((passes, "layer_gradients", with_padding)))
        yield


FIT, SCORE, SELF = "fit", "score", "self-influence"

SHORTCUTS: dict[str, tuple[Callable[[], AbstractContextManager], tuple[str, ...]]] = {
    "large products by the quicker library, rows without gradient left out backwards": (
        with_torchs_products,
        (FIT, SCORE, SELF),
    ),
    "blocks sorted by length, not batches of 8 in file order": (unsorted, (FIT, SCORE, SELF)),
    "rows rotated where that is cheaper than products": (products_rotated, (FIT, SCORE, SELF)),
    "gradients compared with factors, not carried through them": (factors_carried, (SCORE,)),
    "positions without gradient left out": (all_kept, (FIT, SCORE, SELF)),
    "one position per example done without its product": (full_rank, (FIT, SELF)),
    "covariances multiplied above the diagonal alone": (both_sides_multiplied, (FIT,)),
    "eigenproblems of several layers at once": (one_eigenproblem_at_a_time, (FIT,)),
    "what a fit saw kept, and not asked of the model twice": (passed_twice, (FIT,)),
    "all of these": (everything, (FIT, SCORE, SELF)),
}
"""What is saved → how to undo it, and the jobs it matters to."""
