"""Real processes: several agree with one, and a kill changes nothing."""

import os
import random
import signal

import numpy as np
import pytest
import zarr

from tests.processes import await_moment, ended, finished, kill, launched, workers
from tests.tiny_job import QUERIES, TRAINING, attributes, make_model, make_reviews, options

ARRAYS = ("scores", "self_influences")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    return make_reviews(tmp_path_factory.mktemp("reviews"))


@pytest.fixture(scope="module")
def alone(model, reviews, tmp_path_factory):
    """The store of one process that nothing disturbed."""
    store = tmp_path_factory.mktemp("alone") / "store"
    finished(launched(["run", *options(model, reviews, store)]))
    return store


def results(store):
    group = zarr.open_group(store / "results.zarr", mode="r")
    return {name: group[name][:] for name in ARRAYS}


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_agree_with_one_to_rounding_and_speak_once(
    model, reviews, alone, tmp_path, processes
):
    said = finished(launched(["run", *options(model, reviews, tmp_path)], processes))
    assert said.count(f"Scored {TRAINING} training examples on {QUERIES} queries.") == 1
    assert attributes(tmp_path)["shards"] == processes
    expected = results(alone)
    for name, found in results(tmp_path).items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(found, expected[name], atol=1e-5 * scale, rtol=0)
    said = finished(launched(["top", "--store", str(tmp_path), "--count", "2"], processes))
    assert said.count("Over all queries:") == 1
    assert (tmp_path / "top.html").exists()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Reviews enough to be killed among."""
    return make_reviews(tmp_path_factory.mktemp("many"), training=201, queries=5)


@pytest.fixture(scope="module")
def undisturbed(model, many, tmp_path_factory):
    """The store of two processes that nothing disturbed."""
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    finished(launched(["run", *options(model, many, store)], processes=2))
    return store


MOMENTS = {
    "covariances": "fit/covariances-*.safetensors",
    "eigenvalues": "fit/eigenvalues-*.safetensors",
    "scores": "results.zarr/scores/c/0/*",
}


def begun(run, store, moment="covariances", processes=2):
    """A job that has come so far."""
    job = launched(run, processes)
    await_moment(job, lambda: any(store.glob(MOMENTS[moment])))
    return job


def assert_same(store, other):
    for name, found in results(store).items():
        np.testing.assert_array_equal(found, results(other)[name])


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_changes_no_number(model, many, undisturbed, tmp_path, moment):
    store = tmp_path / "store"
    run = ["run", *options(model, many, store)]
    kill(begun(run, store, moment))
    assert not (store / "results.zarr" / "self_influences").exists()
    again = ["run", "--store", str(store), "--query-block", "2", "--save-seconds", "0"]
    finished(launched(again, processes=2))
    assert_same(store, undisturbed)


def test_one_process_lost_ends_all_and_the_rest_goes_on_from_there(model, many, undisturbed, tmp_path):
    store = tmp_path / "store"
    run = ["run", *options(model, many, store)]
    job = begun(run, store)
    random.Random(0).choice(workers(job)).kill()
    status, said = ended(job)
    assert status
    assert "Signal 9" in said
    finished(launched(run, processes=2))
    assert_same(store, undisturbed)


def test_a_model_that_can_t_be_loaded_is_told_once_by_all(reviews, tmp_path):
    job = launched(["run", *options(tmp_path / "nowhere", reviews, tmp_path / "store")], processes=2)
    status, said = ended(job)
    assert status
    assert said.count("ModelNotUsable: --model ") == 1
    assert "gloo" not in said


def test_a_full_disk_is_told_and_with_more_room_the_job_goes_on(model, reviews, alone, small_disk):
    needed = sum(-(-path.stat().st_size // 4096) for path in alone.rglob("*") if path.is_file())
    store = small_disk(2 * needed) / "store"
    run = ["run", *options(model, reviews, store)]
    status, said = ended(launched(run))
    assert status == 1
    assert "DiskFull: No room left for" in said
    assert "make room and run the same command again" in said
    small_disk(64_000, again=True)
    finished(launched(run))
    assert_same(store, alone)


def test_a_second_job_on_a_store_is_refused_while_the_first_is_at_work(model, many, tmp_path):
    store = tmp_path / "store"
    run = ["run", *options(model, many, store)]
    first = begun(run, store, processes=1)
    os.kill(first.pid, signal.SIGSTOP)
    status, said = ended(launched(run))
    first.kill()
    first.communicate()
    assert status == 1
    assert "StoreBusy: Another job is at work on" in said
