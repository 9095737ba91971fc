"""Settings that trade exactness for speed: what each leaves alone, and how far off it may be."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from support.ekfac import EkfacInfluence
from support.ekfac.errors import BadPrecision, BadShare, EmptyLoader, WrongModel
from tests.dense import fisher_blocks, label_gradients, labels, sentences, token_classifier

X, Y = sentences(5, 3, 4, 2, 5), labels(5)
BATCHES = [(X[:2],), (X[2:],)]


def fitted(batches=BATCHES, model=None, **settings):
    engine = EkfacInfluence(model or token_classifier(), hessian_regularization=1e-3, **settings)
    return engine.fit(batches)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.7, 1])
def test_eigenbases_are_those_of_the_first_examples_of_the_loader(share):
    found = fitted(eigenbasis_share=share)
    first = fitted([(X[: math.ceil(share * 5)],)])
    for name, layer in found.curvature.items():
        expected = first.curvature[name].basis
        assert_same(layer.basis.activation_eigenvalues, expected.activation_eigenvalues)
        assert_same(layer.basis.output_gradient_eigenvalues, expected.output_gradient_eigenvalues)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_corrected_eigenvalues_are_those_of_all_examples_whatever_the_share(share):
    model = token_classifier()
    for name, block in fisher_blocks(label_gradients(model, X)).items():
        layer = fitted(model=model, eigenbasis_share=share).curvature[name]
        axes = torch.kron(layer.basis.output_gradient, layer.basis.activation)
        assert_same(layer.eigenvalues.flatten(), (axes.T @ block @ axes).diagonal())


def test_the_share_is_counted_on_the_data_set_of_a_loader_that_has_one():
    loader = DataLoader(TensorDataset(X), batch_size=2)
    assert_same(
        fitted(loader, eigenbasis_share=0.5).influences(X, Y),
        fitted(eigenbasis_share=0.5).influences(X, Y),
    )


def test_a_share_of_an_empty_loader_is_refused():
    with pytest.raises(EmptyLoader, match="no batch"):
        fitted([], eigenbasis_share=0.5)


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(BadShare, match="above 0 and at most 1"):
        EkfacInfluence(token_classifier(), eigenbasis_share=share)


def test_a_precision_without_passes_is_refused():
    with pytest.raises(BadPrecision, match="'half'.*full, bfloat16"):
        EkfacInfluence(token_classifier(), precision="half")


def test_bfloat16_passes_are_good_to_two_digits():
    model = token_classifier().float()
    full = fitted(model=model)
    low = fitted(model=model, precision="bfloat16")
    for call in ("influences", "self_influences"):
        found, expected = getattr(low, call)(X, Y), getattr(full, call)(X, Y)
        assert found.dtype == torch.float32
        assert not torch.equal(found, expected)
        assert (found - expected).norm() <= 0.1 * expected.norm()


def test_bfloat16_leaves_the_dtype_of_the_curvature_and_the_model_alone():
    model = token_classifier().float()
    engine = fitted(model=model, precision="bfloat16")
    assert {layer.eigenvalues.dtype for layer in engine.curvature.values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "settings", [{"eigenbasis_share": 0.5}, {"precision": "bfloat16"}], ids=lambda s: next(iter(s))
)
def test_curvature_is_loaded_with_the_settings_it_was_fitted_with_and_no_others(tmp_path, settings):
    model = token_classifier().float()
    engine = fitted(model=model, **settings)
    engine.save(tmp_path / "curvature")
    loaded = EkfacInfluence.load(
        tmp_path / "curvature", model, hessian_regularization=1e-3, **settings
    )
    torch.testing.assert_close(loaded.influences(X, Y), engine.influences(X, Y), rtol=0, atol=0)
    with pytest.raises(WrongModel, match=next(iter(settings))):
        EkfacInfluence.load(tmp_path / "curvature", model)
