"""Real processes on a model that writes: several agree with one, and a kill changes nothing."""

import numpy as np
import pytest

from support.job.store import Store
from tests.processes import await_moment, finished, kill, launched
from tests.tiny_language import make_model, make_rows, make_texts, options


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Texts enough to be killed among, most longer than a piece, and prompts for the model to complete."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = make_texts(folder / "texts", training=37, longest=12)
    make_rows(
        folder / "queries.jsonl", [{"prompt": prompt} for prompt in ("the film", "who laughs of", "dull")]
    )
    return make_model(folder / "model"), texts


def arguments(inputs, store):
    more = ("--pieces", "--max-tokens", 8, "--new-tokens", 3, "--query-rank", 4)
    return ["run", *options(*inputs, store, *more)]


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """The store of two processes that nothing disturbed."""
    store = tmp_path_factory.mktemp("undisturbed") / "store"
    finished(launched(arguments(inputs, store), processes=2))
    return store


def results(store):
    return {name: Store(store).array(name)[:] for name in ("scores", "self_influences")}


def test_two_processes_agree_with_one_to_rounding(inputs, undisturbed, tmp_path):
    finished(launched(arguments(inputs, tmp_path)))
    expected = results(tmp_path)
    for name, found in results(undisturbed).items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(found, expected[name], atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("moment", ["tokens/*.arrow", "results.zarr/scores/c/0/*"])
def test_a_kill_changes_no_number(inputs, undisturbed, tmp_path, moment):
    store = tmp_path / "store"
    run = arguments(inputs, store)
    job = launched(run, processes=2)
    await_moment(job, lambda: any(store.glob(moment)))
    kill(job)
    finished(launched(run, processes=2))
    for name, found in results(store).items():
        np.testing.assert_array_equal(found, results(undisturbed)[name])
