"""What the first pass of a fit saw is kept as far as memory goes, and is not asked of the model again."""

import pytest

from support.ekfac import EkfacInfluence, NextToken, passes
from support.ekfac.blocks import AtATime
from support.ekfac.layers import tracked_layers
from support.ekfac.memory import curvature_bytes
from tests import tiny_writers
from tests.dense import assert_same, labels, sentences, token_classifier

X, Y = sentences(5, 3, 4, 2, 5), labels(5)
TEXTS = tiny_writers.texts(5, 3, 6, 2)


class Asked:
    """How many examples a model has been asked about."""

    def __init__(self, model):
        self.model, self.examples = model, 0
        model.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, model, inputs, named, outputs):
        self.examples += len(getattr(outputs, "logits", outputs))


CASES = {
    "classes": (token_classifier, [(X[:2],), (X[2:],)], {}, 2000),
    "next tokens": (
        lambda: tiny_writers.ready(tiny_writers.llama),
        [TEXTS],
        {"likelihood": NextToken(2)},
        6000,
    ),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(passes, "ON_CPU", AtATime(2, 8))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("room", [0, 2000, 6000, 10**9])
def test_any_budget_gives_the_same_curvature(case, room):
    make, loader, settings, _ = CASES[case]
    expected = EkfacInfluence(make(), hessian_regularization=1e-3, **settings).fit(loader)
    budget = curvature_bytes(expected.layers) + room
    found = EkfacInfluence(make(), memory_budget=budget, hessian_regularization=1e-3, **settings).fit(loader)
    for name, layer in expected.curvature.items():
        assert_same(found.curvature[name].eigenvalues, layer.eigenvalues)
        assert_same(found.curvature[name].basis.activation, layer.basis.activation)


def test_what_was_drawn_is_not_kept_for_it_is_drawn_anew():
    make, loader, settings, _ = CASES["next tokens"]
    asked = Asked(make())
    EkfacInfluence(asked.model, update_diagonal=False, **settings).fit(loader)
    once, asked.examples = asked.examples, 0
    engine = EkfacInfluence(asked.model, **settings).fit(loader)
    assert asked.examples == once + engine.examples
    assert engine.plan(loader, loader).kept_bytes == 0


def test_examples_that_have_room_pass_once_and_the_others_twice():
    make, loader, settings, some = CASES["classes"]
    examples = 5
    asked_again = {}
    for room in (None, 0, 500, some, 10**9):
        asked = Asked(make())
        budget = None if room is None else curvature_bytes(tracked_layers(asked.model)) + room
        engine = EkfacInfluence(asked.model, memory_budget=budget, **settings).fit(loader)
        total, asked.examples = asked.examples, 0
        EkfacInfluence(asked.model, update_diagonal=False, **settings).fit(loader)
        asked_again[room] = total - asked.examples  # what a pass for Λ alone costs
        assert engine.examples == examples
    assert asked_again[None] == asked_again[10**9] == 0
    assert asked_again[0] == examples
    assert 0 < asked_again[some] < examples
    with_a_budget = [asked_again[room] for room in (0, 500, some, 10**9)]
    assert sorted(with_a_budget, reverse=True) == with_a_budget
