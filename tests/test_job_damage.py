"""Whatever happens to a part of a store, no other numbers come of it: it is refused by name, or made anew."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numcodecs import Pickle

from support.job.errors import StepMissing, StoreDamaged, StoreMismatch
from support.job.fit import fit
from support.job.score import score, self_influences
from support.job.store import Store
from tests.damage import emptied, flipped, truncated
from tests.test_job_numbers import fitted, new_engine, new_job, scored

pytestmark = pytest.mark.usefixtures("alone")

PLACE = (range(0, 2), range(0, 3))
DAMAGES = (flipped, truncated, emptied)


def begun(folder, regularization="0.01"):
    """A store with an array of one query group and two blocks."""
    store = Store(folder)
    store.begin()
    store.settle({"damping": {"regularization": regularization}})
    store.make_array("scores", (2, 6), (2, 3), "float32")
    return store


def filled(folder, regularization="0.01", scale=1):
    store = begun(folder, regularization)
    store.write("scores", PLACE, np.full((2, 3), scale, np.float32))
    store.write("scores", (range(2), range(3, 6)), np.full((2, 3), 2 * scale, np.float32))
    return store


def made_a_folder(path):
    path.unlink()
    path.mkdir()


def exchanged(path):
    other = path.with_name(path.name.replace("0", "1", 1))
    path.rename(path.with_name("kept"))
    other.rename(path)
    path.with_name("kept").rename(other)


def exchanged_with_their_seals(path):
    exchanged(path)
    exchanged(path.with_name(f"{path.name}.seal"))


# Each part is one of this store, at its place


@pytest.mark.parametrize("shards", [0, -1, 10**12, "2"])
def test_a_number_of_shards_that_can_not_be_is_refused_and_not_counted_out(tmp_path, shards):
    job = new_job(tmp_path)
    job.begin()
    job.store.settle({"shards": shards})
    with pytest.raises(StoreDamaged, match=f"says shards: {shards}, of .* Name another --store"):
        fit(job)


@pytest.mark.parametrize("damage", [*DAMAGES, exchanged, exchanged_with_their_seals])
def test_a_chunk_that_is_damaged_or_of_another_place_is_told_and_counts_as_missing(tmp_path, damage):
    store = filled(tmp_path)
    damage(tmp_path / "results.zarr" / "scores" / "c" / "0" / "0")
    assert not store.has("scores", PLACE)
    with pytest.raises(StoreDamaged, match=r"Chunk c/0/0 of scores is damaged, .* Run the step again"):
        store.read("scores", PLACE)
    others = 0 if damage in (exchanged, exchanged_with_their_seals) else 1
    assert store.progress()["score"] == f"{others} of 2 blocks"


def test_a_chunk_of_other_settings_is_none_of_this_store(tmp_path):
    store, other = filled(tmp_path / "one"), filled(tmp_path / "other", "0.02", 5)
    shutil.copytree(
        other.folder / "results.zarr" / "scores", store.folder / "results.zarr" / "scores", dirs_exist_ok=True
    )
    assert not store.has("scores", PLACE)


@pytest.mark.parametrize("name", ["scores", "layer_scores", "self_influences"])
@pytest.mark.parametrize("more", [-1, 1])
def test_an_array_whose_cut_was_edited_ends_with_the_very_same_numbers(tmp_path, name, more):
    def every_number():
        store = scored(tmp_path, by_layer=True)
        self_influences(new_job(tmp_path, by_layer=True))
        return store.array("scores")[:], store.array("layer_scores")[:], store.array("self_influences")[:]

    before = every_number()
    path = tmp_path / "results.zarr" / name / "zarr.json"
    told = json.loads(path.read_text())
    told["chunk_grid"]["configuration"]["chunk_shape"][-1] += more
    path.write_text(json.dumps(told, indent=2))
    for found, expected in zip(every_number(), before, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("change", ["place", "blocks", "facts", "tensor"])
def test_sums_are_of_this_store_at_their_place_over_so_many_blocks(tmp_path, change):
    store = begun(tmp_path / "one")
    store.settle({"subject": {"block": 3}})
    store.save_sums("basis-0", {"a": torch.ones(50)}, 2)
    path = store.partial_fit / "basis-0.safetensors"
    if change == "place":
        path = path.rename(store.partial_fit / "basis-1.safetensors")
    elif change == "blocks":
        path.write_bytes(path.read_bytes().replace(b'"blocks":"2"', b'"blocks":"3"'))
    elif change == "facts":
        other = begun(tmp_path / "other")
        other.settle({"subject": {"block": 4}})
        other.save_sums("basis-0", {"a": torch.ones(50)}, 2)
        shutil.copy((other.partial_fit / "basis-0.safetensors"), path)
    else:
        flipped(path)
    with pytest.raises(
        StoreDamaged, match=f"{path.name} is not as this job wrote it .* Remove it and run: fit"
    ):
        store.load_sums(path.stem)


@pytest.mark.parametrize("damage", [*DAMAGES, Path.unlink, made_a_folder])
def test_damaged_attributes_are_never_taken_for_none(tmp_path, damage):
    store = filled(tmp_path)
    path = tmp_path / "results.zarr" / "zarr.json"
    damage(path)
    for step in (store.facts, store.progress, lambda: store.settle({"shards": 1})):
        store.begin()
        with pytest.raises(
            StoreDamaged, match="zarr.json is not as this job wrote it .* Name another --store"
        ):
            step()
    assert len(list(tmp_path.glob("results.zarr/scores/c/0/?"))) == 2


@pytest.mark.parametrize(
    ("written", "edited"),
    [
        ('"regularization": "0.01"', '"regularization": "0.03"'),
        ('"zarr_format": 3,', '"zarr_format": 3,\n "consolidated_metadata": {},'),
        ('"seal": "', '"seal": "0'),
    ],
)
def test_attributes_that_were_edited_are_refused(tmp_path, written, edited):
    store = filled(tmp_path)
    path = tmp_path / "results.zarr" / "zarr.json"
    assert written in path.read_text()
    path.write_text(path.read_text().replace(written, edited))
    with pytest.raises(StoreDamaged, match="its seal differs"):
        store.facts()


# A curvature belongs to the examples it was fitted on


def of_other_examples(path, folder):
    job = new_job(folder)
    vars(job)["fitted_on"] = vars(job)["fitted_on"].select(np.arange(5))
    fit(job)
    shutil.copy(job.store.curvature, path)


def of_another_model(path, folder):
    engine = new_engine()
    with torch.no_grad():
        next(engine.model.parameters()).mul_(2)
    shutil.copy(fitted(folder, engine=engine).store.curvature, path)


READERS = (score, self_influences)
ALL = (fit, *READERS, lambda job: job.store.progress())


@pytest.mark.parametrize(
    ("change", "noticed_by"),
    [(of_other_examples, ALL), (of_another_model, ALL), *((damage, READERS) for damage in DAMAGES)],
)
def test_a_curvature_that_is_not_this_job_s_is_refused_until_it_is_removed(tmp_path, change, noticed_by):
    whole = scored(tmp_path / "store").array("scores")[:]
    store = Store(tmp_path / "store")
    change(store.curvature, *([tmp_path / "other"] if noticed_by is ALL else []))
    for step in noticed_by:
        with pytest.raises(StoreDamaged, match=r"curvature.safetensors .* Remove it and run: fit"):
            step(new_job(store.folder))
    store.curvature.unlink()
    with pytest.raises(StepMissing, match="no curvature yet. Run: fit"):
        score(new_job(store.folder))
    shutil.rmtree(store.folder / "results.zarr" / "scores" / "c")
    np.testing.assert_array_equal(scored(store.folder).array("scores")[:], whole)


@pytest.mark.parametrize(
    ("package", "told"), [("torch", True), ("transformers", True), ("support", True), ("zarr", False)]
)
def test_another_version_of_what_counts_is_told_once(tmp_path, capsys, package, told):
    job = new_job(tmp_path)
    job.store.settle({"versions": job.versions | {package: "0.1"}})
    fit(new_job(tmp_path))
    line = f"The store was begun with {package} 0.1; here it is {job.versions[package]}: last digits of"
    assert capsys.readouterr().err.count(line) == told


# A stranger's store


@pytest.mark.parametrize("step", ["facts", "array", "progress"])
def test_a_codec_that_no_job_writes_is_refused_before_anything_is_read(tmp_path, monkeypatch, step):
    def reached(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(Pickle, "decode", reached)
    store = begun(tmp_path)
    array = {"zarr_format": 2, "shape": [2, 3], "chunks": [2, 3], "dtype": "|O", "fill_value": ""}
    array |= {"order": "C", "compressor": {"id": "pickle", "protocol": 5}, "filters": [{"id": "vlen-utf8"}]}
    inline = {"kind": "inline", "must_understand": False, "metadata": {"scores": array}}
    path = tmp_path / "results.zarr" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"consolidated_metadata": inline}))
    with pytest.raises(StoreDamaged):
        {"facts": store.facts, "array": lambda: store.array("scores"), "progress": store.progress}[step]()


@pytest.mark.parametrize(
    ("written", "edited"),
    [
        (b'"zstd"', b'"gzip"'),
        (b'"crc32c"', b'"numcodecs.pickle"'),
        (b'"float32"', b'"string"'),
        (b"    6\n", b"    600000000000000\n"),
        (b'"storage_transformers": []', b'"storage_transformers": [{}]'),
        (b'"default"', b'"v2"'),
    ],
)
def test_a_description_that_no_job_writes_is_refused_and_written_anew(tmp_path, written, edited):
    store = filled(tmp_path)
    path = tmp_path / "results.zarr" / "scores" / "zarr.json"
    before = path.read_bytes()
    assert written in before
    path.write_bytes(before.replace(written, edited))
    with pytest.raises((StoreDamaged, StepMissing)):
        store.read("scores", PLACE)
    store.make_array("scores", (2, 6), (2, 3), "float32")
    assert path.read_bytes() == before
    assert store.has("scores", PLACE)


def test_a_huge_shape_costs_nothing(tmp_path):
    store = begun(tmp_path)
    store.make_array("scores", (2, 10**15), (2, 3), "float32")
    assert store.progress()["score"] == "0 of 333333333333334 blocks"


@pytest.mark.parametrize("place", ["tokens", "fit", "locks", "top.html", "results.zarr/scores"])
def test_what_a_link_points_to_is_neither_swept_nor_written(tmp_path, alone, place):
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("tmp_thesis.tex", "notes.partial", "rank-0"):
        (mine / name).write_text("precious")
    store = begun(tmp_path / "store")
    shutil.rmtree(store.folder / place, ignore_errors=True)
    (store.folder / place).symlink_to(mine)
    with pytest.raises(StoreMismatch, match=f"{place} is a link, and a store holds none. Remove it"):
        store.claimed(alone()).__enter__()
    job = new_job(tmp_path / "other")
    vars(job).update(store=store)
    with pytest.raises(StoreMismatch, match="is a link"):
        _ = job.stored
    assert [path.read_text() for path in mine.iterdir()] == ["precious"] * 3
