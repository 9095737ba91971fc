"""Sums of x xᵀ over many rows, half of whose entries need no computing."""

from jaxtyping import Float
from torch import Tensor

NARROW = 128
"""Up to this width a plain product is quicker than parts of it."""

ALIGNED = 16
"""Parts begin at multiples of it, where matrix products like to begin."""


def add_gram(total: Float[Tensor, "d d"], rows: Float[Tensor, "n d"]) -> None:
    """total += Σ x xᵀ over the rows, for the lower triangle at least.

    The square below the diagonal is one product, the two triangles beside it are done the same way:
    a wide total costs little more than half the multiplications. `fill_other_triangle` makes it
    symmetric, once, at the end.
    """
    width = len(total)
    if width <= NARROW:
        total.addmm_(rows.T, rows)
        return
    # In products of torch, not BLAS's ssyrk: on the CPU that has threads of its own, which wait
    # spinning and take the processor from torch's.
    middle = width // 2 // ALIGNED * ALIGNED
    left, right = rows[:, :middle], rows[:, middle:]
    add_gram(total[:middle, :middle], left)
    add_gram(total[middle:, middle:], right)
    total[middle:, :middle].addmm_(right.T, left)


def fill_other_triangle(total: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The total itself, its upper triangle now the mirror of the lower one."""
    return total.tril_().add_(total.tril(-1).T)
