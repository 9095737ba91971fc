"""Real processes: several agree with one, and a kill changes nothing, whatever kind the model is of."""

import os
import random
import shutil
import signal

import numpy as np
import pytest
import zarr

from tests import tiny_language
from tests.processes import await_moment, ended, finished, kill, launched, workers
from tests.tiny_job import QUERIES, TRAINING, attributes, make_model, make_reviews, options

ARRAYS = ("scores", "self_influences")


def classifier(folder, **sizes):
    """What `run` is told, given a store."""
    model, reviews = make_model(folder / "model"), make_reviews(folder / "reviews", **sizes)
    return lambda store: ["run", *options(model, reviews, store)]


def writer(folder):
    """Texts of which most are longer than a piece, and prompts for the model to complete."""
    texts = tiny_language.make_texts(folder / "texts", training=37, longest=12)
    prompts = ({"prompt": prompt} for prompt in ("the film", "who laughs of", "dull"))
    tiny_language.make_rows(folder / "queries.jsonl", prompts)
    model = tiny_language.make_model(folder / "model")
    more = ("--pieces", "--max-tokens", 8, "--new-tokens", 3, "--query-rank", 4)
    return lambda store: ["run", *tiny_language.options(model, texts, store, *more)]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A job of a few reviews."""
    return classifier(tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def alone(few, tmp_path_factory):
    """The store of one process that nothing disturbed."""
    store = tmp_path_factory.mktemp("alone") / "store"
    finished(launched(few(store)))
    return store


@pytest.fixture(scope="module", params=["classifier", "writer"])
def many(request, tmp_path_factory):
    """A job of examples enough to be killed among."""
    folder = tmp_path_factory.mktemp(request.param)
    return writer(folder) if request.param == "writer" else classifier(folder, training=201, queries=5)


@pytest.fixture(scope="module")
def undisturbed(many, tmp_path_factory):
    """The store of two processes that nothing disturbed."""
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    finished(launched(many(store), processes=2))
    return store


def results(store):
    group = zarr.open_group(store / "results.zarr", mode="r")
    return {name: group[name][:] for name in ARRAYS}


def assert_same(store, other, tolerance=0.0):
    """To the bit, or to so much of the largest number."""
    for name, expected in results(other).items():
        most = tolerance * np.abs(expected).max()
        np.testing.assert_allclose(results(store)[name], expected, atol=most, rtol=0)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_agree_with_one_to_rounding_and_speak_once(few, alone, tmp_path, processes):
    said = finished(launched(few(tmp_path), processes))
    assert said.count(f"Scored {TRAINING} training examples on {QUERIES} queries.") == 1
    assert attributes(tmp_path)["shards"] == processes
    assert_same(tmp_path, alone, 1e-5)
    said = finished(launched(["top", "--store", str(tmp_path), "--count", "2"], processes))
    assert said.count("Over all queries:") == 1
    assert (tmp_path / "top.html").exists()
    said = finished(launched(["suspects", "--store", str(tmp_path)], processes))
    assert said.count(f"{TRAINING} of {TRAINING} training examples, by rank_loss, ") == 1


@pytest.mark.parametrize("many", ["writer"], indirect=True)
def test_two_processes_of_a_model_that_writes_agree_with_one_to_rounding(many, undisturbed, tmp_path):
    finished(launched(many(tmp_path)))
    assert_same(undisturbed, tmp_path, 1e-4)


MOMENTS = {
    "tokens": "tokens/*.arrow",
    "covariances": "fit/covariances-*.safetensors",
    "eigenvalues": "fit/eigenvalues-*.safetensors",
    "scores": "results.zarr/scores/c/0/*",
}
KILLED = [("classifier", moment) for moment in ("covariances", "eigenvalues", "scores")]
KILLED += [("writer", moment) for moment in ("tokens", "scores")]


def begun(run, store, moment="covariances", processes=2):
    """A job that has come so far."""
    job = launched(run, processes)
    await_moment(job, lambda: any(store.glob(MOMENTS[moment])))
    return job


@pytest.mark.parametrize(("many", "moment"), KILLED, indirect=["many"])
def test_a_kill_changes_no_number(many, undisturbed, tmp_path, moment):
    kill(begun(many(tmp_path), tmp_path, moment))
    assert not (tmp_path / "results.zarr" / "self_influences").exists()
    finished(launched(many(tmp_path), processes=2))
    assert_same(tmp_path, undisturbed)


@pytest.mark.parametrize("many", ["classifier"], indirect=True)
def test_a_kill_changes_no_number_of_a_question(many, undisturbed, tmp_path):
    store = shutil.copytree(undisturbed, tmp_path / "store")
    asked = ["--query-rows", "all", "--regularization", "0.5", "--query-block", "2"]
    whole, killed = (["score", "--store", str(store), *asked, "--question", name] for name in "ab")
    finished(launched(whole, processes=2))
    job = launched(killed, processes=2)
    questions = store / "results.zarr" / "questions"
    # Of a whole chunk: before it nothing holds the size of the groups, which is not said again.
    await_moment(job, lambda: any(questions.glob("b/scores/c/0/*.seal")))
    kill(job)
    finished(launched([*killed[:3], "--question", "b"], processes=2))
    first, second = (zarr.open_array(questions / name / "scores", mode="r")[:] for name in "ab")
    np.testing.assert_array_equal(first, second)
    assert np.isfinite(first).all()
    assert_same(store, undisturbed)


@pytest.mark.parametrize("many", ["classifier"], indirect=True)
def test_one_process_lost_ends_all_and_the_rest_goes_on_with_what_the_store_knows(
    many, undisturbed, tmp_path
):
    job = begun(many(tmp_path), tmp_path)
    random.Random(0).choice(workers(job)).kill()
    status, said = ended(job)
    assert status
    assert "Signal 9" in said
    again = ["run", "--store", str(tmp_path), "--query-block", "2", "--save-seconds", "0"]
    finished(launched(again, processes=2))
    assert_same(tmp_path, undisturbed)


def test_a_model_that_can_t_be_loaded_is_told_once_by_all(tmp_path):
    run = ["run", *options(tmp_path / "nowhere", make_reviews(tmp_path / "reviews"), tmp_path / "store")]
    status, said = ended(launched(run, processes=2))
    assert status
    assert said.count("ModelNotUsable: --model ") == 1
    assert "gloo" not in said


def test_a_full_disk_is_told_and_with_more_room_the_job_goes_on(few, alone, small_disk):
    needed = sum(-(-path.stat().st_size // 4096) for path in alone.rglob("*") if path.is_file())
    store = small_disk(2 * needed) / "store"
    status, said = ended(launched(few(store)))
    assert status == 1
    assert "DiskFull: No room left for" in said
    assert "make room and run the same command again" in said
    small_disk(64_000, again=True)
    finished(launched(few(store)))
    assert_same(store, alone)


@pytest.mark.parametrize("many", ["classifier"], indirect=True)
def test_a_second_job_on_a_store_is_refused_while_the_first_is_at_work(many, tmp_path):
    first = begun(many(tmp_path), tmp_path, processes=1)
    os.kill(first.pid, signal.SIGSTOP)
    status, said = ended(launched(many(tmp_path)))
    first.kill()
    first.communicate()
    assert status == 1
    assert "StoreBusy: Another job is at work on" in said
