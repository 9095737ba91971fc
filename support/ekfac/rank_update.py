"""Sums of x xᵀ over many rows, half of whose entries need no computing."""

from jaxtyping import Float
from torch import Tensor

from support.ekfac.matrix_products import matrix_product

NARROW = 256
"""Up to this width a plain product is quicker than parts of it."""

ALIGNED = 16
"""Parts begin at multiples of it, where matrix products like to begin."""


def add_gram(total: Float[Tensor, "d d"], rows: Float[Tensor, "n d"]) -> None:
    """total += Σ x xᵀ over the rows, for the lower triangle at least.

    The square below the diagonal is one product, the two triangles beside it are done the same way:
    a wide total costs little more than half the multiplications. `fill_other_triangle` makes it
    symmetric, once, at the end.
    """
    # Not BLAS's ssyrk: on the CPU it has threads of its own, which wait spinning and take the
    # processor from torch's.
    _add_gram(total, rows.T.contiguous())


def _add_gram(total: Float[Tensor, "d d"], columns: Float[Tensor, "d n"]) -> None:
    width = len(total)
    if width <= NARROW:
        total.add_(matrix_product(columns, columns.T))
        return
    middle = width // 2 // ALIGNED * ALIGNED
    upper, lower = columns[:middle], columns[middle:]
    _add_gram(total[:middle, :middle], upper)
    _add_gram(total[middle:, middle:], lower)
    total[middle:, :middle].add_(matrix_product(lower, upper.T))


def fill_other_triangle(total: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The total itself, its upper triangle now the mirror of the lower one."""
    return total.tril_().add_(total.tril(-1).T)
