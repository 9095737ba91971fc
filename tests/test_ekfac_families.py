"""Gradients on the model families people have; models are tiny, random and in float64."""

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from support.ekfac import EkfacInfluence
from tests.dense import VOCABULARY, assert_same, labels, plain_gradients, sentences

CLASSES = 3


class Logits(nn.Module):
    """A Hugging Face classifier as the engine wants it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def token_mask(self, ids):
        return ids != 0

    def forward(self, ids):
        return self.model(input_ids=ids, attention_mask=self.token_mask(ids).long()).logits


SHARED = {"vocab_size": VOCABULARY, "num_labels": CLASSES, "pad_token_id": 0}


BERT = {"intermediate_size": 5, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = {
    "DistilBert": {"dim": 4, "hidden_dim": 5, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 12},
    "Bert": {"hidden_size": 4, "max_position_embeddings": 12, **BERT},
    "GPT2": {"n_embd": 4, "n_inner": 5, "n_layer": 2, "n_head": 2, "n_positions": 12},
}


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**FAMILIES[request.param], **SHARED)
    made = getattr(transformers, f"{request.param}ForSequenceClassification")(config)
    wrapped = Logits(made).double().eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    for module in wrapped.modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.requires_grad_(True)
    return wrapped


X, Y = sentences(5, 3, 4, 2), labels(4, CLASSES)


def gradient_by_autograd(model, name, row, label):
    """(d_out, d_in) with the bias as last column, whichever way the layer keeps its weight."""
    layer = model.get_submodule(name)
    loss = nn.functional.cross_entropy(model(row[None]), label[None])
    weight, *bias = torch.autograd.grad(loss, list(layer.parameters()))
    weight = weight.T if isinstance(layer, Conv1D) else weight
    return torch.cat([weight, *(b[:, None] for b in bias)], dim=1)


def test_gradients_of_every_linear_layer_are_autograds(model):
    engine = EkfacInfluence(model).fit([(X,)])
    found = plain_gradients(engine, X, Y)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    assert engine.layer_names == linear
    for name in linear:
        expected = [gradient_by_autograd(model, name, *pair) for pair in zip(X, Y, strict=True)]
        assert_same(found[name], torch.stack(expected), 1e-8)
