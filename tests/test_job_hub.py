"""A job on names of the hub: the real loading code against a stand-in on 127.0.0.1."""

import numpy as np
import pandas as pd
import pytest
import zarr

from support.imdb import HUB_DATASET
from support.model import HUB_MODEL, load_tokenizer
from tests.processes import finished, launched
from tests.stand_in_hub import MODEL_SEED, first_of_each_class, running_hub, tiny_distilbert
from tests.tiny_job import attributes

ROWS = [3, 7, 42, 60]


@pytest.fixture
def from_hub(tmp_path, monkeypatch):
    """A job's commands, in processes that know the stand-in as the hub and have nothing cached."""
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield lambda *arguments: finished(launched([*map(str, arguments)]))


def options(model, dataset, store):
    return [
        *("--model", model, "--dataset", dataset, "--store", store, "--max-tokens", 32),
        *("--layers", "ffn,classifier", "--training-rows", ",".join(map(str, ROWS))),
        *("--query-rows", "2,50", "--regularization", "0.01"),
    ]


def scores(store):
    return zarr.open_group(store / "results.zarr", mode="r")["scores"][:]


def test_a_job_gives_for_names_of_the_hub_what_it_gives_for_the_same_files(from_hub, imdb, tmp_path):
    store, local = tmp_path / "hub", tmp_path / "local"
    from_hub("run", *options(HUB_MODEL, HUB_DATASET, store))
    model, reviews = tmp_path / "model", tmp_path / "reviews"
    tiny_distilbert(MODEL_SEED["main"]).save_pretrained(model)
    load_tokenizer().save_pretrained(model)
    reviews.mkdir()
    for split in ("train", "test"):
        first_of_each_class(imdb[split], 40).to_parquet(reviews / f"{split}.parquet")
    from_hub("run", *options(model, reviews, local))
    assert np.abs(scores(store)).min() > 0
    np.testing.assert_array_equal(scores(store), scores(local))
    assert attributes(store)["training"]["digest"] == attributes(local)["training"]["digest"]
    from_hub("top", "--store", store)
    top = pd.read_parquet(store / "top.parquet")
    assert set(top["training_row"]) == set(ROWS)
    scored = first_of_each_class(imdb["train"], 40)
    assert list(top["text"]) == [scored[row]["text"] for row in top["training_row"].tolist()]
