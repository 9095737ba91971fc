"""The linear datamodeling score and the noise ceiling, on banks whose truth is known; banks made."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from support import judge
from support.judge import Bank, Design, linear_datamodeling_score, noise_ceiling, reliability
from support.retraining import Recipe, Retraining, losses, margins, untrained_tail
from tests.made_up import reviews


def linear_bank(effects, subsets=40, noise=0.0, seeds=3):
    """A bank in which every review adds its effect to the margin of each query."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.zeros(effects.shape[1], dtype=torch.long)
    member = Design(subsets=subsets).membership(labels)
    expected = (member.to(effects) @ effects.T)[:, None]
    drawn = torch.randn(subsets, seeds, len(effects), generator=generator)
    return Bank(member, expected + noise * drawn)


@pytest.fixture
def effects():
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(6))


def test_the_true_effects_score_one_and_their_opposite_minus_one(effects):
    bank = linear_bank(effects)
    assert linear_datamodeling_score(effects, bank).per_query == pytest.approx(np.ones(6))
    assert linear_datamodeling_score(-effects, bank).per_query == pytest.approx(-np.ones(6))
    constant = torch.full_like(effects, 0.1)  # orders nothing
    assert (linear_datamodeling_score(constant, bank).per_query == 0).all()


def test_the_score_is_spearmans_correlation_of_subset_sums_with_the_negative_loss(effects):
    """Ties count as scipy counts them."""
    bank = linear_bank(effects, noise=2.0)
    scores = (effects + torch.randn(effects.shape, generator=torch.Generator().manual_seed(7))).round()
    found = linear_datamodeling_score(scores, bank).per_query
    for query in range(len(effects)):
        sums = [scores[query, member].sum().item() for member in bank.membership]
        expected = spearmanr(sums, -bank.outcomes[:, query]).statistic
        assert found[query] == pytest.approx(expected)


def test_a_query_s_scale_and_a_constant_for_all_reviews_do_not_matter(effects):
    bank = linear_bank(effects, noise=2.0)
    scores = torch.randn(effects.shape, generator=torch.Generator().manual_seed(7))
    scaled = 3 * scores + torch.arange(6.0)[:, None]  # every subset holds as many reviews
    assert linear_datamodeling_score(scaled, bank).per_query == pytest.approx(
        linear_datamodeling_score(scores, bank).per_query
    )


def test_subset_scores_are_sums_over_members():
    scores = torch.tensor([[1.0, 2.0, 4.0], [0.0, -1.0, 3.0]])
    membership = torch.tensor([[True, False, True], [False, True, False]])
    expected = torch.tensor([[5.0, 3.0], [2.0, -1.0]])
    torch.testing.assert_close(judge.subset_scores(scores, membership), expected)


def test_the_ceiling_is_what_the_true_effects_reach_in_noise():
    effects = torch.randn(150, 20, generator=torch.Generator().manual_seed(6))
    bank = linear_bank(effects, subsets=200, noise=1.5, seeds=4)
    reached = linear_datamodeling_score(effects, bank).mean
    assert 0.8 < reached < 0.95
    assert noise_ceiling(bank) == pytest.approx(reached, abs=0.02)


def test_the_ceiling_is_one_without_noise_rises_with_seeds_and_is_nothing_where_all_is_noise(effects):
    bank = linear_bank(effects)
    assert (reliability(bank).mean, noise_ceiling(bank)) == pytest.approx((1, 1))
    few, many = (linear_bank(effects, noise=3.0, seeds=seeds) for seeds in (2, 8))
    assert noise_ceiling(few) < noise_ceiling(many) < 1
    opposite = torch.arange(8.0)[:, None, None] * torch.tensor([1.0, -1.0])[None, :, None]
    assert noise_ceiling(Bank(torch.ones(8, 3, dtype=torch.bool), opposite)) == 0


def test_the_interval_holds_the_mean_and_narrows_with_queries():
    rng = np.random.default_rng(0)
    few, many = (judge.Agreement(rng.normal(0.5, 0.2, number)) for number in (20, 500))
    for agreement in (few, many):
        low, high = agreement.interval()
        assert low < agreement.mean < high
    assert np.diff(many.interval()) < 0.5 * np.diff(few.interval())
    assert judge.Agreement(np.full(5, 0.3)).interval() == (pytest.approx(0.3), pytest.approx(0.3))


@pytest.mark.parametrize("measure", [reliability, noise_ceiling])
def test_one_seed_tells_nothing_of_noise_and_is_refused(effects, measure):
    with pytest.raises(ValueError, match=r"has one seed .* Make it with more: Design\(seeds=2\)"):
        measure(linear_bank(effects, seeds=1))


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_subsets_hold_their_share_of_the_reviews(share):
    labels = reviews(30).labels
    member = Design(subsets=7, share=share).membership(labels)
    assert member.shape == (7, 30)
    assert (member.sum(dim=1) == round(share * 30)).all()
    assert len({tuple(row.tolist()) for row in member}) == 7
    assert not member.equal(Design(subsets=7, share=share, draw=1).membership(labels))
    balanced = Design(subsets=5, share=share, balanced=True).membership(labels)
    for label in (0, 1):
        of_label = labels == label
        assert (balanced[:, of_label].sum(dim=1) == round(share * int(of_label.sum()))).all()


def test_a_bank_holds_what_retraining_says():
    queries = reviews(5, seed=1)
    retraining = Retraining(untrained_tail(), reviews(24), Recipe(1, 1e-3, batch_size=8))
    bank = judge.make_bank(retraining, queries, Design(subsets=4, seeds=2))
    rows = bank.membership[3].nonzero()[:, 0]
    expected = margins(retraining.run(rows, seed=2), queries)
    torch.testing.assert_close(bank.margins[3, 1], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(bank.outcomes[3], losses(bank.margins[3]).mean(dim=0))
