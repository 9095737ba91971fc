"""Wrong labels: flipping, finding curves and their areas, and the search on reviews made of numbers."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from support.corruption import (
    area_under,
    areas,
    drop_and_train,
    finding_curve,
    flip_labels,
    found_in_first,
    influence_on_all,
    mean_and_spread,
    most_suspicious,
    rankings,
    search,
    sign_changes,
    stacked_curves,
    without_the_worst,
)
from support.ekfac import EkfacInfluence
from support.fidelity.tail import Reviews
from support.heads import Head, HeadTraining, accuracy, batches, in_parts, joined, read_with, select
from support.imdb import ImdbDataset
from support.model import ModelLogitsWrapper, load_model

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
    return search(two_clouds(100, 0), two_clouds(20, 1), EPOCHS, 0.1, 1e-2, seed=0)


# Flipping


def test_flipping_twice_is_the_identity():
    once, flipped = flip_labels(LABELS, 0.1, seed=3)
    twice, again = flip_labels(once, 0.1, seed=3)
    assert_close(twice, LABELS)
    assert_close(again, flipped)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 4), (0.26, 10), (1.0, 40)])
def test_the_stated_share_is_flipped_and_nothing_else(share, count):
    noisy, flipped = flip_labels(LABELS, share, seed=0)
    assert flipped.sum() == count
    assert_close(noisy != LABELS, flipped)


def test_another_seed_flips_other_labels():
    assert not torch.equal(*(flip_labels(LABELS, 0.2, seed)[1] for seed in (0, 1)))


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_between_nothing_and_all(share):
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        flip_labels(LABELS, share, seed=0)


# Finding


FLIPPED = torch.tensor([True, False, True, False, False, False, False, False])


def test_a_perfect_ranking_finds_one_flip_with_every_inspection():
    curve = finding_curve(FLIPPED, FLIPPED)
    assert curve.tolist() == [0, 0.5, 1, 1, 1, 1, 1, 1, 1]


def test_no_ranking_has_more_area_than_the_perfect_one_or_less_than_its_reverse():
    share = 2 / 8
    best, worst = (area_under(finding_curve(r, FLIPPED)) for r in (FLIPPED, ~FLIPPED))
    assert best == pytest.approx(1 - share / 2)
    assert worst == pytest.approx(share / 2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        area = area_under(finding_curve(torch.rand(8, generator=generator), FLIPPED))
        assert worst - 1e-6 <= area <= best + 1e-6


def test_a_random_ranking_finds_on_average_what_it_inspects():
    generator = torch.Generator().manual_seed(0)
    curves = [finding_curve(torch.rand(8, generator=generator), FLIPPED) for _ in range(4000)]
    assert_close(torch.stack(curves).mean(dim=0), torch.linspace(0, 1, 9), atol=0.03, rtol=0)


def test_the_areas_of_a_ranking_and_its_reverse_add_up_to_one():
    suspicion = torch.rand(8, generator=torch.Generator().manual_seed(0))
    both = [area_under(finding_curve(sign * suspicion, FLIPPED)) for sign in (1, -1)]
    assert sum(both) == pytest.approx(1)


def test_only_the_order_of_suspicions_counts():
    suspicion = torch.rand(8, generator=torch.Generator().manual_seed(0))
    assert_close(finding_curve(suspicion.exp(), FLIPPED), finding_curve(suspicion, FLIPPED))


def test_nothing_flipped_is_nothing_to_find():
    with pytest.raises(ValueError, match="nothing to find"):
        finding_curve(torch.rand(8), torch.zeros(8, dtype=torch.bool))


# Reading and training


def test_the_head_is_read_exactly_what_the_model_gives_it(imdb, tokenizer):
    model = load_model()
    dataset = ImdbDataset(imdb["test"].select([0, 4999, 7]), tokenizer, max_tokens=32)
    reviews = read_with(ModelLogitsWrapper(model), dataset)
    with torch.inference_mode():
        logits = model.classifier(model.pre_classifier(reviews.vectors).relu())
        expected = ModelLogitsWrapper(model)(dataset.batch([0, 1, 2])[0])
    assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert reviews.texts == dataset.texts


def test_a_head_is_drawn_from_its_seed_alone():
    first, same, other = (Head(8, seed).classifier.weight for seed in (0, 0, 1))
    assert_close(first, same)
    assert not torch.equal(first, other)


def test_training_again_gives_the_same_head():
    training = HeadTraining(two_clouds(40, 0), EPOCHS)
    states = [
        {name: tensor.clone() for name, tensor in training.run_on_all(seed=0).state_dict().items()}
        for _ in range(2)
    ]
    assert_close(states[0], states[1])


# Searching


def test_the_influence_on_all_is_the_sum_of_the_influences_on_each(trial):
    head, noisy = trial.training.run_on_all(seed=0), trial.noisy
    others = two_clouds(20, 1)
    engine = EkfacInfluence(head, hessian_regularization=1e-2).fit(batches(noisy))
    each = engine.influences(others.vectors, others.labels, noisy.vectors, noisy.labels)
    assert_close(influence_on_all(engine, others, noisy), each.sum(dim=0), rtol=1e-3, atol=1e-3)


def test_every_ranking_but_chance_finds_flips_in_clouds_that_are_far_apart(trial):
    areas = trial.areas()
    assert list(areas)[-1] == "chance"
    del areas["chance"]
    assert min(areas.values()) > 0.85, areas


def test_a_search_flips_labels_and_leaves_the_reviews_alone(trial):
    clean = two_clouds(100, 0)
    assert_close(trial.noisy.vectors, clean.vectors)
    assert_close(trial.noisy.labels != clean.labels, trial.flipped)


def test_rankings_do_not_see_which_labels_were_flipped(trial):
    head = trial.training.run_on_all(seed=0)
    again = rankings(head, trial.noisy, two_clouds(20, 1), 1e-2, seed=0)
    assert_close(again, trial.rankings)


def test_dropping_the_worst_keeps_the_others_in_order():
    suspicion = torch.tensor([0.1, 0.9, 0.3, 0.7])
    assert most_suspicious(suspicion).tolist() == [1, 3, 2, 0]
    assert without_the_worst(suspicion, 0.5).tolist() == [0, 2]
    assert without_the_worst(suspicion, 0.0).tolist() == [0, 1, 2, 3]


def test_accuracy_turns_round_with_the_labels():
    reviews = two_clouds(40, 0)
    head = HeadTraining(reviews, EPOCHS).run_on_all(seed=0)
    turned = replace(reviews, labels=1 - reviews.labels)
    assert accuracy(head, reviews) > 0.9
    assert accuracy(head, reviews) + accuracy(head, turned) == pytest.approx(1)


def test_dropping_is_told_for_every_trial_and_ranking(trial):
    held_out = two_clouds(60, 2)
    dropped = drop_and_train([trial, trial], [0.1, 0.2], held_out)
    assert list(dropped) == [0.1, 0.2]
    assert dropped[0.1].shape == (2, len(trial.rankings) + 1)
    rows = (~trial.flipped).nonzero()[:, 0]
    expected = accuracy(trial.training.run(rows, trial.seed), held_out)
    assert dropped[0.1]["flips known"].tolist() == [expected, expected]


def test_the_references_are_trained_on_the_flipped_and_on_the_right_labels(trial):
    clean = two_clouds(100, 0)
    references = trial.references(two_clouds(20, 1), clean)
    assert references["all kept"] == accuracy(trial.training.run_on_all(0), clean)
    right = HeadTraining(clean, EPOCHS).run_on_all(0)
    assert references["no label flipped"] == accuracy(right, clean)


def test_areas_and_curves_of_trials_are_stacked(trial):
    assert areas([trial, trial]).loc[1].to_dict() == trial.areas()
    assert stacked_curves([trial, trial])["chance"].shape == (2, 101)


def test_selected_reviews_come_in_the_order_asked_for():
    chosen = select(two_clouds(10, 0), torch.tensor([7, 2]))
    assert chosen.texts == ["7", "2"]
    assert chosen.labels.tolist() == [1, 0]


def test_a_mean_is_told_with_its_spread_over_draws():
    draws = pd.DataFrame({"loss": [0.8, 0.9], "chance": [0.5, 0.5]})
    assert mean_and_spread(draws).tolist() == ["0.850 ± 0.071", "0.500 ± 0.000"]


def test_parts_follow_one_another_and_leave_nothing_out():
    parts = in_parts(two_clouds(10, 0), [3, 7])
    assert [part.texts for part in parts] == [list("012"), list("3456789")]


def test_parts_joined_are_the_whole():
    whole = two_clouds(10, 0)
    again = joined(*in_parts(whole, [4, 6]))
    assert_close(again.vectors, whole.vectors)
    assert_close(again.labels, whole.labels)
    assert again.texts == whole.texts


def test_what_is_found_in_the_first_tenth_lies_on_the_curve(trial):
    found = found_in_first(0.1, [trial])
    curve = finding_curve(trial.rankings["training loss"], trial.flipped)
    assert found["training loss"].item() == curve[10]


def test_a_mask_selects_as_its_rows_do():
    mask = torch.arange(10) % 4 == 1
    assert select(two_clouds(10, 0), mask).texts == ["1", "5", "9"]


def test_sign_changes_count_every_pair_once():
    before = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])
    after = torch.tensor([[-1.0, 2.0, 3.0], [-0.5, 0.0, 1.0]])
    table = sign_changes(before, after)
    assert table.to_numpy().sum() == 6
    assert table.loc["helps"].to_dict() == {"harms": 2, "helps": 1, "zero": 0}
    assert table.loc["harms", "helps"] == 2
    assert table.loc["zero", "zero"] == 1
