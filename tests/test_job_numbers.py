"""A job's numbers are the engine's, however the work is cut, stopped and taken up again."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import distributed as dist

from support.ekfac import Categorical, EkfacInfluence
from support.ekfac.errors import LayerNotSupported
from support.job import fit as fit_module
from support.job import store as store_module
from support.job.examples import Examples
from support.job.fit import fit
from support.job.plan import planned
from support.job.score import score, self_influences
from support.job.settings import Damping, Question, Subject
from support.job.store import Store
from support.job.team import Team
from support.job.work import Job
from tests.damage import flipped
from tests.dense import Doubled, assert_same, labels, sentences, token_classifier

LENGTHS = (5, 3, 4, 2, 5, 1, 6, 2, 3, 4, 2)
TRAINING, TRAINING_LABELS = sentences(*LENGTHS), labels(len(LENGTHS))
QUERIES, QUERY_LABELS = sentences(3, 5, 4, seed=1), labels(3, seed=1)
BLOCK = 3

pytestmark = pytest.mark.usefixtures("alone")


def examples(input_ids, classes):
    rows = [row[row != 0].tolist() for row in input_ids]
    return Examples(
        rows=np.arange(len(rows)),
        texts=Dataset.from_dict({"text": ["…"] * len(rows), "label": classes.tolist()}),
        tokens=Dataset.from_dict({"input_ids": rows, "length": list(map(len, rows))}),
        digest="",
        pad_token_id=0,
    )


def new_engine(**settings):
    return EkfacInfluence(token_classifier(), hessian_regularization=0.01, **settings)


def new_job(folder, engine=None, query_group=2, by_layer=False, save_seconds=60):
    """A job on sentences: what would come from a command's options is there already."""
    store = Store(folder)
    store.begin()
    given = {"save_seconds": save_seconds, "tell_seconds": 60, "query_block": query_group}
    job = Job(store, given, Team(dist.HashStore()))
    training = examples(TRAINING, TRAINING_LABELS)
    vars(job).update(
        engine=engine or new_engine(),
        task=SimpleNamespace(config={}),
        training=training,
        fitted_on=training,
        queries=examples(QUERIES, QUERY_LABELS),
        subject=Subject(block=BLOCK),
        question=Question(by_layer=by_layer),
        damping=Damping("0.01"),
    )
    return job


def fitted(folder, **settings):
    """The job after a fit, or after what was left of it."""
    job = new_job(folder, **settings)
    fit(job)
    return job


def begun_by(shards, folder, **settings):
    """A job after a fit that so many processes had begun."""
    job = new_job(folder, **settings)
    job.store.settle({"shards": shards})
    fit(job)
    return job


def scored(folder, query_group=2, by_layer=False):
    fitted(folder)
    job = new_job(folder, query_group=query_group, by_layer=by_layer)
    score(job)
    return job.store


class Killed(Exception):
    """The process is gone."""


def die_at(monkeypatch, target, name, call, after=False):
    """Die at the given call of a function, counted from 1: instead of it, or right after it."""
    work, calls = getattr(target, name), []

    def work_or_die(*arguments, **named):
        calls.append(name)
        if len(calls) == call and after:
            work(*arguments, **named)
        if len(calls) == call:
            raise Killed
        return work(*arguments, **named)

    monkeypatch.setattr(target, name, work_or_die)


def influences(engine):
    return engine.influences(QUERIES, QUERY_LABELS, TRAINING, TRAINING_LABELS)


def die_while_saving(monkeypatch, saving, job, after=False):
    """A fit that dies at the given saving of sums."""
    with monkeypatch.context() as patch:
        die_at(patch, Store, "save_sums", saving, after)
        with pytest.raises(Killed):
            fit(job)


def curvature_of(engine):
    return {
        f"{name} {part}": tensor
        for name, layer in engine.curvature.items()
        for part, tensor in [("eigenvalues", layer.eigenvalues), *vars(layer.basis).items()]
        if tensor is not None
    }


def eigenvalues_of(job):
    return {name: layer.eigenvalues for name, layer in job.engine.curvature.items()}


def same(one, other):
    assert_same(curvature_of(one), curvature_of(other), 0)


def test_a_fit_in_blocks_is_the_engines_fit(tmp_path):
    job = fitted(tmp_path)
    whole = new_engine().fit([(TRAINING,)])
    assert_same(influences(job.engine), influences(whole), 1e-7)
    assert job.engine.examples == whole.examples == len(LENGTHS)
    same(new_engine().load_curvature(job.store.curvature), job.engine)
    assert not job.store.partial_fit.exists()


@pytest.mark.parametrize("shards", [2, 3])
def test_a_fit_that_many_began_can_be_ended_by_one(tmp_path, shards):
    one, many = fitted(tmp_path / "one"), begun_by(shards, tmp_path / "many")
    assert_same(eigenvalues_of(one), eigenvalues_of(many), 1e-7)


# Four blocks and three layers: four savings of covariances, three of bases, four of eigenvalues.
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("savings", range(1, 12))
def test_a_fit_killed_at_any_saving_ends_with_the_very_same_curvature(tmp_path, monkeypatch, savings, after):
    whole = fitted(tmp_path / "whole")
    die_while_saving(monkeypatch, savings, new_job(tmp_path / "killed", save_seconds=0), after)
    same(fitted(tmp_path / "killed", save_seconds=0).engine, whole.engine)


@pytest.mark.parametrize("basis", ["one", "all"])
def test_a_basis_that_is_lost_takes_the_sums_of_squares_in_it_along(tmp_path, monkeypatch, basis):
    whole, job = fitted(tmp_path / "whole"), new_job(tmp_path / "killed", save_seconds=0)
    die_while_saving(monkeypatch, 9, job)
    assert list(job.store.partial_fit.glob("eigenvalues-*"))
    lost = sorted(job.store.partial_fit.glob("basis-*"))[: 1 if basis == "one" else None]
    for path in lost:
        path.unlink()
    assert len(fit_module.missing_bases(job)) == len(lost)
    assert not list(job.store.partial_fit.glob("eigenvalues-*"))
    same(fitted(tmp_path / "killed").engine, whole.engine)


def test_what_was_saved_is_not_computed_again(tmp_path, monkeypatch):
    die_while_saving(monkeypatch, 4, new_job(tmp_path, save_seconds=0))
    add, seen = fit_module.CovarianceSums.add, []

    def spy(sums, *arguments):
        seen.append(add(sums, *arguments))
        return seen[-1]

    monkeypatch.setattr(fit_module.CovarianceSums, "add", spy)
    fitted(tmp_path)
    assert sum(seen) == len(LENGTHS) - 3 * BLOCK


def test_labels_are_drawn_for_each_block_whoever_draws_them(tmp_path):
    def engine(seed):
        return new_engine(likelihood=Categorical(exact_classes=1), seed=seed)

    one, many = (fitted(tmp_path / "1", engine=engine(5)), begun_by(3, tmp_path / "3", engine=engine(5)))
    assert_same(eigenvalues_of(one), eigenvalues_of(many), 1e-7)
    other = fitted(tmp_path / "other", engine=engine(6))
    assert not torch.allclose(eigenvalues_of(other)["inner"], eigenvalues_of(one)["inner"])


@pytest.mark.parametrize("query_group", [1, 2, 3])
def test_scores_are_the_engines_influences(tmp_path, query_group):
    store = scored(tmp_path, query_group)
    expected = influences(new_engine().load_curvature(store.curvature))
    np.testing.assert_allclose(store.array("scores")[:], expected, rtol=1e-9)
    assert store.array("scores").chunks == (query_group, BLOCK)
    assert not (tmp_path / "results.zarr" / "layer_scores").exists()


def test_layers_scores_and_self_influences_are_the_engines_and_layers_add_up(tmp_path):
    store = scored(tmp_path, by_layer=True)
    job = new_job(tmp_path, by_layer=True)
    self_influences(job)
    expected = job.engine.influences_by_layer(QUERIES, QUERY_LABELS, TRAINING, TRAINING_LABELS)
    by_layer = store.array("layer_scores")[:]
    np.testing.assert_allclose(by_layer, torch.stack(list(expected.values())), rtol=1e-9)
    np.testing.assert_allclose(by_layer.sum(axis=0), store.array("scores")[:], rtol=1e-9)
    own = job.engine.self_influences(TRAINING, TRAINING_LABELS)
    np.testing.assert_allclose(store.array("self_influences")[:], own, rtol=1e-9)


# Three writings of rows come before those of eight chunks; each is followed by its seal.
@pytest.mark.parametrize("work", [(Store, "write"), (store_module, "seal")], ids=["chunk", "seal"])
@pytest.mark.parametrize("number", range(4, 12))
def test_scores_killed_before_any_chunk_or_seal_end_with_the_very_same_numbers(
    tmp_path, monkeypatch, work, number
):
    whole = scored(tmp_path / "whole").array("scores")[:]
    fitted(tmp_path / "killed")
    with monkeypatch.context() as patch:
        die_at(patch, *work, number)
        with pytest.raises(Killed):
            scored(tmp_path / "killed")
    assert not Store(tmp_path / "killed").has("scores", (range(len(QUERIES)), range(len(LENGTHS))))
    np.testing.assert_array_equal(scored(tmp_path / "killed").array("scores")[:], whole)


def test_chunks_that_are_there_are_not_computed_again(tmp_path):
    store = scored(tmp_path)
    marked = store.array("scores")[:2, BLOCK : 2 * BLOCK] + 1000
    store.write("scores", (range(2), range(BLOCK, 2 * BLOCK)), marked)
    np.testing.assert_array_equal(scored(tmp_path).array("scores")[:2, BLOCK : 2 * BLOCK], marked)


@pytest.mark.parametrize("chunk", ["scores/c/0/1", "layer_scores/c/0/0/1"])
def test_a_damaged_chunk_is_computed_anew(tmp_path, chunk):
    store = scored(tmp_path, by_layer=True)
    before = store.array("scores")[:]
    flipped(tmp_path / "results.zarr" / chunk)
    again = scored(tmp_path, by_layer=True)
    np.testing.assert_array_equal(again.array("scores")[:], before)
    assert not np.isnan(again.array("layer_scores")[:]).any()


def test_a_plan_never_holds_all_examples(tmp_path, monkeypatch):
    job, held, most = new_job(tmp_path), [], []
    many = examples(sentences(*[2] * 900), labels(900))
    vars(job).update(training=many, fitted_on=many, subject=Subject(block=100))
    batch = Examples.batch

    def spied(*arguments):
        inputs, classes = batch(*arguments)
        held.append((weakref.ref(inputs), len(inputs)))
        most.append(sum(size for tensor, size in held if tensor() is not None))
        return inputs, classes

    monkeypatch.setattr(Examples, "batch", spied)
    assert planned(job).startswith("900 training examples, 1,800 tokens; 3 queries; 1 process\n")
    assert max(most) <= 400


def test_a_layer_that_hooks_can_t_follow_is_refused_before_a_fit(tmp_path):
    model = token_classifier()
    model.inner.__class__ = Doubled
    with pytest.raises(LayerNotSupported, match="The gradient of 'inner' is not the product"):
        fitted(tmp_path, engine=EkfacInfluence(model))
    assert not list(tmp_path.glob("fit/*"))
