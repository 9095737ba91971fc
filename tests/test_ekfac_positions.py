"""Where covariances are taken: by "gradient" or "weighted", what adds nothing to the Fisher has no say."""

import pytest
import torch
from torch import nn

from support.ekfac import EkfacInfluence, Gaussian
from support.ekfac.errors import BadSetting
from tests.dense import labels, vectors

Y, KINDS, WHERE = labels(5, 3), [True, False], ["gradient", "weighted"]


class Tail(nn.Module):
    """Two layers over vectors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 3).double(), nn.Linear(3, 3).double()

    def forward(self, x):
        return self.outer(self.inner(x).tanh())


class Pooled(Tail):
    """The same on every position, of which the first is asked."""

    def forward(self, x):
        return super().forward(x)[:, 0]


def positions(examples, count, seed=0):
    return vectors(examples * count, 4, seed).view(examples, count, 4)


def fitted(model, x, **settings):
    settings = {"covariance_positions": "gradient", "hessian_regularization": 1e-3} | settings
    return EkfacInfluence(model.eval(), **settings).fit([(x, Y[: len(x)])])


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("update_diagonal", KINDS)
def test_a_pooled_model_is_its_tail_fed_with_what_is_pooled(update_diagonal, where):
    x, settings = positions(5, 7), {"update_diagonal": update_diagonal, "covariance_positions": where}
    pooled, tail = fitted(Pooled(), x, **settings), fitted(Tail(), x[:, 0], **settings)
    assert_same(pooled.influences(x, Y), tail.influences(x[:, 0], Y))
    assert_same(pooled.self_influences(x, Y), tail.self_influences(x[:, 0], Y))
    everywhere = fitted(Pooled(), x, update_diagonal=update_diagonal, covariance_positions="all")
    difference = everywhere.influences(x, Y) - tail.influences(x[:, 0], Y)
    assert difference.abs().max() > 0.01 * tail.influences(x[:, 0], Y).abs().max()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("update_diagonal", KINDS)
def test_silent_positions_change_nothing(update_diagonal, where):
    x, settings = positions(5, 2), {"update_diagonal": update_diagonal, "covariance_positions": where}
    longer = torch.cat([x, 10 * positions(5, 4, seed=1)], dim=1)
    few, many = (fitted(Pooled(), inputs, **settings) for inputs in (x, longer))
    assert_same(few.influences(x, Y), many.influences(longer, Y))


class OutputsOfTheirOwn(nn.Module):
    """Output k is said by position k."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1, bias=False).double()

    def forward(self, x):
        return self.layer(x)[:, :, 0]


def test_a_position_counts_once_when_any_direction_brings_it_gradient():
    x = positions(5, 3)
    engine = EkfacInfluence(
        OutputsOfTheirOwn().eval(), likelihood=Gaussian(), covariance_positions="gradient"
    )
    basis = engine.fit([(x, x)]).curvature["layer"].basis
    covariance = basis.activation @ basis.activation_eigenvalues.diag() @ basis.activation.T
    rows = x.flatten(0, 1)
    assert_same(covariance, rows.T @ rows / len(rows))


def test_weighted_rows_count_by_the_size_of_the_other_side_and_the_trace_of_both_is_the_fishers():
    model, x = Tail().eval(), positions(5, 1)[:, 0]
    engine = EkfacInfluence(model, likelihood=Gaussian(), covariance_positions="weighted").fit([(x, x)])
    hidden, outputs = model.inner(x).tanh(), torch.eye(3, dtype=x.dtype)
    rows = torch.cat([hidden, torch.ones(5, 1)], dim=1)  # every direction of the Fisher is a unit vector
    basis = engine.curvature["outer"].basis
    covariance = basis.activation @ basis.activation_eigenvalues.diag() @ basis.activation.T
    assert_same(covariance, rows.T @ rows / rows.square().sum())
    assert_same(basis.output_gradient_eigenvalues, rows.square().sum() / 5 * outputs.diagonal())


@pytest.mark.parametrize("where", WHERE)
def test_a_layer_that_no_gradient_reaches_is_fitted_and_says_nothing(where):
    model = Pooled()
    nn.init.zeros_(model.outer.weight)
    engine = fitted(model, positions(5, 3), covariance_positions=where)
    assert engine.curvature["inner"].eigenvalues.count_nonzero() == 0
    assert engine.influences_by_layer(positions(5, 3), Y)["inner"].count_nonzero() == 0


def test_other_positions_are_refused_by_name():
    with pytest.raises(
        BadSetting, match="covariance_positions='some': there are 'all', 'gradient', 'weighted'"
    ):
        EkfacInfluence(Tail(), covariance_positions="some")
