"""A plan counts what the engine will do; how fast this machine does it decides no test."""

import subprocess
import sys
import weakref

import psutil
import pytest

from support.ekfac import EkfacInfluence
from support.ekfac import plan as plan_module
from support.ekfac.errors import EmptyLoader
from support.ekfac.layers import widest_outputs
from support.ekfac.memory import factor_bytes
from support.ekfac.plan import make_plan
from tests import peak_memory
from tests.dense import TokenClassifier, labels, perceptron, sentences, token_classifier, vectors

X, Y = sentences(5, 3, 4, 2, 5), labels(5)
QUERIES, QUERY_LABELS = sentences(3, 5, 4, seed=1), labels(3, seed=1)


def planned(model=None, queries=((QUERIES, QUERY_LABELS),), batches=1, **settings):
    engine = EkfacInfluence(model or token_classifier(), **settings)
    return engine.plan(batches * [(X[:2], Y[:2]), (X[2:], Y[2:])], queries)


def test_a_plan_counts_examples_real_tokens_and_queries():
    plan = planned()
    assert (plan.examples, plan.tokens, plan.queries, plan.score_groups) == (5, 19, 3, 1)
    assert (planned(queries=()).score_seconds, planned(queries=()).score_groups) == (None, 0)
    assert "score" not in str(planned(queries=()))


def test_a_plan_knows_the_bytes_of_curvature_and_factors():
    plan = planned()
    engine = EkfacInfluence(token_classifier()).fit([(X,)])
    curvature = sum(
        tensor.nbytes
        for layer in engine.curvature.values()
        for tensor in (layer.eigenvalues, *vars(layer.basis).values())
        if tensor is not None
    )
    assert plan.curvature_bytes == curvature
    assert plan.factor_bytes == factor_bytes(engine.layers)


def test_the_peak_is_that_of_the_whole_process():
    plan = planned()
    held = psutil.Process().memory_info().rss
    assert plan.peak_bytes > 0.9 * held
    assert plan.peak_bytes > plan.curvature_bytes + 3 * plan.factor_bytes


def test_seconds_grow_with_the_examples_and_with_the_groups_of_queries(monkeypatch):
    """By a clock that counts the tokens of each block that goes through the model."""
    monkeypatch.setattr(plan_module.time, "perf_counter", Clock(monkeypatch).now)
    one, two = planned(batches=1), planned(batches=2)
    assert two.fit_seconds == pytest.approx(2 * one.fit_seconds)  # the clock stands still in eigenproblems
    assert two.self_seconds == pytest.approx(2 * one.self_seconds)
    small = planned(memory_budget=factor_bytes(EkfacInfluence(token_classifier()).layers))
    assert small.score_groups == 3
    assert small.score_seconds > 2 * one.score_seconds
    assert "scores are taken in 3 groups" in str(small)
    assert planned(update_diagonal=False).fit_seconds == pytest.approx(one.fit_seconds)


def test_a_fit_is_planned_with_a_second_pass_of_what_it_has_no_room_to_keep(monkeypatch):
    monkeypatch.setattr(plan_module.time, "perf_counter", Clock(monkeypatch).now)
    curvature = planned().curvature_bytes
    none, some, everything = (planned(memory_budget=curvature + room) for room in (0, 1000, 10**9))
    assert none.fit_seconds == pytest.approx(2 * everything.fit_seconds)
    assert everything.fit_seconds < some.fit_seconds < none.fit_seconds
    assert 0 == none.kept_bytes < some.kept_bytes == 1000 < everything.kept_bytes
    taken = everything.kept_bytes / 5 / max(map(int, (X != 0).sum(dim=1)))  # padding included
    layers = EkfacInfluence(token_classifier()).layers.values()
    assert taken <= 8 * sum(layer.d_in + layer.d_out for layer in layers)


def test_seconds_grow_with_the_groups_of_layers(monkeypatch):
    monkeypatch.setattr(plan_module.time, "perf_counter", Clock(monkeypatch).now)
    one, each = planned(), planned(memory_budget=1)
    assert (one.fit_groups, one.score_groups, each.fit_groups, each.score_groups) == (1, 1, 3, 3 * 3)
    assert each.fit_seconds == pytest.approx(2 * 3 * one.fit_seconds)
    assert each.score_seconds > 2 * one.score_seconds
    assert "fit takes layers in 3 groups" in str(each)
    with_queries = make_plan(EkfacInfluence(token_classifier(), memory_budget=1), [(X, Y)], [(X, Y)], 2)
    assert (with_queries.fit_groups, with_queries.score_groups) == (1, 3)


class Clock:
    """Advances by the number of inputs of every forward pass."""

    def __init__(self, monkeypatch):
        self.seconds = 0
        forward = TokenClassifier.forward

        def counted(model, ids):
            self.seconds += ids.numel()
            return forward(model, ids)

        monkeypatch.setattr(TokenClassifier, "forward", counted)

    def now(self):
        return self.seconds


def test_loaders_are_gone_over_lazily_and_not_kept():
    alive, most = weakref.WeakSet(), []

    class Loader:
        def __iter__(self):
            for n in range(5):
                batch = vectors(1, 4, seed=n)
                most.append(len(alive))
                alive.add(batch)
                yield batch, labels(1)
                del batch

    EkfacInfluence(perceptron(4, 3)).plan(Loader())
    assert len(most) == 10
    assert max(most) <= 4  # three to be timed, and the one before


def test_a_plan_of_no_examples_is_refused():
    with pytest.raises(EmptyLoader, match="training loader gave no batch"):
        EkfacInfluence(token_classifier()).plan([])


def test_the_memory_of_logits_over_a_large_vocabulary_is_foretold_and_kept():
    """Beyond what model and libraries take: logits in few copies, not many."""
    foretold, taken = (
        int(
            subprocess.run(
                [sys.executable, peak_memory.__file__, what], capture_output=True, text=True, check=True
            ).stdout
        )
        for what in ("plan", "work")
    )
    assert taken / 1.5 < foretold < 1.5 * taken
    logits = 4 * 16 * peak_memory.TOKENS * peak_memory.VOCABULARY
    assert taken < 6 * logits


def test_queries_at_low_rank_are_planned_at_their_size():
    whole, low = planned(), planned(query_rank=1)
    assert low.factor_bytes == factor_bytes(EkfacInfluence(token_classifier()).layers, 1) < whole.factor_bytes
    assert whole.output_bytes == 8 * 5 * 5 * widest_outputs(token_classifier())
