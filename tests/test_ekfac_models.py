"""Layers and models that behave in their own way: each is right, or refused by name with a cure."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.ekfac import EkfacInfluence, ExactInfluence
from support.ekfac.errors import LayerNotSupported, ModelInTrainingMode, OutputsNotSupported, WrongModel
from tests.dense import (
    Doubled,
    assert_same,
    composed,
    labels,
    loss_gradients,
    perceptron,
    plain_gradients,
    sentences,
    token_classifier,
    vectors,
)

X, Y = vectors(5, 4), labels(5)
TOKENS = sentences(5, 3, 4, 2, 5)


def engine(model, x=X):
    return EkfacInfluence(model).fit([(x,)])


def two_layers(call):
    """One layer called as `call` says, and a plain one."""
    widths = {"layer": (4, 3), "last": (3, 2)}
    return composed(lambda model, x: model.last(torch.tanh(call(model.layer, x))), **widths)


def doubled():
    model = two_layers(lambda layer, x: layer(x))
    model.layer.__class__ = Doubled
    return model


def answering(change):
    """A token classifier whose logits and inputs go through `change`."""
    model = token_classifier()
    logits = model.forward
    model.forward = lambda ids: change(logits(ids), ids)
    return model


# Right


def test_gradients_are_not_lost_behind_a_tensor_that_the_model_makes():
    """It requires gradients; what `a` says goes on without them."""

    def gated(model, x):
        hidden = x.new_zeros(len(x), 5).requires_grad_() + torch.sigmoid(model.a(x)).detach()
        return model.c(torch.tanh(model.b(hidden)))

    model = composed(gated, a=(4, 5), b=(5, 5), c=(5, 2))
    found = plain_gradients(engine(model), X[:1], Y[:1])
    nn.functional.cross_entropy(model(X[:1]), Y[:1]).backward()
    for name in "bc":
        assert_same(found[name][0, :, :-1], model.get_submodule(name).weight.grad)
    assert not found["a"].any()


def test_layers_side_by_side_each_start_the_graph():
    fork = composed(lambda model, x: torch.tanh(model.left(x)) * model.right(x), left=(4, 2), right=(4, 2))
    found = plain_gradients(engine(fork), X, Y)
    for n, expected in enumerate(loss_gradients(fork, X, Y)):
        assert_same({name: gradients[n] for name, gradients in found.items()}, expected)


@pytest.mark.parametrize("where", ["inputs", "embeddings"])
def test_inputs_that_require_gradients_change_nothing_and_get_none(where):
    model, x = (perceptron(4, 3, 2), X.clone()) if where == "inputs" else (token_classifier(), TOKENS)
    expected = engine(model, x).influences(x, Y)
    if where == "inputs":
        x.requires_grad_()
    else:
        model.embedding.register_forward_hook(lambda _, __, output: output.requires_grad_())
    assert_same(engine(model, x).influences(x, Y), expected)
    assert x.grad is None


def test_a_layer_called_by_keyword_is_called_all_the_same():
    expected = engine(two_layers(lambda layer, x: layer(x))).influences(X, Y)
    assert_same(engine(two_layers(lambda layer, x: layer(input=x))).influences(X, Y), expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing_is_right_or_refused():
    expected = engine(two_layers(lambda layer, x: layer(torch.tanh(x)))).influences(X, Y)
    kept = two_layers(lambda layer, x: layer(checkpoint(torch.tanh, x, use_reentrant=False)))
    assert_same(engine(kept).influences(X, Y), expected)
    with pytest.raises(LayerNotSupported, match=r"'layer' is called under torch.no_grad\(\)"):
        engine(two_layers(lambda layer, x: checkpoint(layer, x, use_reentrant=True)))


def test_layers_without_any_gradient_score_zero():
    dead = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    dead[0].bias.data -= 100
    fresh_lora = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    fresh_lora[1].weight.data.zero_()
    for model in (dead, fresh_lora.eval()):
        fitted = engine(model)
        assert (fitted.influences_by_layer(X, Y)["0"] == 0).all()
        assert fitted.influences(X, Y).shape == (5, 5)
        assert fitted.token_influences(X, Y, X, Y).shape == (5, 5, 1)
        assert fitted.influences_by_label(X, Y, X).shape == (5, 5, 2)


# Refused


def test_a_subclass_of_linear_that_does_more_is_refused_by_name():
    with pytest.raises(LayerNotSupported, match=r"'layer'.*5.0e-01.*subclass of Linear"):
        engine(doubled())
    with pytest.raises(LayerNotSupported, match="subclass of Linear"):
        ExactInfluence(doubled()).inner_products(*3 * [[(X, Y)]])


def test_batch_and_positions_exchanged_are_refused_though_both_have_one_size():
    def exchanging(model, x):  # (2, 2, 4)
        return model.last(torch.tanh(model.layer(x.transpose(0, 1))).mean(dim=0))

    with pytest.raises(LayerNotSupported, match="batch and positions exchanged"):
        engine(composed(exchanging, layer=(4, 3), last=(3, 2)), X[:4].view(2, 2, 4))


def test_a_model_that_sees_padding_is_refused():
    with pytest.raises(OutputsNotSupported, match="Does the model see padding"):
        engine(answering(lambda logits, ids: logits / ids.shape[1]), TOKENS)


def test_a_model_that_sees_its_neighbours_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=0), nn.Linear(3, 2)).double().eval()
    with pytest.raises(OutputsNotSupported, match="other examples"):
        engine(model)


def test_a_parametrised_layer_is_refused_with_a_cure_that_works():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2)).eval()
    model[0].parametrizations.requires_grad_(False)
    with pytest.raises(LayerNotSupported, match=r"'0' has parameters bias.*get_submodule\('0'\)"):
        EkfacInfluence(model)
    model.get_submodule("0").requires_grad_(False)
    assert EkfacInfluence(model).layer_names == ["1"]


def test_curvature_is_not_loaded_by_a_model_that_does_something_else_with_the_same_weights(tmp_path):
    def bounded():
        return answering(lambda logits, _: torch.tanh(logits))

    fitted = engine(bounded(), TOKENS)
    fitted.save(tmp_path / "curvature")
    loaded = EkfacInfluence.load(tmp_path / "curvature", bounded())
    assert_same(loaded.influences(TOKENS, Y), fitted.influences(TOKENS, Y))
    with pytest.raises(WrongModel, match="does something else with them.*Fit this one"):
        EkfacInfluence.load(tmp_path / "curvature", answering(lambda logits, _: torch.relu(logits)))


def test_a_curvature_is_loaded_by_a_model_in_eval_mode_only(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double().eval()
    model[1].requires_grad_(False)
    engine(model).save(tmp_path / "curvature")
    before = model[1].running_mean.clone()
    with pytest.raises(ModelInTrainingMode, match=r"model.eval\(\)"):
        EkfacInfluence.load(tmp_path / "curvature", model.train())
    assert_same(model[1].running_mean, before)
