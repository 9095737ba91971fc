"""How influence is spread, against sums and distances written out."""

import numpy as np
import pytest

from support.chapters.scale import cumulative_shares, distances, examples_for, nearest, word_similarities

SCORES = np.array([[4.0, -3.0, 2.0, 1.0], [0.0, 0.0, -5.0, 5.0], [1.0, 1.0, 1.0, -1.0]])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_shares_add_up_the_sizes_from_the_largest_on_whatever_their_sign_scale_or_order(scale):
    expected = [[0.4, 0.7, 0.9, 1.0], [0.5, 1.0, 1.0, 1.0], [0.25, 0.5, 0.75, 1.0]]
    np.testing.assert_allclose(cumulative_shares(SCORES), expected)
    np.testing.assert_allclose(cumulative_shares(-scale * SCORES[:, [2, 0, 3, 1]]), expected)


@pytest.mark.parametrize(("share", "needed"), [(0.3, [1, 1, 2]), (0.6, [2, 2, 3]), (0.95, [4, 2, 4])])
def test_as_many_are_needed_as_reach_the_share(share, needed):
    assert examples_for(share, SCORES).tolist() == needed
    scores = np.random.default_rng(0).normal(size=(50, 1000)).astype(np.float32)
    assert (examples_for(1.0, scores) <= 1000).all()  # whatever the rounding


def test_twins_are_nearest_each_has_the_nearest_of_the_others_and_a_pair_stands_once():
    assert nearest(np.array([[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]])).loc[0].tolist() == [0, 2, 0.0]
    scores = np.random.default_rng(0).normal(size=(5, 7))
    scores[:, 4] = scores[:, 1]
    apart, pairs = distances(scores) + np.where(np.eye(7), np.inf, 0), nearest(scores)
    assert pairs.loc[0].tolist() == [1, 4, 0.0]
    assert {*pairs["one"], *pairs["other"]} == set(range(7))
    for one, other, distance in pairs.itertuples(index=False):
        assert one < other
        assert distance == apart[one, other]
        assert distance in (apart[one].min(), apart[other].min())
    assert not pairs.duplicated(["one", "other"]).any()
    assert pairs["distance"].is_monotonic_increasing


def test_distance_is_the_difference_over_the_larger_of_the_two():
    apart = distances(np.array([[3.0, 0.0, 30.0], [4.0, 10.0, 40.0]]))
    one, other = 45**0.5 / 10, 1800**0.5 / 50
    np.testing.assert_allclose(apart, [[0, one, 0.9], [one, 0, other], [0.9, other, 0]])


def test_texts_are_as_alike_as_their_words():
    texts = ["a fine warm film", "a fine warm film", "dull plot"]
    expected = [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    np.testing.assert_allclose(word_similarities(texts), expected, atol=1e-12)


def test_a_query_that_nothing_acts_on_is_refused_by_its_number():
    with pytest.raises(ValueError, match="All influences on query 1 are zero"):
        examples_for(0.5, np.array([[1.0, 2.0], [0.0, 0.0]]))
