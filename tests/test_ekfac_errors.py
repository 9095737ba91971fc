"""Every refusal of the engine, by the message its user sees."""

import re

import pytest
import torch
from torch import nn

from support.ekfac import EkfacInfluence, Gaussian, errors
from tests.dense import assert_same, composed, labels, perceptron, sentences, token_classifier, vectors

X, Y = vectors(3, 4), labels(3)


def fitted(model=None):
    return EkfacInfluence(model or perceptron(4, 3, 2), hessian_regularization=1e-3).fit([(X, Y)])


def says(error, *words):
    return pytest.raises(error, match=".*".join(re.escape(word) for word in words))


def with_a_norm():
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).eval()


def with_a_scale():
    model = token_classifier()
    model.scale = nn.Parameter(torch.ones(1))
    return model


def with_tied_weights():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).eval()
    model[1].weight = model[0].weight
    return model


def frozen():
    return perceptron(4, 2).requires_grad_(False)


def half_frozen(part):
    def build():
        model = perceptron(4, 3, 2)
        getattr(model[2], part).requires_grad_(False)
        return model

    return build


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (
            with_a_norm,
            errors.LayerNotSupported,
            ("'1' (LayerNorm)", "get_submodule('1').requires_grad_(False)"),
        ),
        (with_a_scale, errors.LayerNotSupported, ("TokenClassifier", "requires gradients")),
        (with_tied_weights, errors.LayerNotSupported, ("'0' and '1' share a parameter",)),
        (frozen, errors.NothingToTrack, ("No layer requires gradients", "requires_grad_(True)")),
        (half_frozen("bias"), errors.LayerHalfFrozen, ("'2'", "weight requires gradients, bias does not")),
        (half_frozen("weight"), errors.LayerHalfFrozen, ("'2'", "bias requires gradients, weight does not")),
    ],
)
def test_a_model_whose_tracked_parameters_are_not_linear_layers_is_refused_at_construction(
    build, error, words
):
    with says(error, *words):
        EkfacInfluence(build())


@pytest.mark.parametrize("value", [-1e-5, float("nan"), float("inf"), "automatic"])
def test_a_regularization_that_is_no_number_from_zero_up_is_refused(value):
    with says(errors.BadSetting, repr(value), "≥ 0", "'auto'"):
        EkfacInfluence(perceptron(4, 2), hessian_regularization=value)
    engine = fitted()
    with says(errors.BadSetting, repr(value)):
        engine.hessian_regularization = value
    assert engine.hessian_regularization == 1e-3


CALLS = {
    "influences": lambda engine, x, y: engine.influences(x, y, x, y),
    "influences_by_layer": lambda engine, x, y: engine.influences_by_layer(x, y, x, y),
    "influence_factors": lambda engine, x, y: engine.influence_factors(x, y),
    "influences_from_factors": lambda engine, x, y: engine.influences_from_factors(
        engine.influence_factors(X, Y), x, y
    ),
    "self_influences": lambda engine, x, y: engine.self_influences(x, y),
    "relative_influences": lambda engine, x, y: engine.relative_influences(x, y, x, y),
    "score": lambda engine, x, y: engine.score([(x, y)], [(x, y)]),
    "influences_by_label": lambda engine, x, y: engine.influences_by_label(x, y, x),
    "token_influences": lambda engine, x, y: engine.token_influences(x, y, x, y),
    "explore": lambda engine, x, y: engine.explore_hessian_regularization(x, y, [1e-3]),
}
EVERY_CALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@EVERY_CALL
def test_every_call_before_fit_is_refused_and_saving_leaves_no_file(call, tmp_path):
    engine = EkfacInfluence(perceptron(4, 3, 2))
    assert not engine.is_fitted
    with says(errors.NotFitted, "Call fit(loader) first"):
        call(engine, X, Y)
    with says(errors.NotFitted, "Call fit(loader) first"):
        engine.save(tmp_path / "nothing")
    assert not list(tmp_path.iterdir())


def test_a_loader_that_is_empty_or_lacks_batches_for_a_second_pass_is_refused():
    with says(errors.EmptyLoader, "no batch"):
        EkfacInfluence(perceptron(4, 2)).fit([])
    with says(errors.EmptyLoader, "corrected eigenvalues", "on every pass"):
        EkfacInfluence(perceptron(4, 2), memory_budget=1).fit(batch for batch in [(X, Y)])


@EVERY_CALL
@pytest.mark.parametrize(
    ("y", "words"),
    [
        (labels(2), ("3 examples come with 2 labels",)),
        (torch.tensor([0, 2, 1]), ("Label 2 is outside the model's classes 0 to 1",)),
        (torch.tensor([0, -1, 1]), ("Label -1 is outside",)),
        (torch.tensor([0.0, 1.0, 1.0]), ("float32", "labels.long()")),
        (torch.zeros(3, 2).long(), ("shape (3, 2)", "expected (3,)")),
    ],
)
def test_labels_that_do_not_fit_are_refused_by_every_call(call, y, words):
    with says(errors.LabelsMismatch, *words):
        call(fitted(), X, y)


def test_training_labels_that_do_not_fit_or_are_missing_are_refused_too():
    with says(errors.LabelsMismatch, "3 examples come with 2 labels"):
        fitted().influences(X, Y, X, Y[:2])
    with says(errors.LabelsMismatch, "come together", "one of x and y is missing"):
        fitted().influences(X, Y, X)


def test_targets_of_another_shape_than_the_outputs_are_refused():
    engine = EkfacInfluence(perceptron(4, 3), likelihood=Gaussian()).fit([(X,)])
    with says(errors.LabelsMismatch, "shape (3, 2)", "outputs (3, 3)"):
        engine.self_influences(X, vectors(3, 2))


@EVERY_CALL
def test_a_model_in_training_mode_is_refused_by_the_modules_name(call):
    model = perceptron(4, 3, 2)
    engine = fitted(model)
    model[1].train()
    with says(errors.ModelInTrainingMode, "'1' is in training mode", "model.eval()"):
        call(engine, X, Y)
    with says(errors.ModelInTrainingMode, "The model is in training mode"):
        fitted(model.train())


@EVERY_CALL
def test_nan_in_the_inputs_is_refused_by_every_call(call):
    with says(errors.NotFinite, "'0' has NaN or infinite activations"):
        call(fitted(), X * torch.nan, Y)


def test_nan_in_activations_names_the_layer_and_a_failed_fit_leaves_the_earlier_one():
    model = perceptron(4, 3, 2)
    engine = fitted(model)
    expected, probe = engine.influences(X, Y), engine.probe
    with says(errors.NotFinite, "'0' has NaN or infinite activations"):
        engine.fit([(X, Y), (X / 0, Y)])
    assert_same(engine.influences(X, Y), expected, 0)
    model[0].weight.data[0, 0] = torch.nan
    with says(errors.NotFinite, "'2' has NaN or infinite activations"):
        engine.fit([(X, Y)])
    assert engine.probe is probe


def test_factors_of_other_layers_are_refused():
    factors = fitted(perceptron(4, 5, 2)).influence_factors(X, Y)
    with says(errors.FactorsMismatch, "'0'", "(3, 5, 5)", "(test, 3, 5)"):
        fitted(perceptron(4, 3, 2)).influences_from_factors(factors, X, Y)
    with says(errors.FactorsMismatch, "['0', '2']", "['0']"):
        fitted(perceptron(4, 2)).influences_from_factors(factors, X, Y)


def overwriting(model, x):
    x = torch.tanh(model.one(x)).clone()
    x += model.two(x)
    return x


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        (lambda model, x: model.one(model.two(model.two(x))), ("'two' is called more than once",)),
        (lambda model, x: model.one(x), ("'two'", "not called")),
        (overwriting, ("input of 'two' was changed in place", "x = x + y")),
    ],
    ids=["called twice", "not called", "overwritten"],
)
def test_a_layer_that_is_used_in_another_way_is_refused_by_name(compute, words):
    with says(errors.LayerNotSupported, *words):
        EkfacInfluence(composed(compute, one=(4, 4), two=(4, 4))).fit([(X,)])


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (lambda logits: {"logits": logits}, ("returned a dict", "Wrap the model")),
        (lambda logits: logits[:, None], ("shape (3, 1, 2)", "(batch, classes)")),
        (lambda logits: logits[:, :1], ("one output", "Gaussian")),
        (lambda logits: logits.mean(dim=0), ("shape (2,) for a batch of 2",)),
        (lambda logits: logits.detach(), ("don't depend on any tracked layer", "detach()")),
    ],
)
def test_outputs_that_are_not_logits_of_the_tracked_layers_are_refused(outputs, words):
    model = composed(lambda model, x: outputs(model.linear(x)), linear=(4, 2))
    with says(errors.OutputsNotSupported, *words):
        EkfacInfluence(model).fit([(X,)])


@pytest.mark.parametrize(
    ("reshape", "words"),
    [
        (lambda h: h.reshape(-1, 3), ("shape (10, 3) for a batch of 2",)),
        (lambda h: h.reshape(2, 1, 5, 3), ("shape (2, 1, 5, 3)",)),
        (lambda h: h[:, :4], ("shape (2, 4, 3)", "mask has shape (2, 5)")),
    ],
)
def test_inputs_whose_positions_are_unknown_are_refused_by_name(reshape, words):
    def reshaped(model, ids):
        return model.linear(reshape(model.embedding(ids))).reshape(len(ids), -1, 2).sum(1)

    model = composed(reshaped, linear=(3, 2))
    model.embedding = nn.Embedding(11, 3).double().eval().requires_grad_(False)
    model.token_mask = lambda ids: ids != 0
    with says(errors.LayerNotSupported, "'linear'", *words):
        EkfacInfluence(model).fit([(sentences(5, 3),)])
