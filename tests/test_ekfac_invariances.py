"""What must not change the result, and what must add up."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from support.ekfac import EkfacInfluence, passes
from support.ekfac.blocks import AtATime
from support.ekfac.passes import Pass
from tests.dense import assert_same, labels, sentences, token_classifier, vectors

DAMPING = 1e-4
X = sentences(5, 3, 4, 2, 5)
QUERIES, QUERY_LABELS = sentences(3, 5, seed=1), labels(2, seed=1)
MODEL = token_classifier()


def fitted(batches, model=MODEL, **settings):
    return EkfacInfluence(model, hessian_regularization=DAMPING, **settings).fit(batches)


def influences(engine):
    return engine.influences(QUERIES, QUERY_LABELS, X, labels(5))


def test_padding_that_the_model_fills_with_junk_changes_nothing():
    model = token_classifier()

    def junk(ids):
        """Hands a hidden layer NaN at padded positions, as some attention kernels do."""
        padding = ~model.token_mask(ids).unsqueeze(-1)
        embedded = model.embedding(ids).masked_fill(padding, torch.nan)
        hidden = model.inner(embedded).masked_fill(padding, 0)
        return model.classifier(model.outer(hidden).masked_fill(padding, 0).sum(1))

    model.forward = junk
    clean = fitted([(row[row != 0][None],) for row in X], model=model)
    assert_same(influences(fitted([(X,)], model=model)), influences(clean))


def test_labels_at_fit_change_nothing():
    assert_same(influences(fitted([(X, labels(5))])), influences(fitted([(X, 1 - labels(5), "texts")])), 0)


def test_fitting_again_forgets_the_first_fit():
    engine = fitted([(sentences(4, 4, seed=7),)])
    assert_same(influences(engine.fit([(X,)])), influences(fitted([(X,)])), 0)


@pytest.mark.parametrize(("test", "train"), [(2, 5), (5, 2)])
def test_factors_then_scores_equal_influences(test, train):
    engine = fitted([(X,)])
    queries, query_labels = X[:test], labels(test)
    factors = engine.influence_factors(queries, query_labels)
    assert factors["inner"].shape == (test, 4, 4)
    found = engine.influences_from_factors(factors, X[:train], labels(train))
    assert found.shape == (test, train)
    assert_same(found, engine.influences(queries, query_labels, X[:train], labels(train)), 0)


def test_regularization_can_be_changed_after_the_fit():
    engine = fitted([(X,)])
    engine.hessian_regularization = 1.0
    other = EkfacInfluence(MODEL, hessian_regularization=1.0).fit([(X,)])
    assert_same(influences(engine), influences(other), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_agree_with_float64(dtype):
    model = copy.deepcopy(MODEL).to(dtype)
    engine = EkfacInfluence(model, hessian_regularization=0.1).fit([(X,)])
    expected = EkfacInfluence(MODEL, hessian_regularization=0.1).fit([(X,)])
    found, truth = influences(engine), influences(expected)
    assert found.dtype == torch.float32
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert (found - truth).abs().max() <= tolerance * truth.abs().max()


def state_of(model):
    """Everything a caller could find changed: flags, gradients, hooks, values, random state."""
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "hooks": [(len(module._forward_hooks), len(module._backward_hooks)) for module in model.modules()],
        "values": [tensor.clone() for tensor in model.state_dict().values()],
        "random": torch.get_rng_state(),
    }


def assert_untouched(before, after):
    for kind, values in before.items():
        if kind in ("values", "random"):
            torch.testing.assert_close(values, after[kind], rtol=0, atol=0)
        else:
            assert values == after[kind], kind


def everything(model):
    engine = fitted([(X,)], model=model)
    engine.influences_from_factors(engine.influence_factors(QUERIES, QUERY_LABELS), X, labels(5))
    engine.relative_influences(QUERIES, QUERY_LABELS, X, labels(5))
    engine.plan([(X, labels(5))], [(QUERIES, QUERY_LABELS)])


def test_every_call_and_a_failure_in_the_middle_leave_the_model_as_found():
    model = token_classifier()
    model.inner.requires_grad_(False)
    before = state_of(model)
    everything(model)
    assert_untouched(before, state_of(model))
    model.outer.register_forward_hook(lambda module, inputs, output: 1 / 0)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError):
        everything(model)
    assert_untouched(before, state_of(model))


@pytest.mark.parametrize("failing", ["loss", "label_directions"])
def test_a_failure_while_scoring_leaves_the_model_as_found_even_while_it_is_handled(monkeypatch, failing):
    """Whoever holds the exception holds the frames it went through: cleaning up must not wait."""
    model = token_classifier()
    engine = fitted([(X,)], model=model)
    monkeypatch.setattr(engine.likelihood, failing, lambda *_: 1 / 0)
    before = state_of(model)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError) as held:
            engine.influences_by_label(X, labels(5), X)
        assert_untouched(before, state_of(model))
        assert not torch.is_grad_enabled()
    assert held.tb is not None


def test_what_a_forward_pass_held_is_freed_before_the_next(monkeypatch):
    """By reference counting alone: the garbage collector doesn't see how large a graph is."""
    alive, most = weakref.WeakSet(), []
    remember = Pass.__init__

    def counted(one, *arguments):
        most.append(sum(bool(other._seen) or other._graph is not None for other in alive))
        alive.add(one)
        remember(one, *arguments)

    monkeypatch.setattr(Pass, "__init__", counted)
    monkeypatch.setattr(passes, "ON_CPU", AtATime(16, 15))
    gc.disable()
    try:
        engine = fitted([(X,), (X,), (X,)])
        many = X.repeat(4, 1)
        engine.influences(many, labels(20))
        engine.influences_by_label(X, labels(5), many)
        engine.token_influences(X, labels(5), many, labels(20))
    finally:
        gc.enable()
    assert len(most) > 12
    assert max(most) == 0


def test_results_are_the_same_under_no_grad_and_in_inference_mode():
    expected = influences(fitted([(X,)]))
    with torch.no_grad():
        assert_same(influences(fitted([(X,)])), expected, 0)
    with torch.inference_mode():
        assert_same(influences(fitted([(X,)])), expected, 0)


def test_in_place_activations_change_nothing():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)]
    model, x = nn.Sequential(*layers).double().eval(), vectors(3, 4)
    expected = fitted([(x,)], model).influences(x, labels(3))
    model[1].inplace = model[3].inplace = True
    assert_same(fitted([(x,)], model).influences(x, labels(3)), expected)
