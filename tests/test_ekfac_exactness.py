"""EK-FAC against dense truth: equal where theory says equal, nearer than K-FAC elsewhere."""

import pytest
import torch

from support.ekfac import Categorical, EkfacInfluence, Gaussian
from support.ekfac.blocks import blocks_of
from support.ekfac.fit import CovarianceSums
from tests import dense
from tests.dense import assert_same, labels, perceptron, sentences, token_classifier, vectors

DAMPING = 1e-3


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_ekfac_is_exact_for_one_datum_with_one_position(classes, bias):
    model = perceptron(4, 3, classes, bias=bias)
    x, queries = vectors(1, 4), vectors(5, 4, seed=1)
    y, query_labels = labels(1, classes), labels(5, classes, seed=1)
    engine = EkfacInfluence(model, hessian_regularization=DAMPING).fit([(x, y)])
    expected = dense.damped_influences(
        dense.fisher_blocks(dense.label_gradients(model, x)),
        dense.loss_gradients(model, queries, query_labels),
        dense.loss_gradients(model, x, y),
        DAMPING,
    )
    assert_same(engine.influences(queries, query_labels, x, y), expected)


@pytest.mark.parametrize("update_diagonal", [True, False])
@pytest.mark.parametrize("widths", [(4, 3), (5, 4, 3, 2)])
def test_ekfac_and_kfac_are_exact_for_deep_linear_networks_under_a_gaussian_likelihood(
    widths, update_diagonal
):
    model = perceptron(*widths, bias=False, nonlinear=False)
    x = vectors(5, widths[0])
    engine = EkfacInfluence(model, update_diagonal=update_diagonal, likelihood=Gaussian())
    engine.fit([(x[:2],), (x[2:],)])
    for name, block in dense.fisher_blocks(dense.output_gradient_matrices(model, x)).items():
        assert_same(dense.approximate_block(engine.curvature[name]), block)


def test_covariances_are_means_over_real_positions_and_over_examples():
    model = token_classifier()
    x = sentences(4, 2, 3)
    engine = EkfacInfluence(model, update_diagonal=False).fit([(x,)])
    seen = {}
    model.inner.register_forward_hook(lambda m, inputs, out: seen.update(a=inputs[0]))
    model(x)
    real = seen["a"][x != 0]
    real = torch.cat([real, torch.ones(len(real), 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.eigvalsh(real.T @ real / 9)
    assert_same(engine.curvature["inner"].basis.activation_eigenvalues, expected)
    trace_of_fisher = sum(
        p * (g["classifier"][:, -1] ** 2).sum() for row in dense.label_gradients(model, x) for p, g in row
    )
    found = engine.curvature["classifier"].basis.output_gradient_eigenvalues.sum()
    assert_same(found, trace_of_fisher / 3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_with_no_curvature_but_damping_influences_are_the_loops_gradient_products(bias, classes):
    model = token_classifier(bias=bias, classes=classes)
    x, y = sentences(4, 2, 3, 5), labels(4, classes)
    engine = EkfacInfluence(model).fit([(x,)])
    loop = dense.loss_gradients(model, x, y)
    for name, found in dense.plain_gradients(engine, x, y).items():
        rows = torch.stack([gradients[name].flatten() for gradients in loop])
        assert_same(found.flatten(1), rows, tolerance=1e-12)
        assert_same(engine.influences_by_layer(x, y)[name], rows @ rows.T, tolerance=1e-12)


@pytest.mark.parametrize(
    ("likelihood", "y", "gradients"),
    [
        (Categorical(), labels(3, 3), dense.loss_gradients),
        (Gaussian(), vectors(3, 3, seed=2), dense.gaussian_loss_gradients),
    ],
    ids=["classes", "regression"],
)
def test_factors_are_the_preconditioned_gradients_of_the_engines_own_approximation(likelihood, y, gradients):
    model, x = token_classifier(classes=3), sentences(4, 2, 3)
    engine = EkfacInfluence(model, hessian_regularization=DAMPING, likelihood=likelihood).fit([(x,)])
    loop = gradients(model, x, y)
    for name, factors in engine.influence_factors(x, y).items():
        block = dense.approximate_block(engine.curvature[name])
        damped = block + DAMPING * torch.eye(len(block), dtype=torch.float64)
        rows = torch.stack([one[name].flatten() for one in loop])
        assert_same(factors.flatten(1), torch.linalg.solve(damped, rows.T).T)


def test_auto_damping_is_a_tenth_of_each_layers_mean_eigenvalue():
    model = perceptron(4, 3, bias=True)
    x, y = vectors(5, 4), labels(5, 3)
    engine = EkfacInfluence(model, hessian_regularization="auto").fit([(x,)])
    by_heuristic = engine.influences(x, y)
    engine.hessian_regularization = engine.curvature["0"].eigenvalues.mean().item() / 10
    assert_same(by_heuristic, engine.influences(x, y))


def test_a_frozen_layer_is_not_tracked_and_changes_nothing_for_the_others():
    x, y = sentences(4, 2, 3), labels(3)
    model = token_classifier()
    everything = EkfacInfluence(model, hessian_regularization=DAMPING).fit([(x,)])
    expected = everything.influences_by_layer(x, y)
    assert list(expected) == everything.layer_names == ["inner", "outer", "classifier"]
    model.inner.requires_grad_(False)
    some = EkfacInfluence(model, hessian_regularization=DAMPING).fit([(x,)]).influences_by_layer(x, y)
    assert list(some) == ["outer", "classifier"]
    for name, influences in some.items():
        assert_same(influences, expected[name], tolerance=1e-12)


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_eigenproblems_taken_at_once_are_those_taken_alone_and_threads_are_as_before(two_threads):
    engine = EkfacInfluence(perceptron(5, 4, 3, 2))
    alone, at_once = CovarianceSums(engine), CovarianceSums(engine)
    for sums in (alone, at_once):
        sums.add(blocks_of(vectors(7, 5), labels(7, 2), lambda _: None))
    for name, basis in at_once.bases(engine.layer_names):
        expected = alone.basis(name)
        assert_same(basis.activation.abs(), expected.activation.abs())
        assert_same(basis.output_gradient_eigenvalues, expected.output_gradient_eigenvalues)
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError):  # sums are given up
        at_once.basis(name)
