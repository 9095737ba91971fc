"""Settings that trade exactness for speed or safety: what each leaves alone, how far off it may be."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from support.ekfac import EkfacInfluence
from support.ekfac.blocks import Block
from support.ekfac.curvature import damped_inverse, eigenbasis
from support.ekfac.errors import BadSetting, NotFinite, WrongModel
from support.ekfac.matrix_products import FULL, PRECISIONS
from tests.dense import assert_same, labels, perceptron, sentences, token_classifier, vectors

X, Y = sentences(5, 3, 4, 2, 5), labels(5)
BATCHES = [(X[:2],), (X[2:],)]


def fitted(model=None, **settings):
    engine = EkfacInfluence(model or token_classifier(), hessian_regularization=1e-3, **settings)
    return engine.fit(BATCHES)


# Precision


def test_bfloat16_passes_are_good_to_two_digits_and_leave_dtypes_alone():
    model = token_classifier().float()
    full, low = fitted(model), fitted(model, precision="bfloat16")
    for call in ("influences", "self_influences"):
        found, expected = getattr(low, call)(X, Y), getattr(full, call)(X, Y)
        assert found.dtype == torch.float32
        assert not torch.equal(found, expected)
        assert (found - expected).norm() <= 0.1 * expected.norm()
    assert {layer.eigenvalues.dtype for layer in low.curvature.values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def test_eigenproblems_in_float32_change_scores_by_little_and_bases_by_rounding_alone():
    model = token_classifier().float()
    full, low = fitted(model), fitted(model, precision="float32")
    for call in ("influences", "self_influences"):
        found, expected = getattr(low, call)(X, Y), getattr(full, call)(X, Y)
        assert not torch.equal(found, expected)
        assert_same(found, expected, 1e-3)
    for layer in low.curvature.values():
        for vectors_ in (layer.basis.activation, layer.basis.output_gradient):
            assert_same(vectors_.T @ vectors_, torch.eye(len(vectors_)), 1e-5)


@pytest.mark.parametrize("fault", ["does not converge", "is not orthonormal"])
def test_where_float32_finds_no_orthonormal_basis_float64_does(monkeypatch, fault):
    rows = vectors(7, 4).float()
    covariance, solve = rows.T @ rows, torch.linalg.eigh

    def in_float32(matrix):
        if matrix.dtype == torch.float32 and fault == "does not converge":
            raise torch.linalg.LinAlgError("no convergence")
        values, found = solve(matrix)
        return values, found * (1.01 if matrix.dtype == torch.float32 else 1)

    expected = eigenbasis(covariance, covariance)
    monkeypatch.setattr(torch.linalg, "eigh", in_float32)
    found = eigenbasis(covariance, covariance, PRECISIONS["float32"])
    assert_same(found.activation, expected.activation, 0)
    assert found.activation.dtype == torch.float32


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_is_warned_of_where_a_processor_has_no_instructions_for_it(monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has, "avx2": True})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        EkfacInfluence(perceptron(4, 3, 2).float(), precision="bfloat16")
    assert [str(one.message).partition(",")[0] for one in told] == (
        [] if has else ["This processor has no instructions for bfloat16"]
    )


def test_curvature_is_loaded_with_the_precision_it_was_fitted_with_and_no_other(tmp_path):
    model, settings = token_classifier().float(), {"precision": "bfloat16"}
    engine = fitted(model, **settings)
    engine.save(tmp_path / "curvature")
    loaded = EkfacInfluence.load(tmp_path / "curvature", model, hessian_regularization=1e-3, **settings)
    assert_same(loaded.influences(X, Y), engine.influences(X, Y), 0)
    with pytest.raises(WrongModel, match="precision"):
        EkfacInfluence.load(tmp_path / "curvature", model)
    with pytest.raises(BadSetting, match="'half': there are 'full', 'float32', 'bfloat16'"):
        EkfacInfluence(model, precision="half")


def test_rounding_that_was_asked_for_is_no_reason_to_refuse_a_model():
    # Where what a layer adds up nearly cancels, bfloat16 leaves much of a gradient wrong.
    model, far = perceptron(4, 3, 2).float(), vectors(5, 4).float() * 100
    engine = EkfacInfluence(model, precision="bfloat16")

    def gradient(passes):
        over = passes.over([Block([0], far[:1], None)], lambda outputs, *_: [outputs])
        (found,) = [dict(one.gradients())["0"].per_example() for one in over]
        return found

    coarse, exact = gradient(engine.passes), gradient(replace(engine.passes, precision=FULL))
    assert (coarse - exact).norm() > 0.1 * exact.norm()
    assert engine.fit([(far,)]).is_fitted


# Damping


def test_by_default_damping_leaves_no_rounding_noise_of_float32():
    x, y = vectors(40, 6).float(), labels(40, 3)
    x[:, 2], x[:, 3] = 0, x[:, 4]
    model = nn.Sequential(nn.Linear(6, 3)).eval()
    found = EkfacInfluence(model).fit([(x,)]).influences(x, y)
    x = x.double()
    expected = EkfacInfluence(model.double()).fit([(x,)]).influences(x, y)
    assert_same(found.double(), expected, tolerance=1e-4)


def test_directions_that_carry_nothing_are_not_divided_by_something_small():
    eigenvalues = torch.tensor([[1.0, 1e-3], [1e-9, 0.0]])
    torch.testing.assert_close(damped_inverse(eigenvalues, 0), torch.tensor([[1.0, 1e3], [0.0, 0.0]]))
    assert damped_inverse(eigenvalues, 1e-12)[1, 1] == pytest.approx(1e12)
    assert (damped_inverse(torch.zeros(2, 3), "auto") == 1).all()


@pytest.mark.parametrize("regularization", [1e-40, 1e-320])
def test_results_that_are_not_finite_are_refused_before_they_are_returned(regularization):
    x, model = vectors(5, 4).float(), perceptron(4, 3, 2).float()
    engine = EkfacInfluence(model, hessian_regularization=regularization).fit([(x,)])
    for layer in engine.curvature.values():
        layer.eigenvalues.zero_()
    asks = (
        lambda: engine.influences(x, Y),
        lambda: engine.self_influences(x, Y),
        lambda: engine.score([(x, Y)], [(x, Y)], "relative"),
        lambda: engine.token_influences(x, Y, x, Y),
        lambda: engine.influences_by_label(x, Y, x),
    )
    for ask in asks:
        with pytest.raises(NotFinite, match="hessian_regularization=.*Use a larger one, 0.01"):
            ask()
