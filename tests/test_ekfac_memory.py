"""A budget of memory decides how many queries are scored together, and nothing else."""

import weakref

import pytest
import torch

from support.ekfac import EkfacInfluence, memory
from support.ekfac.blocks import Block
from support.ekfac.errors import BadSetting, EmptyLoader
from support.ekfac.influence import NORMALISATIONS
from support.ekfac.layers import tracked_layers, widest_outputs
from support.ekfac.likelihood import loss_directions
from support.ekfac.memory import factor_bytes, in_groups, parts_that_fit, queries_at_a_time
from support.ekfac.passes import Passes
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
    assert [row for _, rows in groups for row in rows] == [2, 0, 1, 3]
    assert {len(rows) for _, rows in groups[:-1]} <= {size}
    for group, rows in groups:
        assert [place for block in group for place in block.rows] == list(range(len(rows)))
        for block in group:
            torch.testing.assert_close(block.inputs, QUERIES[[rows[place] for place in block.rows]])


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


@pytest.mark.parametrize(
    ("examples", "tokens", "outputs", "parts"), [(8, 128, 3072, 1), (8, 128, 49152, 2), (3, 9, 2**30, 3)]
)
def test_blocks_are_cut_where_logits_would_fill_the_memory_down_to_one_example(
    examples, tokens, outputs, parts
):
    assert parts_that_fit(examples, tokens, outputs) == parts


def test_logits_are_cut_into_parts_that_change_nothing(monkeypatch):
    expected, most = fitted().score(LOADER, [(X, Y)]), []
    monkeypatch.setattr(memory, "OUTPUTS_AT_A_TIME", 2 * 5 * widest_outputs(token_classifier()))
    monkeypatch.setattr(Passes, "outputs", lambda passes, x: (most.append(len(x)), passes.model(x))[1])
    found = fitted().score(LOADER, [(X, Y)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert max(most) == 2


def test_what_a_pass_held_is_let_go_before_the_next_one():
    alive = weakref.WeakSet()
    blocks = [Block([0], X[:1], Y[:1]), Block([0], X[1:2], Y[1:2])]
    engine = fitted()
    for one in engine.passes.over(blocks, loss_directions(engine.likelihood)):
        assert not alive
        alive.add(one.outputs)
