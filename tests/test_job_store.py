"""A store takes each part whole, knows what it belongs to, and serves one job at a time."""

import errno
import multiprocessing
import shutil
import time

import numpy as np
import pytest
import torch
import zarr
from filelock import FileLock

from support.job.errors import DiskFull, StepMissing, StoreBusy, StoreDamaged, StoreMismatch
from support.job.store import Store, disk_full_is_told, in_blocks

WHOLE = (range(0, 2), range(0, 3))


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 0xFF
    path.write_bytes(content)


def truncated(path):
    path.write_bytes(path.read_bytes()[:9])


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


def test_rows_that_a_kill_left_unwritten_are_written_again(store):
    store.keep_rows("training_rows", np.array([3, 5, 8]))
    (store.folder / "results.zarr" / "training_rows" / "c" / "0").unlink()
    assert not store.has("training_rows", (range(3),))
    store.keep_rows("training_rows", np.array([3, 5, 8]))
    assert store.array("training_rows")[:].tolist() == [3, 5, 8]


def test_the_first_row_alone_is_kept(store):
    store.keep_rows("query_rows", np.array([0]))
    assert store.read("query_rows", (range(1),)).tolist() == [0]


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


@pytest.mark.parametrize("damage", [flipped, truncated])
def test_what_is_damaged_is_told_and_a_chunk_counts_as_missing(scored, damage):
    damage(scored.folder / "results.zarr" / "scores" / "c" / "0" / "0")
    with pytest.raises(StoreDamaged, match="Chunk c/0/0 of scores is damaged"):
        scored.read("scores", WHOLE)
    assert not scored.has("scores", WHOLE)
    damage(scored.folder / "results.zarr" / "scores" / "zarr.json")
    with pytest.raises(StoreDamaged, match="results.zarr/scores/zarr.json is not as this job wrote it"):
        scored.read("scores", WHOLE)
    scored.save_sums("eigenvalues-0", {"a": torch.ones(50)}, 2)
    damage(scored.partial_fit / "eigenvalues-0.safetensors")
    with pytest.raises(
        StoreDamaged, match=r"eigenvalues-0.safetensors is not as this job wrote it .* Remove it"
    ):
        scored.load_sums("eigenvalues-0")


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


def test_a_full_disk_leaves_finished_chunks_whole_and_no_halves(small_disk):
    store = Store(small_disk(512) / "store")
    store.begin()
    store.make_array("scores", (64, 10_000), (64, 1000), "float32")
    noise = np.random.default_rng(0).normal(size=(64, 1000)).astype(np.float32)

    def fill():
        for start in range(0, 10_000, 1000):
            store.write("scores", (range(0, 64), range(start, start + 1000)), noise)

    with pytest.raises(DiskFull, match="No room left for .*store"):
        fill()
    assert store.has("scores", (range(0, 64), range(0, 1000)))
    np.testing.assert_array_equal(store.read("scores", (range(0, 64), range(0, 1000))), noise)
    assert not store.has("scores", (range(0, 64), range(9000, 10_000)))
    assert not list(store.folder.rglob("*.partial"))


def test_sums_that_find_no_room_leave_the_last_ones(small_disk):
    store = Store(small_disk(512) / "store")
    store.begin()
    store.save_sums("covariances-0", {"sum": torch.ones(1000)}, 2)
    with pytest.raises(DiskFull, match="No room left"):
        store.save_sums("covariances-0", {"sum": torch.ones(200_000)}, 3)
    assert store.load_sums("covariances-0", header_only=True) == ({}, 2)
    assert [file.name for file in store.partial_fit.iterdir()] == ["covariances-0.safetensors"]


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
