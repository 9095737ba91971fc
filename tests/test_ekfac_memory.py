"""A budget of memory decides how many queries are scored together, and nothing else."""

import pytest
import torch

from support.ekfac import EkfacInfluence
from support.ekfac.blocks import Block
from support.ekfac.errors import BadSetting, EmptyLoader
from support.ekfac.influence import NORMALISATIONS
from support.ekfac.layers import tracked_layers
from support.ekfac.memory import factor_bytes, in_groups, queries_at_a_time
from tests.dense import labels, sentences, token_classifier

X, Y = sentences(5, 3, 4, 2, 5), labels(5)
QUERIES, QUERY_LABELS = sentences(3, 5, 4, 2, seed=1), labels(4, seed=1)
LOADER = [(QUERIES[:3], QUERY_LABELS[:3]), (QUERIES[3:], QUERY_LABELS[3:])]
ONE_QUERY = factor_bytes(tracked_layers(token_classifier()))


def fitted(budget=None):
    engine = EkfacInfluence(token_classifier(), hessian_regularization=1e-3, memory_budget=budget)
    return engine.fit([(X,)])


def test_the_factors_of_a_query_are_as_large_as_the_weights():
    weights = sum(p.numel() for p in token_classifier().parameters() if p.requires_grad)
    assert 8 * weights == ONE_QUERY
    factors = fitted().influence_factors(QUERIES[:1], QUERY_LABELS[:1])
    assert sum(factor.nbytes for factor in factors.values()) == ONE_QUERY


@pytest.mark.parametrize(("budget", "queries"), [(1, 1), (2, 2), (2.9, 2), (0.1, 1)])
def test_as_many_queries_at_a_time_as_fit_and_one_at_least(budget, queries):
    layers = tracked_layers(token_classifier())
    assert queries_at_a_time(layers, int(budget * ONE_QUERY)) == queries


def test_without_a_budget_a_share_of_the_free_memory_is_taken(monkeypatch):
    monkeypatch.setattr("support.ekfac.memory.free_memory", lambda device: 12 * ONE_QUERY)
    assert queries_at_a_time(tracked_layers(token_classifier()), None) == 3


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_groups_hold_all_queries_in_order(size):
    blocks = [Block([2, 0, 1], QUERIES[[2, 0, 1]], QUERY_LABELS[[2, 0, 1]]), Block([3], QUERIES[3:], None)]
    groups = list(in_groups(blocks, size))
    rows = [[row for block in group for row in block.rows] for group in groups]
    assert [row for group in rows for row in group] == [2, 0, 1, 3]
    assert {len(group) for group in rows[:-1]} <= {size}
    for group in groups:
        for block in group:
            torch.testing.assert_close(block.inputs, QUERIES[block.rows])


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("queries", [1, 2.0, 3])
def test_query_blocks_give_what_one_block_gives(queries, normalisation):
    found = fitted(queries * ONE_QUERY).score(LOADER, [(X, Y)], normalisation)
    expected = fitted().score(LOADER, [(X, Y)], normalisation)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_training_examples_that_come_only_once_are_refused_when_they_are_needed_again():
    engine = fitted(ONE_QUERY)
    with pytest.raises(EmptyLoader, match="again for every group of queries"):
        engine.score(LOADER, (batch for batch in [(X, Y)]))


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_that_is_no_number_of_bytes_is_refused(budget):
    with pytest.raises(BadSetting, match=f"memory_budget={budget}.*above zero"):
        fitted(budget)
