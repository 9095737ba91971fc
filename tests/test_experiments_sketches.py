"""Every way to keep little of a whitened gradient estimates the same influences."""

import pandas as pd
import pytest
import torch

from experiments.sketches import SIZES, TABLE, Projections, estimates, folded, sorted_entries
from support.ekfac import EkfacIndex, EkfacInfluence
from tests.dense import assert_same, labels, perceptron, vectors

TRAIN, ASKED = [(vectors(5, 3), labels(5))], [(vectors(4, 3, seed=1), labels(4, seed=1))]


@pytest.fixture
def engine():
    return EkfacInfluence(perceptron(3, 4, 2).double()).fit(TRAIN)


def test_projections_of_the_whitened_gradient_estimate_influences_without_bias(engine):
    expected, signs, sides = engine.score(ASKED, TRAIN), 0, 0
    for seed in range(150):
        projections = Projections(engine, seed)
        (asked, theirs), (train, ours) = projections.of(ASKED, 4), projections.of(TRAIN, 5)
        signs = signs + folded(asked, 8) @ folded(train, 8).T / 150
        width = len(next(iter(ours.values()))[0])
        for name in engine.layers:
            sides = sides + theirs[name].flatten(1) @ ours[name].flatten(1).T / width**2 / 150
    for mean in (signs, sides):
        assert (mean - expected).norm() < 0.2 * expected.norm()


def test_with_room_for_every_entry_every_way_but_a_projection_is_exact(engine):
    expected = engine.score(ASKED, TRAIN)
    for sketch, numbers, _, scores in estimates(engine, TRAIN, ASKED):
        if numbers == SIZES[-1] and "entries" in sketch:
            torch.testing.assert_close(scores, expected, rtol=0, atol=2e-2 * expected.abs().max().item())


def test_entries_come_by_what_is_expected_of_them(engine):
    index = EkfacIndex(engine, 12)
    order, places = sorted_entries(index)
    shares = torch.stack([index._expected(name).flatten()[place] for name, place in places])
    assert_same(shares, shares.sort(descending=True).values)
    smaller = EkfacIndex(engine, 5).sketched(TRAIN).sort().values
    assert_same(index.sketched(TRAIN)[:, order][:, :5].sort().values, smaller)


def test_a_byte_an_entry_is_as_good_as_two_and_a_sample_tells_the_error():
    table = pd.read_csv(TABLE)
    keys = ["experiment", "numbers"]
    one, two = (table[table["sketch"] == f"entries, {kind}"].set_index(keys) for kind in ("int8", "float16"))
    assert (one["report"] - two["report"]).abs().max() < 0.001
    entries = table[table["sketch"] != "none"]
    assert entries["sampled"].between(0.8, 1.2).all()
