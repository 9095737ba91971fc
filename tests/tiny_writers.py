"""Tiny random models that write, with a vocabulary of seven, their texts, and gradients in a loop."""

import torch
import transformers
from torch import nn

from support.ekfac import EkfacInfluence, NextToken
from support.ekfac.batches import IGNORED

DAMPING = {"hessian_regularization": 1e-2}
VOCABULARY = 7


def llama(**settings):
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4, intermediate_size=5, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, **settings,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    parts = [f"{part}_proj" for part in ("gate", "up", "down")]
    return model, lambda name: any(part in name for part in parts)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=4, n_inner=5, n_layer=2, n_head=2, n_positions=16
    )
    return transformers.GPT2LMHeadModel(config), lambda name: ".mlp.c_" in name


def ready(build):
    """In float64, random enough for gradients to differ, its feed-forward layers tracked."""
    torch.manual_seed(0)
    model, wanted = build()
    model = model.double().eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))
    return model


def texts(*lengths, seed=0, left=False, width=None):
    """Mappings as a collator makes them, padded with the end token 0, which texts also have."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    batch = {
        name: torch.zeros(len(lengths), width, dtype=torch.int64) for name in ("input_ids", "attention_mask")
    }
    batch["labels"] = torch.full((len(lengths), width), IGNORED)
    for row, length in enumerate(lengths):
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        places = slice(width - length, width) if left else slice(length)
        batch["input_ids"][row, places], batch["attention_mask"][row, places] = ids, 1
        batch["labels"][row, places] = ids
    return batch


def parts(batch):
    return {name: part for name, part in batch.items() if name != "labels"}, batch["labels"]


def loss(model, batch, row):
    """Of one example, alone, without padding."""
    real = batch["attention_mask"][row].bool()
    ids, labels = batch["input_ids"][row][real][None], batch["labels"][row][real][None]
    logits = model(input_ids=ids).logits[0, :-1]
    return nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=IGNORED)


def gradients(model, batch):
    """By example and tracked layer, (d_out, d_in), the bias as last column."""
    found = []
    for row in range(len(batch["labels"])):
        model.zero_grad()
        loss(model, batch, row).backward()
        by_layer = {}
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if weight is None or not weight.requires_grad:
                continue
            gradient = weight.grad.T if type(module).__name__ == "Conv1D" else weight.grad
            bias = getattr(module, "bias", None)
            gradient = gradient if bias is None else torch.cat([gradient, bias.grad[:, None]], dim=1)
            by_layer[name] = gradient.clone()
        found.append(by_layer)
    model.zero_grad()
    return found


def assert_same(found, expected, tolerance=1e-6):  # Llama norms in float32, whatever its weights
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def fitted(model, batches, **settings):
    return EkfacInfluence(model, likelihood=NextToken(), **(DAMPING | settings)).fit(batches)
