"""The quick ways of taking matrix products give what the plain ones give."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from support.ekfac import EkfacInfluence, matrix_products
from support.ekfac.matrix_products import FrozenLinears, exact_products, matrix_product
from tests.dense import sentences, token_classifier

X, Y = sentences(5, 2, 7, 1, 4, seed=1), torch.tensor([0, 1, 1, 0, 1])
X_TEST, Y_TEST = sentences(3, 6, seed=2), torch.tensor([1, 0])


def scores(model):
    engine = EkfacInfluence(model, hessian_regularization=1e-2).fit([(X, Y)])
    return engine.score([(X_TEST, Y_TEST)], [(X, Y)])


@pytest.fixture
def anywhere(monkeypatch):
    """The path of the quick way with plain products, so that it is tested on every machine."""
    monkeypatch.setattr(matrix_products, "is_large", lambda left, right: True)
    monkeypatch.setattr(matrix_products, "onednn_is_quicker", lambda: True)
    monkeypatch.setattr(matrix_products, "_by_onednn", torch.matmul)


@pytest.mark.parametrize("by_onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_a_large_product_is_a_product(dtype, transposed, by_onednn, monkeypatch):
    monkeypatch.setattr(matrix_products, "onednn_is_quicker", lambda: by_onednn)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(310, 250, generator=generator).to(dtype)
    right = torch.randn(250, 290, generator=generator).to(dtype)
    assert left.shape[0] * left.shape[1] * right.shape[1] >= matrix_products.LARGE
    if transposed[0]:
        left = left.T.contiguous().T
    if transposed[1]:
        right = right.T.contiguous().T
    expected = left.double() @ right.double()
    torch.testing.assert_close(matrix_product(left, right).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("seconds", "taken"), [(0.5, True), (0.9, False), (1.5, False)])
def test_onednn_is_taken_where_it_is_much_quicker(seconds, taken, monkeypatch):
    now = [0.0]

    def lasting(spent):
        def product(left, right):
            now[0] += spent

        return product

    monkeypatch.setattr(matrix_products, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(matrix_products, "_by_onednn", lasting(seconds))
    monkeypatch.setattr(torch, "matmul", lasting(1.0))
    assert matrix_products.onednn_is_quicker.__wrapped__() is taken


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 3)])
@pytest.mark.parametrize("zeros", [slice(0), slice(1), slice(5), slice(6), (slice(None), 0)])
def test_frozen_linears_are_linears_both_ways(anywhere, bias, shape, zeros):
    torch.manual_seed(0)
    layer = nn.Linear(3, 4, bias=bias).requires_grad_(False)
    inputs = torch.randn(shape, requires_grad=True)
    gradient = torch.randn(*shape[:-1], 4)
    gradient.flatten(0, -2)[zeros] = 0  # rows, or the first entry of each
    with FrozenLinears():
        outputs = layer(inputs)
    assert "FrozenLinear" in outputs.grad_fn.name()
    (quick,) = torch.autograd.grad(outputs, inputs, gradient)
    plain = layer(inputs)
    torch.testing.assert_close(outputs, plain)
    torch.testing.assert_close(quick, torch.autograd.grad(plain, inputs, gradient)[0])


def test_weights_that_want_gradients_get_them(anywhere):
    layer = nn.Linear(3, 4)
    with FrozenLinears():
        layer(torch.ones(2, 3)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("hidden", [4, 5])
def test_the_engine_says_the_same_with_quick_products(monkeypatch, hidden):
    model = token_classifier(hidden=hidden)
    expected = scores(model)
    monkeypatch.setattr(matrix_products, "LARGE", 1)  # at any size, on any processor that has them
    assert (scores(model.float()) - expected).norm() < 1e-4 * expected.norm()


def test_the_engine_takes_frozen_linears(anywhere, monkeypatch):
    found = scores(token_classifier())
    monkeypatch.undo()
    torch.testing.assert_close(found, scores(token_classifier()))


def told():
    """What torch was told of products in float32: in one word, where there is one, and by backend."""
    try:
        word = torch.get_float32_matmul_precision()
    except RuntimeError:
        word = None
    return word, torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def untold():
    """Torch as it was."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


WAYS = {
    "nothing": lambda: None,
    "in one word": lambda: torch.set_float32_matmul_precision("high"),
    "as it was before": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "by backend": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


@pytest.mark.usefixtures("untold")
@pytest.mark.parametrize("tell", WAYS.values(), ids=WAYS)
def test_products_are_exact_inside_and_as_torch_was_told_outside(tell):
    tell()
    before = told()
    with exact_products():
        assert told() == ("highest", "ieee", "ieee")
    assert told() == before


@pytest.mark.usefixtures("untold")
def test_a_fit_looks_at_the_model_in_exact_products_and_works_as_torch_was_told():
    torch.set_float32_matmul_precision("high")
    model, heard = token_classifier(), []
    model.register_forward_hook(lambda *_: heard.append(told()[0]))
    EkfacInfluence(model).fit([(X, Y)])
    looks = heard.index("high")
    assert looks
    assert heard == ["highest"] * looks + ["high"] * (len(heard) - looks)
