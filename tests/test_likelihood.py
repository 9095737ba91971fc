"""Fisher directions are exact square roots of the Fisher of the outputs."""

import pytest
import torch

from support.ekfac import Categorical, Gaussian
from support.ekfac.likelihood import loss_direction
from tests.dense import labels, vectors


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
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(found, hessian, rtol=1e-12, atol=1e-12)


def test_two_classes_need_one_direction_and_see_curvature_where_they_are_undecided():
    outputs = torch.zeros(1, 2, dtype=torch.float64)
    (direction,) = Categorical().fisher_directions(outputs, torch.Generator())
    torch.testing.assert_close(direction.abs(), torch.full((1, 2), 0.5, dtype=torch.float64))


def test_directions_of_a_gaussian_are_the_identity():
    found = fisher_of_outputs(Gaussian(), vectors(4, 3))
    torch.testing.assert_close(found, torch.eye(3, dtype=torch.float64).expand(4, 3, 3))


@pytest.mark.parametrize("classes", [2, 3])
def test_loss_direction_of_a_categorical_is_probability_minus_label(classes):
    outputs, y = vectors(4, classes), labels(4, classes)
    expected = outputs.softmax(dim=1) - torch.eye(classes, dtype=torch.float64)[y]
    torch.testing.assert_close(loss_direction(Categorical(), outputs, y), expected)


def test_loss_direction_of_a_gaussian_is_the_residual():
    outputs, y = vectors(4, 3), vectors(4, 3, seed=1)
    torch.testing.assert_close(loss_direction(Gaussian(), outputs, y), outputs - y)


def test_loss_directions_sum_to_nothing_over_the_models_own_labels():
    outputs = vectors(4, 3)
    p = outputs.softmax(dim=1)
    mean = sum(p[:, [c]] * loss_direction(Categorical(), outputs, torch.full((4,), c)) for c in range(3))
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-15)
