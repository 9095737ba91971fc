"""Work of different size for several processes."""

from collections.abc import Sequence

import numpy as np


def deal(sizes: Sequence[int | float] | np.ndarray, hands: int) -> list[list[int]]:
    """Numbers of the pieces for each hand, ascending: the largest piece first, to the lightest hand.

    No hand gets more than 4/3 of the best possible (Graham 1969), usually it is a few percent.
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    weights = [0.0] * hands
    for piece in sorted(range(len(sizes)), key=lambda piece: (-sizes[piece], piece)):
        lightest = min(range(hands), key=lambda hand: (weights[hand], hand))
        dealt[lightest].append(piece)
        weights[lightest] += float(sizes[piece])
    return [sorted(hand) for hand in dealt]


def in_blocks(examples: int, size: int) -> list[range]:
    """0 … examples − 1 in ranges of `size`, the last one maybe shorter."""
    return [range(start, min(start + size, examples)) for start in range(0, examples, size)]
