"""Dealing loses nothing, repeats nothing, and gives no hand much more than it must."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.job.fit import deal
from support.job.store import in_blocks

SIZES = st.lists(st.integers(0, 50), max_size=40)
HANDS = st.integers(1, 7)


def weights(sizes, hands):
    return [sum(sizes[piece] for piece in hand) for hand in hands]


def lightest_possible(sizes, hands):
    """The heaviest hand of the best of all ways to deal."""
    return min(
        max(np.bincount(owners, weights=sizes, minlength=hands))
        for owners in product(range(hands), repeat=len(sizes))
    )


@given(SIZES, HANDS)
def test_every_piece_is_dealt_once_and_each_hand_ascends(sizes, hands):
    dealt = deal(sizes, hands)
    assert len(dealt) == hands
    assert sorted(piece for hand in dealt for piece in hand) == list(range(len(sizes)))
    assert all(hand == sorted(hand) for hand in dealt)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 3))
def test_no_hand_has_more_than_four_thirds_of_the_best_possible(sizes, hands):
    heaviest = max(weights(sizes, deal(sizes, hands)))
    assert 3 * heaviest <= 4 * lightest_possible(sizes, hands)


@given(SIZES, HANDS)
def test_two_hands_differ_by_one_piece_at_most(sizes, hands):
    dealt = weights(sizes, deal(sizes, hands))
    assert max(dealt) - min(dealt) <= max(sizes, default=0)


def test_the_largest_piece_goes_first_to_the_lightest_hand():
    assert deal([2, 5, 3, 3], 2) == [[0, 1], [2, 3]]
    assert deal([4], 3) == [[0], [], []]


@pytest.mark.parametrize(
    ("examples", "size", "blocks"),
    [
        (7, 3, [range(0, 3), range(3, 6), range(6, 7)]),
        (6, 3, [range(0, 3), range(3, 6)]),
        (2, 5, [range(0, 2)]),
        (0, 5, []),
    ],
)
def test_only_the_last_block_may_be_shorter(examples, size, blocks):
    assert in_blocks(examples, size) == blocks
