"""Every refusal of the engine, by the message its user sees."""

import re

import pytest
import torch
from torch import nn

from support.ekfac import EkfacInfluence, Gaussian
from support.ekfac.errors import (
    BadSetting,
    EmptyLoader,
    FactorsMismatch,
    LabelsMismatch,
    LayerHalfFrozen,
    LayerNotSupported,
    ModelInTrainingMode,
    NotFinite,
    NotFitted,
    NothingToTrack,
    OutputsNotSupported,
)
from tests.dense import labels, perceptron, sentences, token_classifier, vectors

X, Y = vectors(3, 4), labels(3)


def fitted(model=None):
    return EkfacInfluence(model or perceptron(4, 3, 2), hessian_regularization=1e-3).fit([(X, Y)])


def says(error, *words):
    return pytest.raises(error, match=".*".join(re.escape(word) for word in words))


def test_a_module_that_is_not_linear_is_refused_at_construction():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).eval()
    with says(LayerNotSupported, "'1' (LayerNorm)", "get_submodule('1').requires_grad_(False)"):
        EkfacInfluence(model)


def test_a_parameter_of_the_model_itself_is_refused_at_construction():
    model = token_classifier()
    model.scale = nn.Parameter(torch.ones(1))
    with says(LayerNotSupported, "TokenClassifier", "requires gradients"):
        EkfacInfluence(model)


@pytest.mark.parametrize(("frozen", "wanted"), [("bias", "weight"), ("weight", "bias")])
def test_a_half_frozen_layer_is_refused_at_construction(frozen, wanted):
    model = perceptron(4, 3, 2)
    getattr(model[2], frozen).requires_grad_(False)
    with says(LayerHalfFrozen, "'2'", f"{wanted} requires gradients, {frozen} does not"):
        EkfacInfluence(model)


def test_tied_weights_are_refused_at_construction():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).eval()
    model[1].weight = model[0].weight
    with says(LayerNotSupported, "'0' and '1' share a parameter"):
        EkfacInfluence(model)


def test_a_model_without_gradients_is_refused_at_construction():
    with says(NothingToTrack, "No layer requires gradients", "requires_grad_(True)"):
        EkfacInfluence(perceptron(4, 2).requires_grad_(False))


@pytest.mark.parametrize("value", [-1e-5, float("nan"), float("inf"), "automatic"])
def test_a_regularization_that_is_no_number_from_zero_up_is_refused(value):
    with says(BadSetting, repr(value), "≥ 0", "'auto'"):
        EkfacInfluence(perceptron(4, 2), hessian_regularization=value)
    engine = fitted()
    with says(BadSetting, repr(value)):
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
def test_every_call_before_fit_is_refused(call):
    engine = EkfacInfluence(perceptron(4, 3, 2))
    assert not engine.is_fitted
    with says(NotFitted, "Call fit(loader) first"):
        call(engine, X, Y)


def test_saving_before_fit_is_refused_and_leaves_no_file(tmp_path):
    with says(NotFitted, "Call fit(loader) first"):
        EkfacInfluence(perceptron(4, 3, 2)).save(tmp_path / "nothing")
    assert not list(tmp_path.iterdir())


def test_an_empty_loader_is_refused():
    with says(EmptyLoader, "no batch"):
        EkfacInfluence(perceptron(4, 2)).fit([])


def test_a_loader_that_gives_its_batches_once_is_refused():
    with says(EmptyLoader, "corrected eigenvalues", "on every pass"):
        EkfacInfluence(perceptron(4, 2)).fit(batch for batch in [(X, Y)])


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
    with says(LabelsMismatch, *words):
        call(fitted(), X, y)


def test_labels_that_do_not_fit_are_refused_on_the_training_side_too():
    with says(LabelsMismatch, "3 examples come with 2 labels"):
        fitted().influences(X, Y, X, Y[:2])


def test_training_inputs_without_labels_are_refused_rather_than_ignored():
    with says(LabelsMismatch, "come together", "one of x and y is missing"):
        fitted().influences(X, Y, X)


def test_targets_of_another_shape_than_the_outputs_are_refused():
    engine = EkfacInfluence(perceptron(4, 3), likelihood=Gaussian()).fit([(X,)])
    with says(LabelsMismatch, "shape (3, 2)", "outputs (3, 3)"):
        engine.self_influences(X, vectors(3, 2))


@EVERY_CALL
def test_a_model_in_training_mode_is_refused_by_the_modules_name(call):
    model = perceptron(4, 3, 2)
    engine = fitted(model)
    model[1].train()
    with says(ModelInTrainingMode, "'1' is in training mode", "model.eval()"):
        call(engine, X, Y)


def test_fitting_a_model_in_training_mode_is_refused():
    model = perceptron(4, 3, 2).train()
    with says(ModelInTrainingMode, "The model is in training mode"):
        EkfacInfluence(model).fit([(X, Y)])


@EVERY_CALL
def test_nan_in_the_inputs_is_refused_by_every_call(call):
    with says(NotFinite, "'0' has NaN or infinite activations"):
        call(fitted(), X * torch.nan, Y)


def test_nan_in_activations_names_the_layer():
    model = perceptron(4, 3, 2)
    engine = fitted(model)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with says(NotFinite, "'2' has NaN or infinite activations"):
        engine.fit([(X, Y)])
    with says(NotFinite, "'0' has NaN or infinite activations"):
        engine.fit([(X / 0, Y)])


def test_a_failed_fit_leaves_the_earlier_one():
    model = perceptron(4, 3, 2)
    engine = fitted(model)
    expected = engine.influences(X, Y)
    with says(NotFinite, "'0'"):
        engine.fit([(X, Y), (X / 0, Y)])
    torch.testing.assert_close(engine.influences(X, Y), expected, rtol=0, atol=0)


def test_factors_of_other_layers_are_refused():
    factors = fitted(perceptron(4, 5, 2)).influence_factors(X, Y)
    with says(FactorsMismatch, "'0'", "(3, 5, 5)", "(test, 3, 5)"):
        fitted(perceptron(4, 3, 2)).influences_from_factors(factors, X, Y)
    with says(FactorsMismatch, "['0', '2']", "['0']"):
        fitted(perceptron(4, 2)).influences_from_factors(factors, X, Y)


def test_a_layer_called_twice_is_refused_by_name():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(4, 4)

        def forward(self, x):
            return self.shared(self.shared(x))

    with says(LayerNotSupported, "'shared' is called more than once"):
        EkfacInfluence(Twice().double().eval()).fit([(X,)])


def test_a_layer_never_called_is_refused_by_name():
    model = token_classifier()
    model.spare = nn.Linear(3, 3)
    model.eval()
    with says(LayerNotSupported, "'spare'", "not called"):
        EkfacInfluence(model).fit([(sentences(3, 2),)])


def test_an_input_overwritten_in_place_is_refused_by_name():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = torch.tanh(self.first(x)).clone()
            x += self.second(x)
            return x

    with says(LayerNotSupported, "input of 'second' was changed in place", "x = x + y"):
        EkfacInfluence(Residual().double().eval()).fit([(X,)])


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        (lambda logits: {"logits": logits}, ("returned a dict", "Wrap the model")),
        (lambda logits: logits[:, None], ("shape (3, 1, 2)", "(batch, classes)")),
        (lambda logits: logits.mean(dim=0), ("shape (2,) for a batch of 2",)),
        (lambda logits: logits.detach(), ("don't depend on any tracked layer", "detach()")),
    ],
)
def test_outputs_that_are_not_logits_of_the_tracked_layers_are_refused(outputs, words):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            return outputs(self.linear(x))

    with says(OutputsNotSupported, *words):
        EkfacInfluence(Other().double().eval()).fit([(X,)])


@pytest.mark.parametrize(
    ("reshape", "words"),
    [
        (lambda h: h.reshape(-1, 3), ("shape (10, 3) for a batch of 2",)),
        (lambda h: h.reshape(2, 1, 5, 3), ("shape (2, 1, 5, 3)",)),
        (lambda h: h[:, :4], ("shape (2, 4, 3)", "mask has shape (2, 5)")),
    ],
)
def test_inputs_whose_positions_are_unknown_are_refused_by_name(reshape, words):
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 3).requires_grad_(False)
            self.linear = nn.Linear(3, 2)

        def token_mask(self, ids):
            return ids != 0

        def forward(self, ids):
            return self.linear(reshape(self.embedding(ids))).reshape(len(ids), -1, 2).sum(1)

    with says(LayerNotSupported, "'linear'", *words):
        EkfacInfluence(Reshaped().eval()).fit([(sentences(5, 3),)])
