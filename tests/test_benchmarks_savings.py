"""What the engine saves by its shortcuts is time: the long ways that are timed give the same results."""

import pytest
import torch

from benchmarks.savings import markdown
from benchmarks.undone import SHORTCUTS
from support.ekfac import EkfacInfluence, blocks, influence, passes
from tests.dense import sentences, token_classifier

X, Y = sentences(5, 2, 7, 1, 4, seed=1), torch.tensor([0, 1, 1, 0, 1])
X_TEST, Y_TEST = sentences(3, 6, seed=2), torch.tensor([1, 0])


def results():
    engine = EkfacInfluence(token_classifier(), hessian_regularization=1e-3).fit([(X, Y)])
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


def test_the_page_has_a_line_for_each_measurement():
    found = {
        "date": "2026-01-02",
        "machine": {"cores": "2"},
        "sizes": {"shortcuts": [24, 5], "settings": [50, 10]},
        "shortcuts": [{"shortcut": "one", "job": "fit", "with": [2.0, 4.0], "without": [3.0, 6.0]}],
        "settings": [
            {"setting": "exact", "fit": [8.0], "score": [4.0], "self-influence": [2.0]},
            {
                "setting": "half",
                "fit": [4.0],
                "score": [4.0],
                "self-influence": [1.0],
                "relative difference": 0.25,
                "rank correlation": 0.5,
            },
        ],
        "plan": [{"setting": "real", "job": "fit", "plan": 9.0, "measured": 10.0}],
    }
    lines = markdown(found).splitlines()
    assert "| one | fit | 3.0 | 4.5 | 1.50× |" in lines
    assert "| `half` | 2.00× | 1.00× | 2.00× | 2.5e-01 | 0.5000 |" in lines
    assert "| real | fit | 9.0 | 10.0 | 0.90 |" in lines
