"""Settings that trade exactness for speed: what each leaves alone, and how far off it may be."""

import pytest
import torch

from support.ekfac import EkfacInfluence
from support.ekfac.errors import BadSetting, WrongModel
from tests.dense import labels, sentences, token_classifier

X, Y = sentences(5, 3, 4, 2, 5), labels(5)
BATCHES = [(X[:2],), (X[2:],)]


def fitted(batches=BATCHES, model=None, **settings):
    engine = EkfacInfluence(model or token_classifier(), hessian_regularization=1e-3, **settings)
    return engine.fit(batches)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_precision_without_passes_is_refused():
    with pytest.raises(BadSetting, match="'half'.*full, bfloat16"):
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


def test_curvature_is_loaded_with_the_precision_it_was_fitted_with_and_no_other(tmp_path):
    settings = {"precision": "bfloat16"}
    model = token_classifier().float()
    engine = fitted(model=model, **settings)
    engine.save(tmp_path / "curvature")
    loaded = EkfacInfluence.load(tmp_path / "curvature", model, hessian_regularization=1e-3, **settings)
    torch.testing.assert_close(loaded.influences(X, Y), engine.influences(X, Y), rtol=0, atol=0)
    with pytest.raises(WrongModel, match="precision"):
        EkfacInfluence.load(tmp_path / "curvature", model)
