"""What is committed in `support/adapter`: it loads, and it does what its record says."""

import json

import pandas as pd
import pytest
from sklearn.metrics import accuracy_score
from torch.testing import assert_close

from experiments.finetuning import Recipe
from support import assets, writing
from support.imdb import ImdbDataset
from support.model import ADAPTER_FOLDER, ModelLogitsWrapper, class_probabilities, load_model


@pytest.fixture(scope="module")
def record():
    return json.loads((ADAPTER_FOLDER / "record.json").read_text())


@pytest.fixture(scope="module")
def held_out():
    return pd.read_csv(ADAPTER_FOLDER / "held_out.csv")


def test_it_was_trained_as_the_command_does_on_the_whole_train_split_of_the_packaged_files(record, imdb):
    assert record["train_reviews"] == len(imdb["train"])
    assert Recipe(**record["recipe"]) == Recipe()
    assert record["reviews_sha256"] == assets.REVIEWS.sha256
    assert record["encoder_sha256"] == assets.ENCODER_WEIGHTS.sha256
    snapshots = {name: round(share * record["steps"]) for name, share in Recipe().snapshots.items()}
    assert {name: snapshot["step"] for name, snapshot in record["snapshots"].items()} == snapshots


def test_every_adapter_loads_and_no_two_are_the_same(record):
    names = [*record["snapshots"], "final"]
    heads = [load_model(snapshot=name).classifier.weight.sum().item() for name in names]
    assert len(set(heads)) == len(heads) == 6


def test_no_committed_adapter_names_a_folder_of_the_machine_that_trained_it():
    configs = [*ADAPTER_FOLDER.glob("*/adapter_config.json"), *writing.FOLDER.glob("*/adapter_config.json")]
    assert {json.loads(config.read_text())["base_model_name_or_path"] for config in configs} == {None}
    assert len(configs) == 6 + 3


def test_the_recorded_accuracy_is_that_of_all_held_out_reviews_and_at_least_90_percent(
    record, held_out, imdb
):
    assert list(held_out["label"]) == list(imdb["test"]["label"])
    assert held_out["positive_probability"].between(0, 1).all()
    accuracy = accuracy_score(held_out["label"], held_out["positive_probability"] > 0.5)
    assert record["held_out"]["accuracy"] == accuracy >= 0.90


def test_the_predictions_are_what_the_model_says_today(held_out, imdb, tokenizer):
    rows = list(range(0, 5_000, 500))
    reviews = ImdbDataset(imdb["test"].select(rows), tokenizer)
    assert reviews.lengths() == list(held_out["tokens"][rows])
    said = class_probabilities(ModelLogitsWrapper(load_model()), reviews)[:, 1]
    recorded = said.new_tensor(held_out["positive_probability"][rows].to_numpy())
    assert_close(said, recorded, rtol=0, atol=1e-3)
