"""A model of transformers with its tokenizer and data as people have them: the same influences, with names."""

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict
from peft import LoraConfig
from torch.utils.data import DataLoader

from support import TextInfluence
from support.ekfac import Bernoulli, Categorical, EachToken, EkfacInfluence, Gaussian, NextToken
from support.model import ModelLogitsWrapper, with_adapter
from support.rows import RowsNotUsable
from tests.tiny_language import WORDS, make_tokenizer, sentences

SIZES = {"dim": 8, "hidden_dim": 12, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
NAMES = {0: "bad", 1: "so-so", 2: "good"}
TEXTS = sentences(8)
LABELS = [2, 0, 1, 1, 2, 0, 0, 1]
TOKENIZER = make_tokenizer()


def tiny(kind="DistilBertForSequenceClassification", seed=0, **settings):
    """A random model, random enough for gradients to differ."""
    torch.manual_seed(seed)
    config = transformers.DistilBertConfig(vocab_size=len(TOKENIZER), **SIZES, **settings)
    model = getattr(transformers, kind)(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def classifier(**settings):
    return tiny(id2label=NAMES, label2id={name: number for number, name in NAMES.items()}, **settings)


def data(**columns):
    return Dataset.from_dict({"text": TEXTS, "label": LABELS} | columns)


def asked(model=None, **settings):
    return TextInfluence(model or classifier(), TOKENIZER, **({"hessian_regularization": 0.1} | settings))


def tokenised(rows):
    return rows.map(lambda row: TOKENIZER(row["text"]))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_influences_of_a_data_set_are_the_engine_s_of_its_batches():
    influence, model = asked(), ModelLogitsWrapper(classifier(), TOKENIZER.pad_token_id)
    for name in influence.layer_names:
        model.get_submodule(f"model.{name}")
    scores = influence.fit(data()).score(data().select(range(2)), data())
    print(influence.layer_names, scores)
    print(influence.top(data().select(range(2)), data()).to_string())
