"""Fisher directions are exact square roots of the Fisher of the outputs."""

import pytest
import torch

from support.ekfac import Bernoulli, Categorical, Gaussian
from support.ekfac.draws import drawn
from support.ekfac.errors import LabelsMismatch
from support.ekfac.likelihood import loss_direction
from tests.dense import assert_same, labels, vectors


def drawing(outputs, seed=""):
    return lambda numbers: drawn(seed, outputs, None, numbers)


def fisher_of_outputs(likelihood, outputs, seed=""):
    directions = likelihood.fisher_directions(outputs, drawing(outputs, seed))
    return sum(d[:, :, None] * d[:, None, :] for d in directions)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_directions_of_a_categorical_give_its_fisher_exactly(classes):
    outputs = 3 * vectors(4, classes)
    p = outputs.softmax(dim=1)
    expected = torch.zeros(4, classes, classes, dtype=torch.float64)
    for label in range(classes):
        gradient = p - torch.eye(classes, dtype=torch.float64)[label]
        expected += p[:, label, None, None] * gradient[:, :, None] * gradient[:, None, :]
    found = fisher_of_outputs(Categorical(), outputs)
    assert_same(found, expected, 1e-12)
    assert_same(found, torch.diag_embed(p) - p[:, :, None] * p[:, None, :], 1e-12)


def test_two_classes_need_one_direction_and_see_curvature_where_they_are_undecided():
    outputs = torch.zeros(1, 2, dtype=torch.float64)
    (direction,) = Categorical().fisher_directions(outputs, drawing(outputs))
    assert_same(direction.abs(), torch.full_like(outputs, 0.5))


@pytest.mark.parametrize("classes", [2, 3])
def test_loss_direction_of_a_categorical_is_probability_minus_label(classes):
    outputs, y = vectors(4, classes), labels(4, classes)
    p, one_hot = outputs.softmax(dim=1), torch.eye(classes, dtype=torch.float64)
    assert_same(loss_direction(Categorical(), outputs, y), p - one_hot[y])


def test_a_gaussian_has_the_identity_as_its_fisher_and_the_residual_as_its_loss_direction():
    outputs, y = vectors(4, 3), vectors(4, 3, seed=1)
    found = fisher_of_outputs(Gaussian(), outputs)
    assert_same(found, torch.eye(3, dtype=torch.float64).expand(4, 3, 3))
    assert_same(loss_direction(Gaussian(), outputs, y), outputs - y)


def test_directions_of_a_bernoulli_give_its_fisher_exactly_and_in_the_mean_of_draws():
    outputs = 2 * vectors(4, 3)
    p = outputs.sigmoid()
    expected = torch.diag_embed(p * (1 - p))
    assert_same(fisher_of_outputs(Bernoulli(), outputs), expected)
    found = [fisher_of_outputs(Bernoulli(exact_outputs=2), outputs, str(seed)) for seed in range(4000)]
    torch.testing.assert_close(torch.stack(found).mean(dim=0), expected, rtol=0, atol=0.02)


def test_the_fisher_of_sampled_labels_is_that_of_all_labels_in_the_mean():
    outputs = vectors(3, 5)
    found = [fisher_of_outputs(Categorical(exact_classes=4), outputs, str(seed)) for seed in range(6000)]
    expected = fisher_of_outputs(Categorical(), outputs)
    torch.testing.assert_close(torch.stack(found).mean(dim=0), expected, rtol=0, atol=0.02)


def test_loss_direction_of_a_bernoulli_is_probability_minus_label_and_wants_labels_from_0_to_1():
    outputs, y = vectors(4, 3), labels(12, 2).view(4, 3)
    assert_same(loss_direction(Bernoulli(), outputs, y), outputs.sigmoid() - y)
    with pytest.raises(LabelsMismatch, match="Label 2 is not from 0 to 1"):
        Bernoulli().check(outputs, 2 * torch.ones_like(y))
    with pytest.raises(LabelsMismatch, match=r"shape \(4,\), outputs \(4, 3\)"):
        Bernoulli().check(outputs, y[:, 0])
    with pytest.raises(LabelsMismatch, match="those of a Bernoulli are not"):
        Bernoulli().label_directions(outputs)
