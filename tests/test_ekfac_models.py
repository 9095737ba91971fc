"""Layers and models that behave in their own way: each right, or refused by name with a cure that works."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from support.ekfac import Bernoulli, EkfacInfluence, ExactInfluence
from support.ekfac.errors import (
    BatchNotSupported,
    LayerNotSupported,
    ModelInTrainingMode,
    OutputsNotSupported,
    WrongModel,
)
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
FLOATS, CLASSES = vectors(6, 4).float(), labels(6)
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


def test_a_model_that_sees_padding_or_its_neighbours_is_refused():
    with pytest.raises(OutputsNotSupported, match="Does the model see padding"):
        engine(answering(lambda logits, ids: logits / ids.shape[1]), TOKENS)
    with pytest.raises(OutputsNotSupported, match="other examples"):
        engine(nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=0), nn.Linear(3, 2)).double().eval())


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


# Models and batches that people have and nobody thinks of


class Widening(nn.Module):
    """A body in float32 under a head in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 2).double()

    def forward(self, x):
        return self.head(self.body(x).relu().double())


def test_layers_of_two_precisions_are_scored_in_the_wider_one():
    engine = EkfacInfluence(Widening().eval()).fit([(FLOATS, CLASSES)])
    found = engine.influences(FLOATS, CLASSES)
    assert found.dtype == torch.float64
    expected = (
        EkfacInfluence(Widening().double().eval())
        .fit([(FLOATS.double(), CLASSES)])
        .influences(FLOATS.double(), CLASSES)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(engine.self_influences(FLOATS, CLASSES), found.diagonal())


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize("layer", [nn.Linear, WithExtraState])
def test_a_comma_in_a_name_and_extra_state_are_saved_and_loaded(tmp_path, layer):
    model = nn.Sequential()
    model.add_module("first, second", layer(4, 2).eval())
    engine = EkfacInfluence(model.eval()).fit([(FLOATS, CLASSES)])
    engine.save(tmp_path / "curvature")
    found = EkfacInfluence.load(tmp_path / "curvature", model).influences(FLOATS, CLASSES)
    assert torch.equal(found, engine.influences(FLOATS, CLASSES))


def test_a_model_made_in_inference_mode_is_refused_and_its_copy_is_taken():
    with torch.inference_mode():
        model = perceptron(4, 3, 2)
    with pytest.raises(LayerNotSupported, match=r"inference_mode.*copy\.deepcopy\(model\) outside"):
        EkfacInfluence(model)
    expected = (
        EkfacInfluence(perceptron(4, 3, 2))
        .fit([(FLOATS.double(), CLASSES)])
        .influences(FLOATS.double(), CLASSES)
    )
    found = (
        EkfacInfluence(copy.deepcopy(model))
        .fit([(FLOATS.double(), CLASSES)])
        .influences(FLOATS.double(), CLASSES)
    )
    assert torch.equal(found, expected)


def test_the_cure_for_tied_weights_with_their_own_biases_works():
    model = perceptron(3, 3, 3, 2)
    one, other = [layer for layer in model if isinstance(layer, nn.Linear)][:2]
    other.weight = one.weight
    with pytest.raises(LayerNotSupported, match=r"for name in \('0', '2'\)") as told:
        EkfacInfluence(model)
    exec(str(told.value).partition("Freeze them: ")[2])
    assert EkfacInfluence(model).layer_names == ["4"]


@pytest.mark.parametrize("likelihood", [None, Bernoulli()])
def test_a_mask_is_not_taken_for_labels(likelihood):
    ids, mask = torch.ones(6, 4, dtype=torch.int64), torch.ones(6, 4, dtype=torch.int64)
    engine = EkfacInfluence(nn.Sequential(nn.Embedding(2, 3).requires_grad_(False), nn.Linear(3, 2)).eval())
    with pytest.raises(BatchNotSupported, match="Use a mapping"):
        engine.fit([(ids, mask, CLASSES)])


def test_with_much_damping_influences_of_several_labels_are_products_of_their_gradients():
    y = labels(18, 2).view(6, 3).float()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).eval()
    engine = EkfacInfluence(model, likelihood=Bernoulli(), hessian_regularization=1e9).fit([(FLOATS, y)])
    p = model(FLOATS).sigmoid().detach()
    by_output = ((p - y)[:, None] * (p - y)[None]) * (FLOATS @ FLOATS.T)[:, :, None]
    torch.testing.assert_close(1e9 * engine.influences(FLOATS, y), by_output.sum(dim=2), rtol=1e-4, atol=1e-5)
