"""A job small enough for a test: a random two-block DistilBERT and made-up reviews, as folders."""

import csv
import json
import random
from pathlib import Path

import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from support.model import LABELS, load_tokenizer

WORDS = ["bad", "dull", "fine", "great", "film", "of", "the", "plot", "warm", "who", "laughs"]
TRAINING, QUERIES = 13, 3
"""Prime, so that no number of blocks or processes divides it."""


def make_model(folder: Path, seed: int = 0) -> Path:
    """The model's folder, as `save_pretrained` lays it out."""
    torch.manual_seed(seed)
    config = DistilBertConfig(
        dim=16,
        hidden_dim=24,
        n_layers=2,
        n_heads=2,
        initializer_range=0.2,
        id2label=LABELS,
        label2id={name: label for label, name in LABELS.items()},
    )
    DistilBertForSequenceClassification(config).eval().save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return folder


def make_reviews(folder: Path, training: int = TRAINING, queries: int = QUERIES) -> Path:
    """`train.csv` and `test.csv` with texts of different lengths and labels by name."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for split, number in {"train": training, "test": queries}.items():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            for _ in range(number):
                words = draw.choices(WORDS, k=draw.randint(2, 12))
                rows.writerow([" ".join(words), draw.choice(list(LABELS.values()))])
    return folder


def options(model: Path, texts: Path, store: Path, layers: str = "ffn,classifier") -> list[str]:
    """What `run` is told."""
    return [
        *("--store", str(store), "--model", str(model), "--dataset", str(texts)),
        *("--layers", layers, "--query-rows", "all", "--regularization", "0.01"),
        *("--block", "4", "--query-block", "2", "--save-seconds", "0"),
    ]


def attributes(store: Path) -> dict:
    """What a store says of itself, read without zarr."""
    return json.loads((store / "results.zarr" / "zarr.json").read_text())["attributes"]
