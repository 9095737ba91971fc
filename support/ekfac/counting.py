"""What the arithmetic of one layer costs, in multiply-adds, from its widths and its positions.

T is the number of positions of an example that have a gradient, N that of a batch; the counts follow
the order of operations that `curvature` and `scoring` choose for those numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from support.ekfac.layers import TrackedLayer


@dataclass(frozen=True)
class LayerWork:
    """A layer's widths, and what of its examples' positions it works on.

    `sees_positions`: it is fed with every position, not with one vector per example. `hears_positions`:
    each of them gets a gradient, not one per example.
    """

    d_out: int
    d_in: int
    sees_positions: bool
    hears_positions: bool

    def seen(self, lengths: list[int]) -> int:
        """N before the backward pass, for examples of these lengths."""
        return sum(lengths) if self.sees_positions else len(lengths)

    def heard(self, lengths: list[int]) -> int:
        """N after it."""
        return sum(lengths) if self.hears_positions else len(lengths)

    def covariances(self, lengths: list[int]) -> int:
        """Two symmetric updates: N·d(d + 1)/2 each."""
        activation = self.seen(lengths) * self.d_in * (self.d_in + 1) // 2
        return activation + self.heard(lengths) * self.d_out * (self.d_out + 1) // 2

    def eigenbasis(self) -> int:
        """About 9 d³ operations, half of them multiplications (Golub & Van Loan, §8.3)."""
        return (self.d_in**3 + self.d_out**3) * 9 // 2

    def rotations(self, lengths: list[int]) -> int:
        """d_in²·min(N, examples·d_out) and d_out²·min(N, examples·d_in): rows, or their product."""
        positions, examples = self.heard(lengths), len(lengths)
        return self.d_in**2 * min(positions, examples * self.d_out) + self.d_out**2 * min(
            positions, examples * self.d_in
        )

    def outer_products(self, lengths: list[int]) -> int:
        """N·d_out·d_in; with one position per example, the product of squares costs the same."""
        return self.heard(lengths) * self.d_out * self.d_in

    def squares(self, lengths: list[int]) -> int:
        """Corrected eigenvalues or self-influences: rotations, products, and each entry squared."""
        entries = len(lengths) * self.d_out * self.d_in if self.hears_positions else 0
        return self.rotations(lengths) + self.outer_products(lengths) + entries

    def factors(self, lengths: list[int]) -> int:
        """Rotations, products, and the way back: d_out·d_in·(d_out + d_in) per query."""
        back = len(lengths) * self.d_out * self.d_in * (self.d_out + self.d_in)
        return self.rotations(lengths) + self.outer_products(lengths) + back

    def scores(self, lengths: list[int], queries: int) -> int:
        """Against `queries` factors: d_out·d_in·(N + queries·examples), or d_out·d_in·queries·N."""
        positions = self.heard(lengths)
        return self.d_out * self.d_in * min(positions + queries * len(lengths), positions * queries)


def curvature_entries(layers: Iterable[TrackedLayer | LayerWork]) -> int:
    """Numbers that a fit leaves: two bases, Λ, and the eigenvalues of the two covariances."""
    return sum(
        layer.d_in**2 + layer.d_out**2 + layer.d_in * layer.d_out + layer.d_in + layer.d_out
        for layer in layers
    )
