"""A store says what it is about and how far each step has come."""

from itertools import product

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from support.job.command import shown
from support.job.layout import FITTED
from support.job.store import Store, in_blocks

QUERIES, TRAINING, CHUNKS = 3, 11, (2, 4)
PLACES = list(product(in_blocks(QUERIES, 2), in_blocks(TRAINING, 4)))


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    store.begin()
    return store


def fit(store):
    save_file({}, store.curvature, metadata={"job": store.belonging(FITTED)})


def score(store, places):
    store.make_array("scores", (QUERIES, TRAINING), CHUNKS, "float32")
    for place in places:
        store.write("scores", place, np.ones([*map(len, place)], dtype=np.float32))


def own(store, places):
    store.make_array("self_influences", (TRAINING,), CHUNKS[1:], "float32")
    for place in places:
        store.write("self_influences", (place,), np.ones(len(place)))


def test_a_fit_has_come_as_far_as_its_saved_sums(store):
    assert store.progress() == {"fit": "not yet", "score": "not yet", "self": "not yet"}
    store.partial_fit.mkdir()
    assert store.progress()["fit"] == "begun"
    for shard, blocks in enumerate([3, 2]):
        sums = {"sum": torch.ones(2)}
        store.save_sums(f"covariances-{shard}", sums, blocks)
    assert store.progress()["fit"] == "covariances of 5 blocks"
    store.save_sums("eigenvalues-1", {"sum": torch.ones(2)}, 1)
    assert store.progress()["fit"] == "eigenvalues of 1 block"
    fit(store)
    assert store.progress() == {"fit": "done", "score": "not yet", "self": "not yet"}


@pytest.mark.parametrize("places", [[], PLACES[:1], [PLACES[1], PLACES[-1]], PLACES[:5]])
def test_half_scored_means_so_many_chunks_of_all_wherever_they_lie(store, places):
    score(store, places)
    assert store.progress()["score"] == f"{len(places)} of 6 blocks"


def test_when_every_chunk_is_there_each_step_is_done(store):
    fit(store)
    score(store, PLACES)
    own(store, [place for _, place in PLACES[:3]])
    assert store.progress() == {"fit": "done", "score": "done", "self": "done"}


def test_facts_are_shown_in_a_line_each_and_those_left_empty_are_not(store):
    rows = ",".join(map(str, range(500)))
    store.settle({"subject": {"model": "mine", "layers": "", "training_rows": rows}, "shards": 2})
    lines = shown(store).split("\n")
    assert lines[:4] == [str(store.folder), "format: influence-job-3", "subject:", "  model: mine"]
    assert lines[4].startswith("  training_rows: 0,1,2")
    assert lines[4].endswith("…")
    assert len(lines[4]) < 120
    assert lines[5:] == ["shards: 2", "progress:"] + [
        f"  {step}: not yet" for step in ("fit", "score", "self")
    ]
