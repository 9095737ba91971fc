"""EK-FAC against dense truth: equal where theory says equal, nearer than K-FAC elsewhere."""

import pytest
import torch
from torch import nn

from support.ekfac import EkfacInfluence, Gaussian
from tests.dense import (
    damped_influences,
    fisher_blocks,
    gradient_matrices,
    label_gradients,
    labels,
    linear_layers,
    loss_gradients,
    output_gradient_matrices,
    perceptron,
    sentences,
    token_classifier,
    vectors,
)

DAMPING = 1e-3


def assert_equal(found, expected, tolerance=1e-8):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def approximate_block(engine: EkfacInfluence, name: str) -> torch.Tensor:
    """The engine's approximation of a Fisher block, as a dense matrix over row-flattened G."""
    curvature = engine.curvature[name]
    basis = torch.kron(curvature.basis.output_gradient.contiguous(), curvature.basis.activation.contiguous())
    return basis @ torch.diag(curvature.eigenvalues.flatten()) @ basis.T


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_ekfac_is_exact_for_one_datum_with_one_position(classes, bias):
    model = perceptron(4, 3, classes, bias=bias)
    x, queries = vectors(1, 4), vectors(5, 4, seed=1)
    y, query_labels = labels(1, classes), labels(5, classes, seed=1)
    engine = EkfacInfluence(model, hessian_regularization=DAMPING).fit([(x, y)])
    expected = damped_influences(
        fisher_blocks(label_gradients(model, x)),
        loss_gradients(model, queries, query_labels),
        loss_gradients(model, x, y),
        DAMPING,
    )
    assert_equal(engine.influences(queries, query_labels, x, y), expected)


@pytest.mark.parametrize("update_diagonal", [True, False])
@pytest.mark.parametrize("widths", [(4, 3), (5, 4, 3, 2)])
def test_ekfac_and_kfac_are_exact_for_deep_linear_networks_under_a_gaussian_likelihood(
    widths, update_diagonal
):
    model = perceptron(*widths, bias=False, nonlinear=False)
    x = vectors(5, widths[0])
    engine = EkfacInfluence(model, update_diagonal=update_diagonal, likelihood=Gaussian())
    engine.fit([(x[:2],), (x[2:],)])
    for name, block in fisher_blocks(output_gradient_matrices(model, x)).items():
        assert_equal(approximate_block(engine, name), block)


def test_influences_equal_the_dense_damped_solve_for_deep_linear_networks():
    model = perceptron(5, 4, 3, bias=True, nonlinear=False)
    x, queries = vectors(5, 5), vectors(2, 5, seed=1)
    y, targets = vectors(5, 3, seed=2), vectors(2, 3, seed=3)
    engine = EkfacInfluence(model, hessian_regularization=DAMPING, likelihood=Gaussian())
    engine.fit([(x, y)])

    def gaussian_gradients(inputs, outputs):
        return [
            gradient_matrices(model, (model(row[None])[0] - target).square().sum() / 2)
            for row, target in zip(inputs, outputs, strict=True)
        ]

    expected = damped_influences(
        fisher_blocks(output_gradient_matrices(model, x)),
        gaussian_gradients(queries, targets),
        gaussian_gradients(x, y),
        DAMPING,
    )
    assert_equal(engine.influences(queries, targets, x, y), expected)


@pytest.mark.parametrize("classes", [2, 3])
def test_ekfac_is_nearer_to_the_exact_fisher_than_kfac(classes):
    model = token_classifier(classes=classes)
    x = sentences(5, 3, 4, 2, 5)
    blocks = fisher_blocks(label_gradients(model, x))
    ekfac = EkfacInfluence(model).fit([(x,)])
    kfac = EkfacInfluence(model, update_diagonal=False).fit([(x,)])
    for name, block in blocks.items():
        ekfac_error = (approximate_block(ekfac, name) - block).norm()
        assert ekfac_error < (approximate_block(kfac, name) - block).norm()


@pytest.mark.parametrize("classes", [2, 3])
def test_corrected_eigenvalues_are_the_exact_fishers_diagonal_in_the_eigenbasis(classes):
    model = token_classifier(classes=classes)
    x = sentences(5, 3, 4)
    engine = EkfacInfluence(model).fit([(x[:1],), (x[1:],)])
    for name, block in fisher_blocks(label_gradients(model, x)).items():
        curvature = engine.curvature[name]
        basis = torch.kron(
            curvature.basis.output_gradient.contiguous(), curvature.basis.activation.contiguous()
        )
        assert_equal(curvature.eigenvalues.flatten(), (basis.T @ block @ basis).diagonal())


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
    assert_equal(engine.curvature["inner"].basis.activation_eigenvalues, expected)
    trace_of_fisher = sum(
        p * (g["classifier"][:, -1] ** 2).sum() for row in label_gradients(model, x) for p, g in row
    )
    found = engine.curvature["classifier"].basis.output_gradient_eigenvalues.sum()
    assert_equal(found, trace_of_fisher / 3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_with_no_curvature_but_damping_influences_are_the_loops_gradient_products(bias, classes):
    model = token_classifier(bias=bias, classes=classes)
    x, y = sentences(4, 2, 3, 5), labels(4, classes)
    engine = EkfacInfluence(model).fit([(x,)])
    for layer in engine.curvature.values():
        layer.eigenvalues.zero_()
    engine.hessian_regularization = 1.0
    loop = loss_gradients(model, x, y)
    for name, by_layer in engine.influences_by_layer(x, y).items():
        rows = torch.stack([gradients[name].flatten() for gradients in loop])
        assert_equal(by_layer, rows @ rows.T, tolerance=1e-12)


def test_factors_are_the_preconditioned_gradients_of_the_engines_own_approximation():
    model = token_classifier(classes=3)
    x, y = sentences(4, 2, 3), labels(3, 3)
    engine = EkfacInfluence(model, hessian_regularization=DAMPING).fit([(x,)])
    loop = loss_gradients(model, x, y)
    for name, factors in engine.influence_factors(x, y).items():
        block = approximate_block(engine, name)
        damped = block + DAMPING * torch.eye(len(block), dtype=torch.float64)
        rows = torch.stack([gradients[name].flatten() for gradients in loop])
        assert_equal(factors.flatten(1), torch.linalg.solve(damped, rows.T).T)


def test_large_damping_tends_to_the_gradient_product_over_damping():
    model = token_classifier()
    x, y = sentences(4, 2, 3), labels(3)
    engine = EkfacInfluence(model, hessian_regularization=1e9).fit([(x,)])
    loop = [torch.cat([g.flatten() for g in row.values()]) for row in loss_gradients(model, x, y)]
    gradients = torch.stack(loop)
    assert_equal(engine.influences(x, y) * 1e9, gradients @ gradients.T, tolerance=1e-7)


def test_auto_damping_is_a_tenth_of_each_layers_mean_eigenvalue():
    model = perceptron(4, 3, bias=True)
    x, y = vectors(5, 4), labels(5, 3)
    engine = EkfacInfluence(model, hessian_regularization="auto").fit([(x,)])
    by_heuristic = engine.influences(x, y)
    engine.hessian_regularization = engine.curvature["0"].eigenvalues.mean().item() / 10
    assert_equal(by_heuristic, engine.influences(x, y))


def test_without_damping_directions_never_seen_have_no_influence():
    model = perceptron(4, 2)
    x = vectors(1, 4)
    engine = EkfacInfluence(model).fit([(x,)])
    for layer in engine.curvature.values():
        layer.eigenvalues[layer.eigenvalues < 1e-12] = 0
    influences = engine.influences(vectors(3, 4, seed=1), labels(3), x, labels(1))
    assert influences.isfinite().all()


def test_only_layers_that_require_gradients_are_tracked():
    model = token_classifier()
    model.outer.requires_grad_(False)
    engine = EkfacInfluence(model)
    assert engine.layer_names == ["inner", "classifier"]
    assert list(linear_layers(model)) == ["inner", "outer", "classifier"]


def test_a_frozen_layer_changes_nothing_for_the_others():
    x, y = sentences(4, 2, 3), labels(3)
    model = token_classifier()
    everything = EkfacInfluence(model, hessian_regularization=DAMPING).fit([(x,)])
    expected = everything.influences_by_layer(x, y)
    model.inner.requires_grad_(False)
    some = EkfacInfluence(model, hessian_regularization=DAMPING).fit([(x,)])
    for name, influences in some.influences_by_layer(x, y).items():
        assert_equal(influences, expected[name], tolerance=1e-12)


def test_layers_side_by_side_each_start_the_graph():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return torch.tanh(self.left(x)) * self.right(x)

    torch.manual_seed(0)
    model = Fork().double().eval()
    x, y = vectors(3, 4), labels(3)
    engine = EkfacInfluence(model, hessian_regularization=1e9).fit([(x,)])
    loop = loss_gradients(model, x, y)
    for name, influences in engine.influences_by_layer(x, y).items():
        rows = torch.stack([gradients[name].flatten() for gradients in loop])
        assert_equal(influences * 1e9, rows @ rows.T, tolerance=1e-7)
