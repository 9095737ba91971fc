"""What `source="hub"` gives, as JSON on standard output: `python tests/load_from_hub.py [REVISION...]`.

A process of its own, because the hub's address is read from `HF_ENDPOINT` when the hub's client is
imported. `None` on the command line is no revision at all. What fails is given as its error.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from support.assets import HubUnreachable
from support.imdb import load_imdb
from support.language import load_language_model
from support.model import load_model, load_tokenizer

TEXT = "Not the worst film of Brad Sykes."
INPUT_IDS = torch.tensor([[101, 2025, 1996, 5409, 2143, 102]])


def reviews(revision: str | None) -> dict:
    return {split: rows.to_dict() for split, rows in load_imdb("hub", revision).items()}


def model(revision: str | None) -> dict:
    return about(load_model("hub", revision))


def writer(revision: str | None) -> dict:
    loaded, tokenizer = load_language_model("hub", revision)
    return about(loaded) | {"token_ids": tokenizer(TEXT)["input_ids"]}


def about(loaded: PreTrainedModel) -> dict:
    return {
        "class": type(loaded).__name__,
        "layers": [name for name, _ in loaded.named_modules()],
        "dtype": str(loaded.dtype),
        "training": loaded.training,
        "logits": loaded(INPUT_IDS).logits.tolist(),
    }


def token_ids(revision: str | None) -> list[int]:
    return load_tokenizer("hub", revision)(TEXT)["input_ids"]


def outcome(load: Callable, revision: str | None):
    try:
        return load(revision)
    except HubUnreachable as error:
        return {"error": str(error)}


if __name__ == "__main__":
    time.sleep = lambda seconds: None  # the hub's client waits 23 seconds between its six tries
    loaders = {"reviews": reviews, "model": model, "writer": writer, "token_ids": token_ids}
    found = {
        asked: {name: outcome(load, None if asked == "None" else asked) for name, load in loaders.items()}
        for asked in sys.argv[1:]
    }
    print(json.dumps(found))
