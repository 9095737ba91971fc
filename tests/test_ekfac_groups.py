"""Layers that don't fit into memory together are taken in groups: more passes, and nothing else changes."""

import pytest
import torch

from support.ekfac import EkfacInfluence, storage
from support.ekfac.errors import LoaderShuffles
from support.ekfac.influence import NORMALISATIONS
from support.ekfac.layers import tracked_layers
from support.ekfac.memory import curvature_bytes, factor_bytes, layer_groups
from tests import tiny_writers
from tests.dense import assert_same, composed, labels, sentences, token_classifier, vectors

X, Y = sentences(5, 3, 4, 2, 5), labels(5)
QUERIES, QUERY_LABELS = sentences(3, 5, 4, 2, seed=1), labels(4, seed=1)
LAYERS = tracked_layers(token_classifier())
OF_EACH = [factor_bytes({name: layer}) for name, layer in LAYERS.items()]
"""(4, 4), (3, 5) and (2, 4) numbers."""


class Counted:
    """A loader that knows how often it was gone over."""

    def __init__(self, *batches):
        self.batches, self.times = batches, 0

    def __iter__(self):
        self.times += 1
        return iter(self.batches)


def fitted(budget=None, loader=((X,),), **settings):
    settings = {"hessian_regularization": 1e-3, "memory_budget": budget} | settings
    return EkfacInfluence(token_classifier(), **settings).fit(loader)


def of(groups):
    return [list(group) for group in groups]


def test_layers_are_cut_where_one_more_would_not_fit():
    inner, outer, classifier = LAYERS
    assert of(layer_groups(LAYERS, sum(OF_EACH), factor_bytes)) == [[inner, outer, classifier]]
    assert of(layer_groups(LAYERS, sum(OF_EACH) - 1, factor_bytes)) == [[inner, outer], [classifier]]
    assert of(layer_groups(LAYERS, OF_EACH[0], factor_bytes)) == [[inner], [outer], [classifier]]
    assert of(layer_groups(LAYERS, 0.5, factor_bytes)) == [[inner], [outer], [classifier]]


@pytest.mark.parametrize("update_diagonal", [True, False])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.01])
def test_a_fit_in_groups_is_the_fit_and_goes_over_the_data_for_each(share, update_diagonal):
    budget = share * curvature_bytes(LAYERS)
    cut = layer_groups(LAYERS, budget, curvature_bytes)
    groups, full = len(cut), sum(curvature_bytes(group) >= budget for group in cut)
    loader = Counted((X[:2],), (X[2:],))
    found = fitted(budget, loader, update_diagonal=update_diagonal)
    assert groups == {1.0: 1, 0.9: 2, 0.01: 3}[share]
    # A group that leaves room in the budget may keep what it saw, and then needs no second pass.
    assert groups + full * update_diagonal <= loader.times <= groups * (1 + update_diagonal)
    expected = fitted(update_diagonal=update_diagonal)
    assert found.layer_names == expected.layer_names == list(found.curvature)
    for name, layer in expected.curvature.items():
        assert_same(found.curvature[name].eigenvalues, layer.eigenvalues)
    assert_same(
        found.influences(QUERIES, QUERY_LABELS, X, Y), expected.influences(QUERIES, QUERY_LABELS, X, Y)
    )
    assert_same(found.self_influences(X, Y), expected.self_influences(X, Y))


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("layers", [3, 2, 1])
def test_scores_of_groups_add_up_and_each_goes_over_the_data_for_its_queries(layers, rank, normalisation):
    """With room for one query in so many layers, the first two of which are the largest."""
    one_query = factor_bytes(dict(list(LAYERS.items())[:layers]), rank)
    engine, training = fitted(query_rank=rank), Counted((X[:3], Y[:3]), (X[3:], Y[3:]))
    test = [(QUERIES[:3], QUERY_LABELS[:3]), (QUERIES[3:], QUERY_LABELS[3:])]
    expected = engine.score(test, training, normalisation)
    assert training.times == 1
    engine.memory_budget, training.times = one_query, 0
    assert_same(engine.score(test, training, normalisation), expected)
    groups = layer_groups(LAYERS, one_query, lambda some: factor_bytes(some, rank))
    assert len(groups) == {3: 1, 2: 2, 1: 3}[layers]
    assert training.times == sum(-(-4 // (one_query // factor_bytes(group, rank))) for group in groups)


@pytest.mark.parametrize("build", [tiny_writers.llama, tiny_writers.gpt2])
def test_a_model_that_writes_draws_the_same_labels_for_every_group(build):
    model, batch, asked = (
        tiny_writers.ready(build),
        tiny_writers.texts(5, 3, 6),
        tiny_writers.texts(4, 5, seed=1),
    )
    scores = [tiny_writers.fitted(model, [batch], memory_budget=b).score([asked], [batch]) for b in (None, 1)]
    tiny_writers.assert_same(*scores)


def test_a_group_that_the_outputs_do_not_depend_on_is_zero_as_it_is_among_others():
    model = composed(lambda m, x: m.used(x) + m.cut_off(x).detach().sum(1, True), cut_off=(4, 3), used=(4, 2))
    x, y = vectors(5, 4), labels(5)
    whole, parts = (EkfacInfluence(model, memory_budget=b).fit([(x,)]) for b in (None, 1))
    assert whole.curvature["cut_off"].eigenvalues.count_nonzero() == 0
    assert_same(parts.score([(x, y)], [(x, y)]), whole.score([(x, y)], [(x, y)]))


def test_what_is_put_aside_is_the_same_and_its_files_are_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path))
    engine = fitted()
    for name, layer in engine.curvature.items():
        kept = storage.put_aside(layer)
        assert torch.equal(kept.eigenvalues, layer.eigenvalues)
        for part in storage.BASIS_PARTS:
            assert torch.equal(getattr(kept.basis, part), getattr(layer.basis, part)), name
    assert not list(tmp_path.iterdir())


def test_a_fit_in_groups_is_saved_and_loaded_as_any(tmp_path):
    fitted(1).save(tmp_path / "curvature")
    loaded = EkfacInfluence.load(tmp_path / "curvature", token_classifier(), hessian_regularization=1e-3)
    assert_same(loaded.influences(X, Y), fitted().influences(X, Y))


def test_a_loader_that_changes_its_order_between_two_groups_of_layers_is_refused():
    class Rolled(Counted):
        def __iter__(self):
            self.times += 1
            return iter([(X.roll(self.times, 0), Y)])

    with pytest.raises(LoaderShuffles, match="the same for every group of queries or layers"):
        fitted(1).score([(QUERIES[:1], QUERY_LABELS[:1])], Rolled())
