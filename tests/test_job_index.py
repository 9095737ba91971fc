"""An index answers a typed question with the influences that a scored store would have."""

import re
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from support.ekfac.index import EkfacIndex
from support.job.command import main
from support.job.score import load_curvature
from support.job.store import Store
from support.job.team import assembled
from support.job.work import Job
from tests.tiny_job import TRAINING, make_model, make_reviews, options

CPU = torch.device("cpu")
QUESTION = "a film that is neither good nor bad"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    asked = options(make_model(folder / "model"), make_reviews(folder / "reviews"), folder / "store")
    assert main(["run", *asked]) == 0
    assert main(["index", "--store", str(folder / "store"), "--numbers", "64"]) == 0
    return folder / "store"


@contextmanager
def opened(store):
    with assembled() as team:
        job = Job(Store(store), {}, team)
        load_curvature(job)
        yield job


def test_the_vectors_in_the_store_are_those_of_the_engine(store):
    with opened(store) as job:
        expected = EkfacIndex(job.engine, 64).sketched([job.training.batch(range(TRAINING), CPU)])
    numbers, scales = (Store(store).array(name)[:] for name in ("sketches", "sketch_scales"))
    assert (abs(numbers * scales[:, None] - expected.numpy()) <= 0.6 * scales[:, None]).all()


def test_the_answer_has_the_exact_influences_on_the_class_that_the_model_says(store, said):
    with opened(store) as job:
        query = job.task.asked([QUESTION], store / "tokens", None)
        predicted = job.task.said(query, [0], CPU)["predicted"][0]
        training = job.training.batch(range(TRAINING), CPU)
        exact = job.engine.influences(*query.batch([0], CPU), *training)[0]
    found = said("ask", "--store", store, QUESTION, "--count", 3, "--exact", TRAINING)
    assert f"{QUESTION} → {predicted}" in found
    for number in exact.abs().topk(3).indices.tolist():
        assert re.search(rf"\n *{number} +{re.escape(f'{exact[number]:+.4g}')} ", found)
    assert f"{TRAINING} training examples looked at" in found


def test_an_index_that_was_killed_goes_on_and_gives_the_same(store, said):
    array = Store(store).array("sketches")
    before = array[:]
    Store(store).write("sketches", (range(TRAINING), range(64)), np.zeros_like(before))
    for seal in (store / "results.zarr/sketches/c").glob("**/*.seal"):
        seal.unlink()
    said("index", "--store", store, "--numbers", 64)
    np.testing.assert_array_equal(Store(store).array("sketches")[:], before)


def test_asking_without_an_index_and_asking_nothing_say_what_to_do(store, said, tmp_path):
    assert "there is nothing to read. Say a text." in said("ask", "--store", store, " ", status=1)
    folder = store.parent
    asked = options(folder / "model", folder / "reviews", tmp_path)
    said("run", *asked)
    assert "has no sketches yet. Run: index" in said("ask", "--store", tmp_path, QUESTION, status=1)
