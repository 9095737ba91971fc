"""Fisher directions are exact square roots of the Fisher of the outputs."""

import pytest
import torch

from support.ekfac import Categorical, Gaussian
from support.ekfac.likelihood import loss_direction
from tests.dense import assert_same, labels, vectors


def fisher_of_outputs(likelihood, outputs):
    return sum(
        d[:, :, None] * d[:, None, :] for d in likelihood.fisher_directions(outputs, torch.Generator())
    )


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
    (direction,) = Categorical().fisher_directions(outputs, torch.Generator())
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
