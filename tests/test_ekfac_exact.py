"""The exact Gauss–Newton solve against dense float64 solves."""

import pytest
import torch

from support.ekfac import Categorical, ExactInfluence, Gaussian
from support.ekfac.errors import BadSetting, EmptyLoader
from tests import dense
from tests.dense import assert_same, labels, perceptron, sentences, token_classifier, vectors

DAMPING = 0.03
CASES = {
    "no gradient in a layer": (perceptron(4, 3, 2), vectors(5, 4), vectors(3, 4, seed=1), 2),
    "vectors, two classes": (perceptron(4, 3, 2), vectors(5, 4), vectors(3, 4, seed=1), 2),
    "vectors, three classes": (perceptron(4, 5, 3), vectors(5, 4), vectors(2, 4, seed=1), 3),
    "no bias": (perceptron(4, 3, 2, bias=False), vectors(6, 4), vectors(2, 4, seed=1), 2),
    "padded tokens": (token_classifier(), sentences(5, 2, 4, 3), sentences(3, 5, seed=1), 2),
}


for parameter in CASES["no gradient in a layer"][0].parameters():
    parameter.data.zero_()


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    """Model, training examples with labels, test examples with labels."""
    model, x, x_test, classes = request.param
    return model, (x, labels(len(x), classes)), (x_test, labels(len(x_test), classes, seed=1))


def joined(gradients):
    """All layers as one, so that a Fisher block is the joint matrix."""
    return {"all": torch.cat([part.flatten() for part in gradients.values()])}


def jointly(weighted):
    return [[(weight, joined(part)) for weight, part in example] for example in weighted]


def dense_influences(model, train, test, joint, damping=DAMPING):
    weighted = dense.label_gradients(model, train[0])
    left, right = dense.loss_gradients(model, *test), dense.loss_gradients(model, *train)
    if joint:
        weighted = jointly(weighted)
        left, right = ([joined(part) for part in side] for side in (left, right))
    return dense.damped_influences(dense.fisher_blocks(weighted), left, right, damping)


def split(pair, sizes):
    return list(zip(pair[0].split(sizes), pair[1].split(sizes), strict=True))


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "per layer"])
def test_exact_influences_are_the_dense_damped_solve_relative_ones_over_the_root_of_its_diagonal(case, joint):
    model, train, test = case
    exact = ExactInfluence(model, joint=joint)
    systems = exact.inner_products([train], [test], [train])
    expected = dense_influences(model, train, test, joint)
    assert_same(exact.influences(systems, DAMPING), expected)
    norms = dense_influences(model, train, train, joint).diagonal().sqrt()
    assert_same(exact.influences(systems, DAMPING, relative=True), expected / norms)


def test_batches_and_inference_mode_change_nothing_in_exact_influences(case):
    model, train, test = case
    exact = ExactInfluence(model)
    whole = exact.inner_products([train], [test], [train])
    with torch.inference_mode():
        parts = exact.inner_products(split(train, [2, len(train[0]) - 2]), split(test, 1), [train])
        found = exact.influences(parts, DAMPING)
    assert_same(found, exact.influences(whole, DAMPING))


def test_a_gaussian_likelihood_has_its_own_exact_solve():
    model, x, x_test = perceptron(4, 3, 2), vectors(5, 4), vectors(3, 4, seed=1)
    y, y_test = vectors(5, 2, seed=2), vectors(3, 2, seed=3)
    exact = ExactInfluence(model, joint=False, likelihood=Gaussian())
    systems = exact.inner_products([(x,)], [(x_test, y_test)], [(x, y)])
    blocks = dense.fisher_blocks(dense.output_gradient_matrices(model, x))
    sides = [dense.gaussian_loss_gradients(model, *pair) for pair in ((x_test, y_test), (x, y))]
    assert_same(exact.influences(systems, DAMPING), dense.damped_influences(blocks, *sides, DAMPING))


@pytest.mark.parametrize("regularization", [0, -1.0, float("nan")])
def test_the_exact_solve_wants_a_regularization_above_zero(regularization):
    model, x = perceptron(4, 3, 2), vectors(5, 4)
    exact = ExactInfluence(model)
    batch = [(x, labels(5))]
    systems = exact.inner_products(batch, batch, batch)
    with pytest.raises(BadSetting, match="above 0"):
        exact.influences(systems, regularization)


def test_an_empty_loader_is_told():
    model = perceptron(4, 3, 2)
    with pytest.raises(EmptyLoader, match="at least one"):
        ExactInfluence(model).inner_products([], [], [])


def test_directions_are_taken_in_float32_though_the_model_is_bfloat16():
    model, train = perceptron(4, 3, 2).bfloat16(), (vectors(5, 4).bfloat16(), labels(5))
    dtypes = []

    class Likelihood(Categorical):
        def fisher_directions(self, outputs, draws):
            dtypes.append(outputs.dtype)
            return super().fisher_directions(outputs, draws)

    exact = ExactInfluence(model, likelihood=Likelihood())
    exact.inner_products([train], [train], [train])
    assert dtypes == [torch.float32]
