"""`source="hub"`: the real loading code of `transformers` and `datasets` against a stand-in hub."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from support import language
from support.imdb import ImdbDataset, load_imdb
from support.model import HUB_MODEL, load_model, load_tokenizer, packaged_encoder
from tests import load_from_hub
from tests.stand_in_hub import COMMITS, DTYPE, MODEL_SEED, running_hub, tiny_distilbert, tiny_llama


def load_from(endpoint: str, home: Path, *revisions: str) -> dict:
    """What every loader gives at each revision when `endpoint` is the hub and nothing is cached."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    command = [sys.executable, load_from_hub.__file__, *revisions]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def loaded(hub, tmp_path_factory):
    revisions = ["None", "main", "earlier", COMMITS["earlier"], "no-such-tag"]
    return load_from(hub.endpoint, tmp_path_factory.mktemp("hub"), *revisions)


@pytest.fixture(scope="module")
def out_of_reach(tmp_path_factory):
    with socket.socket() as closed:  # bound, but not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        return load_from(endpoint, tmp_path_factory.mktemp("nothing"), "main")["main"]


def test_the_hub_s_reviews_arrive_as_they_were_stored_but_the_unlabelled(loaded, imdb):
    assert loaded["main"]["reviews"].keys() == {"train", "test"}
    train, test = loaded["main"]["reviews"]["train"], loaded["main"]["reviews"]["test"]
    assert train["text"][24] == imdb["train"][24]["text"]
    assert train["label"] == test["label"] == [0] * 40 + [1] * 40


def test_the_hub_s_tokenizer_reads_as_the_packaged_one_and_its_model_has_the_same_layers(loaded, tokenizer):
    assert loaded["main"]["token_ids"] == tokenizer(load_from_hub.TEXT)["input_ids"]
    model = loaded["main"]["model"]
    assert model["class"] == "DistilBertForSequenceClassification"
    assert model["layers"] == [name for name, _ in packaged_encoder().named_modules()]


@pytest.mark.parametrize("revision", ["main", "earlier"])
def test_the_revision_asked_for_arrives_for_evaluation_in_float32_however_it_was_stored(loaded, revision):
    assert {DTYPE["main"], DTYPE["earlier"]} == {torch.float32, torch.float16}
    model = loaded[revision]["model"]
    assert (model["dtype"], model["training"]) == ("torch.float32", False)
    stored = tiny_distilbert(MODEL_SEED[revision]).to(DTYPE[revision]).float()
    assert_close(torch.tensor(model["logits"]), stored(load_from_hub.INPUT_IDS).logits)
    rows = {"main": 80, "earlier": 60}[revision]
    assert len(loaded[revision]["reviews"]["train"]["text"]) == rows


@pytest.mark.parametrize("revision", ["main", "earlier"])
def test_the_language_model_arrives_by_its_hub_name_at_the_revision_asked_for(loaded, revision, tokenizer):
    writer = loaded[revision]["writer"]
    assert (writer["class"], writer["dtype"], writer["training"]) == (
        "LlamaForCausalLM",
        "torch.float32",
        False,
    )
    stored = tiny_llama(MODEL_SEED[revision]).to(DTYPE[revision]).float()
    assert_close(torch.tensor(writer["logits"]), stored(load_from_hub.INPUT_IDS).logits)
    assert writer["token_ids"] == tokenizer(load_from_hub.TEXT)["input_ids"]


def test_every_request_that_names_a_revision_names_one_that_was_asked_for(loaded, hub):
    named = {
        match.group(1)
        for request in hub.requests
        if (match := re.search(r"/(?:resolve|revision|tree)/([^/?]+)", request))
    }
    assert named == {"main", "earlier", *COMMITS.values(), "no-such-tag"}


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("reviews", "stanfordnlp/imdb"),
        ("model", HUB_MODEL),
        ("token_ids", HUB_MODEL),
        ("writer", language.HUB_MODEL),
    ],
)
def test_what_the_hub_does_not_deliver_is_named_with_the_other_source(loaded, out_of_reach, what, name):
    for found, revision in ((loaded["no-such-tag"], "no-such-tag"), (out_of_reach, "main")):
        error = found[what]["error"]
        assert error.startswith(f"The Hugging Face hub did not deliver {name!r} at revision {revision!r} (")
        assert error.endswith('the revision, or work without the hub: source="packaged".')


def test_the_hub_has_no_snapshots():
    expected = "The hub's model has no snapshot '10-percent'. Snapshots need source=\"packaged\"."
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        load_model("hub", snapshot="10-percent")


def test_the_packaged_source_opens_no_connection(monkeypatch):
    def refused(*_):
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    reviews = load_imdb("packaged")["train"].select([24])
    input_ids, _, _ = ImdbDataset(reviews, load_tokenizer("packaged")).batch([0])
    assert packaged_encoder()(input_ids).logits.shape == (1, 2)


def test_a_branch_and_its_commit_give_the_same_and_no_revision_is_the_hub_s_main(loaded):
    assert loaded[COMMITS["earlier"]] == loaded["earlier"]
    assert loaded["None"] == loaded["main"] != loaded["earlier"]
