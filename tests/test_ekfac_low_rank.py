"""Queries at low rank: whole at full rank, nearest below, and small."""

import pytest
import torch

from support.ekfac import EkfacInfluence
from support.ekfac.errors import BadSetting
from support.ekfac.low_rank import of_rank
from support.ekfac.memory import factor_bytes
from support.ekfac.scores import kept_share
from tests.dense import labels, sentences, token_classifier

X, Y, QUERIES, ASKED = sentences(5, 3, 4, 2, 5), labels(5), sentences(3, 5, 4, seed=1), labels(3, seed=1)


def engine(rank=None, **settings):
    return EkfacInfluence(token_classifier(), query_rank=rank, **settings).fit([(X,)])


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_full_rank_is_the_whole_score_whichever_way_it_is_asked():
    whole, full = engine(), engine(rank=9)
    asked = QUERIES, ASKED, X, Y
    assert_same(full.influences(*asked), whole.influences(*asked))
    assert_same(full.token_influences(*asked), whole.token_influences(*asked))
    assert_same(full.influences_by_label(*asked[:3]), whole.influences_by_label(*asked[:3]))
    budget = {"memory_budget": 2 * factor_bytes(whole.layers)}  # groups of whole factors, and of low rank
    scores = engine(rank=9, **budget).score([(QUERIES, ASKED)], [(X, Y)], "relative")
    assert_same(scores, whole.relative_influences(*asked))
    assert_same(kept_share(full.influence_factors(QUERIES, ASKED)), torch.ones(3).double())


@pytest.mark.parametrize("queries", [9, 1])
def test_weighed_examples_make_the_query_that_is_the_sum_of_their_losses(queries):
    weights = torch.tensor([[1.0, -1, 0], [0, 2, 1]]).double()
    whole, budget = engine(), {"memory_budget": queries * factor_bytes(engine().layers)}  # 1: layers apart
    plain = whole.influence_factors(QUERIES, ASKED)
    summed = whole.influence_factors(QUERIES, ASKED, weights)
    low = engine(rank=1, **budget).influence_factors(QUERIES, ASKED, weights)
    for name, factors in plain.items():
        expected = torch.einsum("qe,eoi->qoi", weights, factors)
        assert_same(summed[name], expected)
        assert_same(low[name].dense(), of_rank(expected, 1).dense())


def test_low_rank_factors_are_the_nearest_ones_and_tell_what_they_keep():
    factors = engine().influence_factors(QUERIES, ASKED)["inner"]
    low = of_rank(factors, 1)
    u, values, vt = torch.linalg.svd(factors)
    assert_same(low.dense(), values[:, :1, None] * u[:, :, :1] * vt[:, :1])
    assert_same(low.kept() / low.whole, values[:, 0] ** 2 / values.square().sum(dim=1))


def test_the_randomised_decomposition_keeps_what_the_exact_one_keeps_and_leaves_the_seed_alone():
    torch.manual_seed(3)
    decaying = torch.randn(2, 60, 40).double() @ torch.diag(0.7 ** torch.arange(40.0)).double()
    expected = torch.rand(1)
    torch.manual_seed(3)
    torch.randn(2, 60, 40)
    low = of_rank(decaying, 6)
    assert torch.equal(torch.rand(1), expected)
    best = torch.linalg.svdvals(decaying)[:, :6].square().sum(dim=1)
    torch.testing.assert_close(low.kept(), best, rtol=1e-3, atol=0)
    assert torch.equal(of_rank(decaying, 6).left, low.left)


def test_a_query_at_low_rank_takes_its_rank_times_the_layers_widths():
    found = engine(rank=2)
    factors = found.influence_factors(QUERIES[:1], ASKED[:1]).values()
    taken = sum(part.nbytes for layer in factors for part in (layer.left, layer.right))
    assert taken == factor_bytes(found.layers, 2)


def test_a_rank_of_nothing_is_refused():
    with pytest.raises(BadSetting, match="query_rank=0: use a whole number from 1"):
        engine(rank=0)
