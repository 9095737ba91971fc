"""What the engine saves by its shortcuts is time: the long ways that are timed give the same results."""

import pytest
import torch

from benchmarks.undone import SHORTCUTS
from support.ekfac import EkfacInfluence, blocks, influence, passes
from tests.dense import sentences, token_classifier

X, Y = sentences(5, 2, 7, 1, 4, seed=1), torch.tensor([0, 1, 1, 0, 1])
X_TEST, Y_TEST = sentences(3, 6, seed=2), torch.tensor([1, 0])


def results():
    # Over all positions: one of the long ways keeps those without gradient.
    settings = {"hessian_regularization": 1e-3, "covariance_positions": "all"}
    engine = EkfacInfluence(token_classifier(), **settings).fit([(X, Y)])
    scores = engine.score([(X_TEST, Y_TEST)], [(X, Y)])
    return scores, engine.self_influences(X, Y)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_results_are_the_same_without_a_shortcut(shortcut):
    undo, _ = SHORTCUTS[shortcut]
    with undo():
        long_way = results()
    torch.testing.assert_close(long_way, results(), rtol=1e-9, atol=1e-12)


def test_after_a_failure_the_engine_takes_its_shortcuts_again():
    undo, _ = SHORTCUTS["all of these"]
    before = blocks._by_length, passes.layer_gradients, influence.products
    with pytest.raises(RuntimeError), undo():
        raise RuntimeError
    assert (blocks._by_length, passes.layer_gradients, influence.products) == before
