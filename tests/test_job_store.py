"""A store takes each part whole, knows what it is about and how far it is, and serves one job at a time."""

import errno
import multiprocessing
import shutil
import time
from itertools import product

import numpy as np
import pytest
import torch
import zarr
from filelock import FileLock
from safetensors.torch import save_file

from support.job.errors import DiskFull, StepMissing, StoreBusy, StoreDamaged, StoreMismatch
from support.job.layout import FITTED
from support.job.store import Store, disk_full_is_told, in_blocks

WHOLE = (range(0, 2), range(0, 3))


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "store")
    made.begin()
    return made


@pytest.fixture
def scored(store):
    """Two queries, five training examples, the second block of training examples missing."""
    store.make_array("scores", (2, 5), (2, 3), "float32")
    store.write("scores", WHOLE, np.arange(6, dtype=np.float32).reshape(2, 3))
    return store


def test_what_is_written_is_read_and_what_is_missing_is_told(scored):
    np.testing.assert_array_equal(scored.read("scores", WHOLE), [[0, 1, 2], [3, 4, 5]])
    assert scored.has("scores", WHOLE)
    for missing in (range(3, 5), range(0, 5)):
        assert not scored.has("scores", (range(0, 2), missing))
        with pytest.raises(StepMissing, match=r"^Not all scores are there yet\. Run: score\. It goes on"):
            scored.read("scores", (range(0, 2), missing))


def test_anyone_can_read_the_results_with_zarr(scored):
    group = zarr.open_group(scored.folder / "results.zarr", mode="r")
    assert group.attrs["format"] == "influence-job-3"
    assert group["scores"].metadata.dimension_names == ("query", "training")


def test_facts_are_settled_once_and_then_compared_entry_by_entry(store):
    training = {"examples": 5, "digest": "abc"}
    for _ in range(2):
        store.settle({"training": training})
    with pytest.raises(StoreMismatch, match="training: examples is 6 here, but 5 in the store"):
        store.settle({"training": training | {"examples": 6}, "shards": 3})
    with pytest.raises(StoreMismatch, match="training: digest is None here, but 'abc'"):
        store.settle({"training": {"examples": 5}})
    store.settle({"shards": 2})  # nothing was settled of what was refused
    with pytest.raises(StoreMismatch, match="shards is 3 here, but 2 in the store"):
        store.settle({"training": training, "shards": 3})


def test_beginning_again_keeps_everything(scored):
    scored.settle({"shards": 2})
    scored.begin()
    scored.make_array("scores", (2, 5), (2, 3), "float32")
    assert scored.facts()["shards"] == 2
    assert scored.has("scores", WHOLE)


@pytest.mark.parametrize("rows", [[3, 5, 8], [0]])
def test_rows_that_a_kill_left_unwritten_are_written_again(store, rows):
    store.keep_rows("training_rows", np.array(rows))
    (store.folder / "results.zarr" / "training_rows" / "c" / "0").unlink()
    assert not store.has("training_rows", (range(len(rows)),))
    store.keep_rows("training_rows", np.array(rows))
    assert store.read("training_rows", (range(len(rows)),)).tolist() == rows


def test_chunks_may_change_until_something_is_in_them(store):
    store.make_array("scores", (4, 6), (4, 3), "float32")
    store.make_array("scores", (4, 6), (2, 3), "float32")
    assert store.array("scores").chunks == (2, 3)
    store.write("scores", (range(0, 2), range(0, 3)), np.ones((2, 3), np.float32))
    store.make_array("scores", (4, 6), (4, 3), "float32")
    assert store.array("scores").chunks == (2, 3)
    assert store.has("scores", (range(0, 2), range(0, 3)))


@pytest.mark.parametrize(
    ("attributes", "error", "message"),
    [
        ({}, StoreDamaged, r"zarr.json is not as this job wrote it \(KeyError: 'format'\)"),
        ({"format": "influence-job-0"}, StoreMismatch, "format 'influence-job-0', expected"),
    ],
)
def test_a_zarr_group_of_someone_else_or_of_another_format_is_refused(tmp_path, attributes, error, message):
    zarr.create_group(tmp_path / "results.zarr", attributes=attributes)
    with pytest.raises(error, match=message):
        Store(tmp_path).facts()


def test_what_a_killed_run_left_half_written_is_swept(scored, alone):
    halves = [
        scored.folder / "results.zarr" / "scores" / "c" / "0" / "1.abc.partial",
        scored.folder / "curvature.safetensors.partial",
    ]
    for half in halves:
        half.write_bytes(b"half")
    with scored.claimed(alone()):
        pass
    assert not any(half.exists() for half in halves)
    assert scored.has("scores", WHOLE)


def _hold(lock, held):
    with FileLock(lock):
        held.set()
        time.sleep(60)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_job_is_refused_until_every_process_of_the_first_is_gone(store, alone, rank):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    holder = context.Process(target=_hold, args=(store.folder / "locks" / f"rank-{rank}", held))
    (store.folder / "locks").mkdir()
    holder.start()
    try:
        assert held.wait(30)
        with pytest.raises(StoreBusy, match="Another job is at work on .*store. Wait for it"):
            store.claimed(alone()).__enter__()
    finally:
        holder.kill()
        holder.join()
    with store.claimed(alone()):
        pass
    shutil.rmtree(store.folder)
    store.folder.touch()
    with pytest.raises(StoreMismatch, match="is a file. Name a folder"):
        store.claimed(alone()).__enter__()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_the_systems_ways_to_say_full_are_told_as_one(tmp_path, number):
    with (
        pytest.raises(DiskFull, match="make room and run the same command again"),
        disk_full_is_told(tmp_path),
    ):
        raise OSError(number, "No space left on device")


def test_a_full_disk_leaves_finished_chunks_and_the_last_sums_whole_and_no_halves(small_disk):
    store = Store(small_disk(512) / "store")
    store.begin()
    store.save_sums("covariances-0", {"sum": torch.ones(1000)}, 2)
    store.make_array("scores", (64, 10_000), (64, 1000), "float32")
    noise = np.random.default_rng(0).normal(size=(64, 1000)).astype(np.float32)
    places = [(range(64), range(start, start + 1000)) for start in range(0, 10_000, 1000)]

    def fill():
        for place in places:
            store.write("scores", place, noise)

    with pytest.raises(DiskFull, match="No room left for .*store"):
        fill()
    np.testing.assert_array_equal(store.read("scores", places[0]), noise)
    assert not store.has("scores", places[-1])
    with pytest.raises(DiskFull, match="No room left"):
        store.save_sums("covariances-0", {"sum": torch.ones(200_000)}, 3)
    assert store.load_sums("covariances-0", header_only=True) == ({}, 2)
    assert not list(store.folder.rglob("*.partial"))


def test_sums_come_back_with_the_number_of_blocks_they_are_over(store):
    sums = {"a": torch.arange(6.0).view(2, 3), "counts": torch.tensor([3, 4])}
    store.save_sums("sums", sums, 5)
    found, blocks = store.load_sums("sums")
    assert blocks == store.load_sums("sums", header_only=True)[1] == 5
    torch.testing.assert_close(found, sums, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("examples", "size", "blocks"),
    [(7, 3, [range(0, 3), range(3, 6), range(6, 7)]), (6, 3, [range(0, 3), range(3, 6)]), (0, 5, [])],
)
def test_only_the_last_block_may_be_shorter(examples, size, blocks):
    assert in_blocks(examples, size) == blocks


# How far it is

PLACES = list(product(in_blocks(3, 2), in_blocks(11, 4)))


def test_a_fit_has_come_as_far_as_its_saved_sums(store):
    assert store.progress() == {"fit": "not yet", "score": "not yet", "self": "not yet"}
    store.partial_fit.mkdir()
    assert store.progress()["fit"] == "begun"
    for shard, blocks in enumerate([3, 2]):
        store.save_sums(f"covariances-{shard}", {"sum": torch.ones(2)}, blocks)
    assert store.progress()["fit"] == "covariances of 5 blocks"
    store.save_sums("eigenvalues-1", {"sum": torch.ones(2)}, 1)
    assert store.progress()["fit"] == "eigenvalues of 1 block"
    save_file({}, store.curvature, metadata={"job": store.belonging(FITTED)})
    assert store.progress() == {"fit": "done", "score": "not yet", "self": "not yet"}


@pytest.mark.parametrize("places", [[], PLACES[:1], [PLACES[1], PLACES[-1]], PLACES[:5]])
def test_half_scored_means_so_many_chunks_of_all_wherever_they_lie(store, places):
    store.make_array("scores", (3, 11), (2, 4), "float32")
    for place in places:
        store.write("scores", place, np.ones([*map(len, place)], dtype=np.float32))
    assert store.progress()["score"] == f"{len(places)} of 6 blocks"
