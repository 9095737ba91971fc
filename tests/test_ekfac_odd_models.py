"""Models and batches that people have and nobody thinks of: right, or refused with a cure that works."""

import copy

import pytest
import torch
from torch import nn

from support.ekfac import Bernoulli, EkfacInfluence
from support.ekfac.errors import BatchNotSupported, LayerNotSupported
from tests.dense import labels, perceptron, vectors

X, Y = vectors(6, 4).float(), labels(6)


class Widening(nn.Module):
    """A body in float32 under a head in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 2).double()

    def forward(self, x):
        return self.head(self.body(x).relu().double())


def test_layers_of_two_precisions_are_scored_in_the_wider_one():
    engine = EkfacInfluence(Widening().eval()).fit([(X, Y)])
    found = engine.influences(X, Y)
    assert found.dtype == torch.float64
    expected = EkfacInfluence(Widening().double().eval()).fit([(X.double(), Y)]).influences(X.double(), Y)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(engine.self_influences(X, Y), found.diagonal())


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize("layer", [nn.Linear, WithExtraState])
def test_a_comma_in_a_name_and_extra_state_are_saved_and_loaded(tmp_path, layer):
    model = nn.Sequential()
    model.add_module("first, second", layer(4, 2).eval())
    engine = EkfacInfluence(model.eval()).fit([(X, Y)])
    engine.save(tmp_path / "curvature")
    found = EkfacInfluence.load(tmp_path / "curvature", model).influences(X, Y)
    assert torch.equal(found, engine.influences(X, Y))


def test_a_model_made_in_inference_mode_is_refused_and_its_copy_is_taken():
    with torch.inference_mode():
        model = perceptron(4, 3, 2)
    with pytest.raises(LayerNotSupported, match=r"inference_mode.*copy\.deepcopy\(model\) outside"):
        EkfacInfluence(model)
    expected = EkfacInfluence(perceptron(4, 3, 2)).fit([(X.double(), Y)]).influences(X.double(), Y)
    found = EkfacInfluence(copy.deepcopy(model)).fit([(X.double(), Y)]).influences(X.double(), Y)
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
        engine.fit([(ids, mask, Y)])


def test_with_much_damping_influences_of_several_labels_are_products_of_their_gradients():
    y = labels(18, 2).view(6, 3).float()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).eval()
    engine = EkfacInfluence(model, likelihood=Bernoulli(), hessian_regularization=1e9).fit([(X, y)])
    p = model(X).sigmoid().detach()
    by_output = ((p - y)[:, None] * (p - y)[None]) * (X @ X.T)[:, :, None]
    torch.testing.assert_close(1e9 * engine.influences(X, y), by_output.sum(dim=2), rtol=1e-4, atol=1e-5)
