"""Relations between the public calls: each is a sum, a slice or a stream of another."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from support.ekfac import Categorical, EkfacInfluence, Gaussian
from support.ekfac.errors import BadSetting, EmptyLoader, LabelsMismatch
from tests.dense import (
    fisher_blocks,
    label_gradients,
    labels,
    perceptron,
    sentences,
    token_classifier,
    vectors,
)

DAMPING = 1e-3
X, Y = sentences(5, 3, 4, 2, 5), labels(5)
QUERIES, QUERY_LABELS = sentences(3, 5, 4, seed=1), labels(3, seed=1)


def fitted(model=None, x=X, **settings):
    settings = {"hessian_regularization": DAMPING, **settings}
    return EkfacInfluence(model or token_classifier(), **settings).fit([(x,)])


def assert_same(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def batches(x, y, size):
    return DataLoader(TensorDataset(x, y), batch_size=size)


def test_score_streams_influences_over_two_loaders():
    engine = fitted()
    found = engine.score(batches(QUERIES, QUERY_LABELS, 2), batches(X, Y, 4))
    assert_same(found, engine.influences(QUERIES, QUERY_LABELS, X, Y))


def test_relative_scores_divide_by_the_root_of_the_self_influence():
    engine = fitted()
    found = engine.score(batches(QUERIES, QUERY_LABELS, 2), batches(X, Y, 4), "relative")
    expected = engine.influences(QUERIES, QUERY_LABELS, X, Y) / engine.self_influences(X, Y).sqrt()
    assert_same(found, expected)
    assert_same(engine.relative_influences(QUERIES, QUERY_LABELS, X, Y), expected)


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(BadSetting, match="'relativ': there are 'plain', 'relative'"):
        fitted().score(batches(QUERIES, QUERY_LABELS, 2), batches(X, Y, 4), "relativ")


def test_score_takes_batches_that_carry_more_than_inputs_and_labels():
    engine = fitted()
    found = engine.score([(QUERIES, QUERY_LABELS, ["text"])], [(X, Y, ["text"], 5)])
    assert_same(found, engine.influences(QUERIES, QUERY_LABELS, X, Y))


@pytest.mark.parametrize(("tests", "trains", "side"), [([], [(X, Y)], "test"), ([(X, Y)], [], "training")])
def test_score_refuses_an_empty_loader_by_its_side(tests, trains, side):
    with pytest.raises(EmptyLoader, match=f"The {side} loader gave no batch"):
        fitted().score(tests, trains)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_labels_select_from_influences_by_label(classes):
    engine = fitted(token_classifier(classes=classes))
    query_labels = labels(3, classes, seed=1)
    by_label = engine.influences_by_label(QUERIES, query_labels, X)
    assert by_label.shape == (3, 5, classes)
    for label in range(classes):
        expected = engine.influences(QUERIES, query_labels, X, torch.full((5,), label))
        assert_same(by_label[:, :, label], expected)


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


def test_tokens_add_up_to_influences():
    engine = fitted()
    by_token = engine.token_influences(QUERIES, QUERY_LABELS, X, Y)
    assert by_token.shape == (3, 5, 5)
    assert_same(by_token.sum(dim=2), engine.influences(QUERIES, QUERY_LABELS, X, Y))


def test_padding_has_no_token_influence_and_does_not_move_the_others():
    engine = fitted()
    by_token = engine.token_influences(QUERIES, QUERY_LABELS, X, Y)
    assert (by_token[:, X == 0] == 0).all()
    longer = engine.token_influences(QUERIES, QUERY_LABELS, nn.functional.pad(X, (0, 3)), Y)
    assert_same(longer, nn.functional.pad(by_token, (0, 3)))


def test_a_layer_with_one_position_gives_its_influence_to_the_first_token():
    model = token_classifier()
    model.inner.requires_grad_(False)
    model.outer.requires_grad_(False)
    engine = fitted(model)
    by_token = engine.token_influences(QUERIES, QUERY_LABELS, X, Y)
    assert_same(by_token[:, :, 0], engine.influences(QUERIES, QUERY_LABELS, X, Y))
    assert (by_token[:, :, 1:] == 0).all()


def test_vectors_without_a_mask_are_one_token():
    engine = fitted(perceptron(4, 3, 2), vectors(5, 4))
    x = vectors(5, 4)
    by_token = engine.token_influences(x, Y, x, Y)
    assert_same(by_token.squeeze(2), engine.influences(x, Y, x, Y))


def test_exploring_regularization_equals_setting_each_value():
    engine = fitted()
    values = [1e-9, 1e-3, 1, "auto"]
    explored = engine.explore_hessian_regularization(X, Y, regularization_values=values)
    assert list(explored) == values
    for value in values:
        engine.hessian_regularization = value
        expected = engine.influences_by_layer(X, Y)
        assert list(explored[value]) == list(expected)
        for name in expected:
            assert_same(explored[value][name], expected[name], tolerance=1e-8)


def test_exploring_takes_the_gradients_once():
    model = token_classifier()
    engine = fitted(model)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    engine.explore_hessian_regularization(X, Y, regularization_values=[1e-3, 1e-2, 1e-1])
    assert len(calls) == 1


def test_exploring_refuses_a_bad_value_before_any_work():
    with pytest.raises(BadSetting, match="-1"):
        fitted().explore_hessian_regularization(X, Y, regularization_values=[1e-3, -1])


@pytest.mark.parametrize("call", ["score", "influences_by_label", "token_influences", "explore"])
def test_progress_is_drawn_to_its_end(call, capsys):
    engine = fitted()
    engine.progress = True
    many, many_labels = X.repeat(4, 1), Y.repeat(4)
    asks = {
        "score": lambda: engine.score([(QUERIES, QUERY_LABELS)], 2 * [(X, Y)]),
        "influences_by_label": lambda: engine.influences_by_label(many, many_labels, many),
        "token_influences": lambda: engine.token_influences(many, many_labels, X, Y),
        "explore": lambda: engine.explore_hessian_regularization(X, Y, [1e-3, 1e-2]),
    }
    asks[call]()
    assert "100%" in capsys.readouterr().err


def test_fit_draws_a_bar_for_each_of_its_three_parts(capsys):
    EkfacInfluence(token_classifier(), progress=True).fit([(X,), (X,)])
    shown = capsys.readouterr().err
    for part in ["covariances", "eigenbases", "corrected eigenvalues"]:
        assert f"{part}: 100%" in shown


def test_work_of_one_step_draws_no_bar(capsys):
    engine = fitted()
    engine.progress = True
    engine.influences(X, Y)
    assert capsys.readouterr().err == ""


def test_without_progress_nothing_is_drawn(capsys):
    fitted().influences(X, Y)
    assert capsys.readouterr() == ("", "")


def test_the_sampled_fisher_converges_to_the_exact_one():
    x = sentences(4, 3)
    blocks = fisher_blocks(label_gradients(token_classifier(classes=4), x))
    errors = []
    for samples in (10, 1000):
        likelihood = Categorical(exact_classes=3, samples=samples)
        engine = fitted(token_classifier(classes=4), x, likelihood=likelihood)
        basis = engine.curvature["classifier"].basis
        axes = torch.kron(basis.output_gradient.contiguous(), basis.activation.contiguous())
        exact = (axes.T @ blocks["classifier"] @ axes).diagonal()
        found = engine.curvature["classifier"].eigenvalues.flatten()
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert errors[1] < 0.1
    assert errors[1] < errors[0]


def test_the_sampled_fisher_is_the_same_for_one_seed_and_another_for_another():
    def eigenvalues(seed):
        engine = fitted(token_classifier(classes=4), likelihood=Categorical(exact_classes=2), seed=seed)
        return engine.curvature["inner"].eigenvalues

    assert_same(eigenvalues(0), eigenvalues(0), 0)
    assert not torch.allclose(eigenvalues(0), eigenvalues(1))


def test_sampling_leaves_the_random_state_alone():
    engine = EkfacInfluence(token_classifier(classes=4), likelihood=Categorical(exact_classes=2))
    before = torch.get_rng_state()
    engine.fit([(X,)])
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
