"""The exact Gauss–Newton solve against dense float64 solves."""

import pytest
import torch

from support.ekfac import Categorical, ExactInfluence, Gaussian
from support.ekfac.errors import BadSetting, EmptyLoader
from support.ekfac.exact import inner_products
from support.ekfac.gradients import LayerGradients
from tests.dense import (
    damped_influences,
    fisher_blocks,
    label_gradients,
    labels,
    loss_gradients,
    output_gradient_matrices,
    perceptron,
    sentences,
    token_classifier,
    vectors,
)

DAMPING = 0.03
CASES = {
    "vectors, two classes": (perceptron(4, 3, 2), vectors(5, 4), vectors(3, 4, seed=1), 2),
    "vectors, three classes": (perceptron(4, 5, 3), vectors(5, 4), vectors(2, 4, seed=1), 3),
    "no bias": (perceptron(4, 3, 2, bias=False), vectors(6, 4), vectors(2, 4, seed=1), 2),
    "padded tokens": (token_classifier(), sentences(5, 2, 4, 3), sentences(3, 5, seed=1), 2),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    """Model, training examples with labels, test examples with labels."""
    model, x, x_test, classes = request.param
    return model, (x, labels(len(x), classes)), (x_test, labels(len(x_test), classes, seed=1))


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def joined(gradients):
    """All layers as one, so that a Fisher block is the joint matrix."""
    return {"all": torch.cat([part.flatten() for part in gradients.values()])}


def jointly(weighted):
    return [[(weight, joined(part)) for weight, part in example] for example in weighted]


def dense_influences(model, train, test, joint, damping=DAMPING):
    weighted = label_gradients(model, train[0])
    left, right = loss_gradients(model, *test), loss_gradients(model, *train)
    if joint:
        weighted = jointly(weighted)
        left, right = ([joined(part) for part in side] for side in (left, right))
    return damped_influences(fisher_blocks(weighted), left, right, damping)


def split(pair, sizes):
    return list(zip(pair[0].split(sizes), pair[1].split(sizes), strict=True))


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "per layer"])
def test_exact_influences_are_the_dense_damped_solve(case, joint):
    model, train, test = case
    exact = ExactInfluence(model, joint=joint)
    systems = exact.inner_products([train], [test], [train])
    assert_equal(exact.influences(systems, DAMPING), dense_influences(model, train, test, joint))


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "per layer"])
def test_exact_relative_influences_divide_by_the_root_of_the_diagonal(case, joint):
    model, train, test = case
    exact = ExactInfluence(model, joint=joint)
    systems = exact.inner_products([train], [test], [train])
    norms = dense_influences(model, train, train, joint).diagonal().sqrt()
    expected = dense_influences(model, train, test, joint) / norms
    assert_equal(exact.influences(systems, DAMPING, relative=True), expected)


def test_batches_change_nothing_in_exact_influences(case):
    model, train, test = case
    exact = ExactInfluence(model)
    whole = exact.inner_products([train], [test], [train])
    parts = exact.inner_products(split(train, [2, len(train[0]) - 2]), split(test, 1), [train])
    assert_equal(exact.influences(parts, DAMPING), exact.influences(whole, DAMPING))


def test_a_gaussian_likelihood_has_its_own_exact_solve():
    model, x, x_test = perceptron(4, 3, 2), vectors(5, 4), vectors(3, 4, seed=1)
    y, y_test = vectors(5, 2, seed=2), vectors(3, 2, seed=3)
    exact = ExactInfluence(model, joint=False, likelihood=Gaussian())
    systems = exact.inner_products([(x,)], [(x_test, y_test)], [(x, y)])
    blocks = fisher_blocks(output_gradient_matrices(model, x))
    sides = [_gaussian_gradients(model, *pair) for pair in ((x_test, y_test), (x, y))]
    assert_equal(exact.influences(systems, DAMPING), damped_influences(blocks, *sides, DAMPING))


def _gaussian_gradients(model, x, y):
    residuals = (model(x) - y).detach()
    return [
        {
            name: sum(r * part[name] for r, (_, part) in zip(residual, outputs, strict=True))
            for name in outputs[0][1]
        }
        for residual, outputs in zip(residuals, output_gradient_matrices(model, x), strict=True)
    ]


@pytest.mark.parametrize("regularization", [0, -1.0, float("nan")])
def test_the_exact_solve_wants_a_regularization_above_zero(regularization):
    model, x = perceptron(4, 3, 2), vectors(5, 4)
    exact = ExactInfluence(model)
    batch = [(x, labels(5))]
    systems = exact.inner_products(batch, batch, batch)
    with pytest.raises(BadSetting, match="above 0"):
        exact.influences(systems, regularization)


@pytest.mark.parametrize(
    ("left", "right"),
    [([1, 1], [1, 1, 1]), ([1, 0], [3, 2, 3]), ([4, 2], [1, 0, 1]), ([12, 9], [11, 12, 10])],
)
def test_inner_products_are_those_of_the_dense_gradients(left, right):
    torch.manual_seed(0)
    one, other = layer_gradients(left), layer_gradients(right)
    dense = [gradients.per_example().flatten(1) for gradients in (one, other)]
    assert_equal(inner_products(one, other), dense[0] @ dense[1].T)


def layer_gradients(counts):
    """Random gradients of examples with so many positions each."""
    rows = sum(counts)
    activations, output_gradients = torch.randn(rows, 5).double(), torch.randn(rows, 4).double()
    example = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    token = torch.cat([torch.arange(count) for count in counts])
    return LayerGradients(activations, output_gradients, example, token, len(counts))


def test_an_empty_loader_is_told():
    model = perceptron(4, 3, 2)
    with pytest.raises(EmptyLoader, match="at least one"):
        ExactInfluence(model).inner_products([], [], [])


def test_a_layer_that_no_gradient_reaches_adds_nothing():
    """Its share of every inner product is zero."""
    model = perceptron(4, 3, 2)
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight.zero_()
    train, test = (vectors(5, 4), labels(5)), (vectors(3, 4, seed=1), labels(3, seed=1))
    for joint in (True, False):
        exact = ExactInfluence(model, joint=joint)
        systems = exact.inner_products([train], [test], [train])
        expected = dense_influences(model, train, test, joint)
        assert_equal(exact.influences(systems, DAMPING), expected)


def test_directions_are_taken_in_float32_though_the_model_is_bfloat16():
    model, train = perceptron(4, 3, 2).bfloat16(), (vectors(5, 4).bfloat16(), labels(5))
    dtypes = []

    class Likelihood(Categorical):
        def fisher_directions(self, outputs, draws, labels):
            dtypes.append(outputs.dtype)
            return super().fisher_directions(outputs, draws, labels)

    exact = ExactInfluence(model, likelihood=Likelihood())
    exact.inner_products([train], [train], [train])
    assert dtypes == [torch.float32]


def test_the_exact_solve_says_the_same_in_inference_mode(case):
    model, train, test = case
    exact = ExactInfluence(model)
    expected = exact.influences(exact.inner_products([train], [test], [train]), DAMPING)
    with torch.inference_mode():
        found = exact.influences(exact.inner_products([train], [test], [train]), DAMPING)
    assert_equal(found, expected)
