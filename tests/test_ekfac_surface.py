"""Relations between the public calls: each is a sum, a slice or a stream of another."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from support.ekfac import Categorical, EkfacInfluence, Gaussian
from support.ekfac.errors import BadSetting, EmptyLoader, LabelsMismatch
from tests import dense
from tests.dense import assert_same, labels, perceptron, sentences, token_classifier, vectors

DAMPING = 1e-3
X, Y = sentences(5, 3, 4, 2, 5), labels(5)
QUERIES, QUERY_LABELS = sentences(3, 5, 4, seed=1), labels(3, seed=1)


def fitted(model=None, x=X, **settings):
    settings = {"hessian_regularization": DAMPING, **settings}
    return EkfacInfluence(model or token_classifier(), **settings).fit([(x,)])


def batches(x, y, size):
    return DataLoader(TensorDataset(x, y), batch_size=size)


def test_scores_stream_influences_over_two_loaders_relative_ones_over_the_root_of_self_influence():
    engine = fitted()
    loaders = batches(QUERIES, QUERY_LABELS, 2), batches(X, Y, 4)
    plain = engine.influences(QUERIES, QUERY_LABELS, X, Y)
    relative = plain / engine.self_influences(X, Y).sqrt()
    assert_same(engine.score(*loaders), plain)
    assert_same(engine.score(*loaders, "relative"), relative)
    assert_same(engine.relative_influences(QUERIES, QUERY_LABELS, X, Y), relative)
    carrying_more = [(QUERIES, QUERY_LABELS, ["text"])], [(X, Y, ["text"], 5)]
    assert_same(engine.score(*carrying_more), plain)


def test_what_can_not_be_asked_is_refused_by_name():
    engine = fitted()
    with pytest.raises(BadSetting, match="'relativ': there are 'plain', 'relative'"):
        engine.score([(QUERIES, QUERY_LABELS)], [(X, Y)], "relativ")
    with pytest.raises(EmptyLoader, match="The test loader gave no batch"):
        engine.score([], [(X, Y)])
    with pytest.raises(EmptyLoader, match="The training loader gave no batch"):
        engine.score([(X, Y)], [])
    with pytest.raises(BadSetting, match="-1"):
        engine.explore_hessian_regularization(X, Y, regularization_values=[1e-3, -1])


@pytest.mark.parametrize("classes", [2, 3])
def test_influences_by_label_cancel_under_the_models_own_prediction(classes):
    model = token_classifier(classes=classes)
    by_label = fitted(model).influences_by_label(QUERIES, labels(3, classes), X)
    with torch.no_grad():
        p = model(X).softmax(dim=1)
    assert_same((by_label * p).sum(dim=2), torch.zeros(3, 5, dtype=torch.float64))


def test_influences_by_label_need_classes():
    engine = fitted(perceptron(4, 3), vectors(5, 4), likelihood=Gaussian())
    with pytest.raises(LabelsMismatch, match="needs labels that are classes"):
        engine.influences_by_label(vectors(2, 4), vectors(2, 3), vectors(5, 4))


def test_padding_does_not_move_token_influences():
    engine = fitted()
    by_token = engine.token_influences(QUERIES, QUERY_LABELS, X, Y)
    assert by_token.shape == (3, 5, 5)
    longer = engine.token_influences(QUERIES, QUERY_LABELS, nn.functional.pad(X, (0, 3)), Y)
    assert_same(longer, nn.functional.pad(by_token, (0, 3)))


@pytest.mark.parametrize("inputs", ["tokens", "vectors"])
def test_a_layer_with_one_position_gives_its_influence_to_the_first_token(inputs):
    model, x = (token_classifier(), X) if inputs == "tokens" else (perceptron(4, 3, 2), vectors(5, 4))
    for layer in list(dense.linear_layers(model).values())[:-1]:
        layer.requires_grad_(inputs == "vectors")
    engine = fitted(model, x)
    by_token = engine.token_influences(x, Y, x, Y)
    assert_same(by_token[:, :, 0], engine.influences(x, Y))
    assert (by_token[:, :, 1:] == 0).all()


def test_exploring_regularization_equals_setting_each_value_with_the_gradients_taken_once():
    model, values = token_classifier(), [1e-9, 1e-3, 1, "auto"]
    engine, calls = fitted(model), []
    with model.register_forward_hook(lambda *_: calls.append(1)):
        explored = engine.explore_hessian_regularization(X, Y, regularization_values=values)
    assert len(calls) == 1
    assert list(explored) == values
    for value in values:
        engine.hessian_regularization = value
        assert_same(explored[value], engine.influences_by_layer(X, Y), tolerance=1e-8)


MANY, MANY_LABELS = X.repeat(4, 1), Y.repeat(4)
ASKS = {
    lambda engine: engine.fit([(X,), (X,)]): ("covariances", "eigenbases", "corrected eigenvalues"),
    lambda engine: engine.score([(QUERIES, QUERY_LABELS)], 2 * [(X, Y)]): ("training examples",),
    lambda engine: engine.influences_by_label(MANY, MANY_LABELS, MANY): ("influences by label",),
    lambda engine: engine.token_influences(MANY, MANY_LABELS, X, Y): ("influence factors",),
    lambda engine: engine.explore_hessian_regularization(X, Y, [1e-3, 1e-2]): ("λ",),
}


@pytest.mark.parametrize(("ask", "bars"), ASKS.items())
def test_each_part_of_the_work_draws_a_bar_to_its_end(ask, bars, capsys):
    engine = fitted()
    engine.progress = True
    ask(engine)
    drawn = capsys.readouterr().err
    for bar in bars:
        assert f"{bar}: 100%" in drawn


@pytest.mark.parametrize("progress", [True, False])
def test_work_of_one_step_draws_no_bar_and_without_progress_nothing_does(progress, capsys):
    engine = fitted()
    engine.progress = progress
    engine.influences(X, Y)
    assert capsys.readouterr() == ("", "")


def test_the_sampled_fisher_converges_to_the_exact_one():
    model, x, errors = token_classifier(classes=4), sentences(4, 3), []
    block = dense.fisher_blocks(dense.label_gradients(model, x))["classifier"]
    for samples in (10, 1000):
        engine = fitted(model, x, likelihood=Categorical(exact_classes=3, samples=samples))
        axes = dense.eigenbasis(engine.curvature["classifier"])
        exact = (axes.T @ block @ axes).diagonal()
        found = engine.curvature["classifier"].eigenvalues.flatten()
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert errors[1] < 0.1
    assert errors[1] < errors[0]


def test_the_sampled_fisher_is_decided_by_its_seed_and_leaves_the_random_state_alone():
    def eigenvalues(seed):
        engine = fitted(token_classifier(classes=4), likelihood=Categorical(exact_classes=2), seed=seed)
        return engine.curvature["inner"].eigenvalues

    assert_same(eigenvalues(0), eigenvalues(0), 0)
    assert not torch.allclose(eigenvalues(0), eigenvalues(1))
    engine = EkfacInfluence(token_classifier(classes=4), likelihood=Categorical(exact_classes=2))
    state = torch.get_rng_state()
    engine.fit([(X,)])
    assert torch.equal(torch.get_rng_state(), state)
