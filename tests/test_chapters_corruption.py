"""Wrong labels: flipping, finding curves and their areas, and the search on reviews made of numbers."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from support.chapters import corruption
from support.chapters.corruption import finding_curve, flip_labels
from support.retraining import Reviews, accuracy

LABELS = torch.tensor([0, 1] * 20)
EPOCHS = 60


def two_clouds(reviews: int, seed: int) -> Reviews:
    """Vectors that lie around ±1 in every direction, by label: easy to tell apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(reviews) % 2
    noise = torch.randn(reviews, 8, generator=generator)
    return Reviews(2.0 * labels[:, None] - 1 + noise, labels, [str(row) for row in range(reviews)])


@pytest.fixture(scope="module")
def trial():
    """A tenth of the labels of 100 easy reviews flipped, and looked for."""
    return corruption.search(two_clouds(100, 0), two_clouds(20, 1), EPOCHS, 0.1, 1e-2, seed=0)


# Flipping


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 4), (0.26, 10), (1.0, 40)])
def test_the_stated_share_is_flipped_and_nothing_else_another_one_with_another_seed(share, count):
    noisy, flipped = flip_labels(LABELS, share, seed=0)
    assert flipped.sum() == count
    assert_close(noisy != LABELS, flipped)
    assert_close(flip_labels(noisy, share, seed=0)[0], LABELS)  # twice is the identity
    other = flip_labels(LABELS, share, seed=1)[1]
    assert torch.equal(other, flipped) == (share in (0, 1))


# Finding


FLIPPED = torch.tensor([True, False, True, False, False, False, False, False])


@pytest.fixture
def area_of(trial):
    """The area under the finding curve of a ranking of eight reviews."""

    def area(ranking):
        alone = replace(trial, flipped=FLIPPED, rankings={"one": ranking})
        return corruption.areas([alone])["one"].item()

    return area


def test_a_perfect_ranking_finds_one_flip_with_every_inspection_and_no_other_has_more_area(area_of):
    assert finding_curve(FLIPPED, FLIPPED).tolist() == [0, 0.5, 1, 1, 1, 1, 1, 1, 1]
    best, worst = (area_of(ranking.float()) for ranking in (FLIPPED, ~FLIPPED))
    assert (best, worst) == pytest.approx((1 - 1 / 8, 1 / 8))
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        area = area_of(torch.rand(8, generator=generator))
        assert worst - 1e-6 <= area <= best + 1e-6


def test_a_random_ranking_finds_on_average_what_it_inspects():
    generator = torch.Generator().manual_seed(0)
    curves = [finding_curve(torch.rand(8, generator=generator), FLIPPED) for _ in range(4000)]
    assert_close(torch.stack(curves).mean(dim=0), torch.linspace(0, 1, 9), atol=0.03, rtol=0)


def test_only_the_order_of_suspicions_counts_and_its_reverse_has_the_rest_of_the_area(area_of):
    suspicion = torch.rand(8, generator=torch.Generator().manual_seed(0))
    assert_close(finding_curve(suspicion.exp(), FLIPPED), finding_curve(suspicion, FLIPPED))
    assert area_of(suspicion) + area_of(-suspicion) == pytest.approx(1)


# Searching


def test_every_ranking_but_chance_finds_flips_in_clouds_that_are_far_apart(trial):
    found = corruption.areas([trial]).loc[0]
    assert list(found.index)[-1] == "chance"
    assert found.drop("chance").min() > 0.85, found


def test_a_search_flips_labels_and_leaves_the_reviews_alone_and_its_rankings_do_not_see_which(trial):
    clean, noisy = two_clouds(100, 0), trial.training.reviews
    assert_close(noisy.vectors, clean.vectors)
    assert_close(noisy.labels != clean.labels, trial.flipped)
    head = trial.training.run_on_all(seed=0)
    again = corruption.rankings(head, noisy, two_clouds(20, 1), 1e-2, seed=0)
    assert_close(again, trial.rankings)


def test_what_is_done_at_once_comes_in_the_order_of_its_items_and_tells_what_failed():
    assert corruption.at_once(lambda seed: seed**2, iter([3, 1, 2])) == [9, 1, 4]
    with pytest.raises(ZeroDivisionError):
        corruption.at_once(lambda seed: 1 / seed, [1, 0])


def test_dropping_is_told_for_every_trial_and_ranking(trial):
    held_out = two_clouds(60, 2)
    dropped = corruption.drop_and_train([trial, trial], [0.1, 0.2], held_out)
    assert list(dropped) == [0.1, 0.2]
    assert dropped[0.1].shape == (2, len(trial.rankings) + 1)
    rows = (~trial.flipped).nonzero()[:, 0]
    expected = accuracy(trial.training.run(rows, trial.seed), held_out)
    assert dropped[0.1]["flips known"].tolist() == [expected, expected]


def test_the_references_are_trained_on_the_flipped_and_on_the_right_labels(trial):
    clean = two_clouds(100, 0)
    references = trial.references(two_clouds(20, 1), clean)
    assert references["all kept"] == accuracy(trial.training.run_on_all(0), clean)
    right = corruption.head_training(clean, EPOCHS).run_on_all(0)
    assert references["no label flipped"] == accuracy(right, clean)


def test_a_mean_is_told_with_its_spread_over_draws():
    draws = pd.DataFrame({"loss": [0.8, 0.9], "chance": [0.5, 0.5]})
    assert corruption.mean_and_spread(draws).tolist() == ["0.850 ± 0.071", "0.500 ± 0.000"]


def test_what_is_found_in_the_first_tenth_is_that_of_the_curves(trial):
    assert corruption.curves([trial, trial])["chance"].shape == (2, 101)
    curve = finding_curve(trial.rankings["training loss"], trial.flipped)
    assert corruption.found_in_first(0.1, [trial])["training loss"].item() == curve[10]


def test_an_impossible_share_and_nothing_to_find_are_refused():
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match="must be from 0 to 1"):
            flip_labels(LABELS, share, seed=0)
    with pytest.raises(ValueError, match="nothing to find"):
        finding_curve(torch.rand(8), torch.zeros(8, dtype=torch.bool))
