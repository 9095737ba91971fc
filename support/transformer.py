"""What a model of transformers is asked by default: which of its layers, under which likelihood."""

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from support.ekfac import Bernoulli, Categorical, EachToken, Gaussian, NextToken
from support.ekfac.layers import uncovered
from support.ekfac.likelihood import Likelihood
from support.model import is_part, require_gradients_only

OF_ADAPTERS = ("lora_A", "lora_B", "modules_to_save")
"""Parts of the names of what was trained where an adapter was: its matrices, and heads beside it."""

WRITERS = ("ForCausalLM", "LMHeadModel")
"""How the names of the classes end that transformers has for models that write."""


def likelihood_of(model: nn.Module) -> Likelihood:
    """The loss that a model of transformers was trained with, as its class and configuration say. Raises
    `ValueError` for a class that says none."""
    name, config = type(model).__name__, model.config
    if name.endswith(WRITERS):
        return NextToken()
    if name.endswith("ForTokenClassification"):
        return EachToken()
    if name.endswith("ForSequenceClassification"):
        kind = config.problem_type or ("regression" if config.num_labels == 1 else "")
        return {"regression": Gaussian(), "multi_label_classification": Bernoulli()}.get(kind, Categorical())
    raise ValueError(
        f"Nothing says with which loss a {name} was trained: its name ends in neither "
        f"of ForSequenceClassification, ForTokenClassification, {', '.join(WRITERS)}. Say likelihood=…"
    )


def not_covered(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Linear layers that the engine can't cover, and why, as `uncovered` finds them when the model reads a
    few tokens. Raises what the model's forward pass raises."""
    some = list(tokenizer.get_vocab().values())[:7]  # a length that no model reads to whole windows
    ids = torch.tensor([some, some[::-1]], device=next(model.parameters()).device)
    return uncovered(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def choose_layers(model: nn.Module, parts: Sequence[str], without: Mapping[str, str]) -> str:
    """Freeze all but the layers with one of `parts` in their names; a line about those of them that the
    engine does `without`, empty if there are none.

    No parts: an adapter's matrices and what was trained beside them; of other models the feed-forward layers
    and the head, if that is not over a vocabulary; or all linear layers, where no feed-forward layer can be
    covered. Raises `ValueError` as `require_gradients_only` does.
    """
    usual = [] if parts else _usual(model, without)
    require_gradients_only(model, parts or [name for name in usual if name not in without], without)
    return left_out(without, parts or usual)


def _usual(model: nn.Module, without: Mapping[str, str]) -> list[str]:
    """Names of the layers that are asked by default; empty for all."""
    kinds = nn.Linear | Conv1D
    linear = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    adapter = [name for name in linear if any(is_part(part, name) for part in OF_ADAPTERS)]
    if adapter:
        return adapter
    head = model.get_output_embeddings()
    asked = [
        name
        for name in linear
        if linear[name] is not head and not re.search("attn|attention", name.casefold())
    ]
    in_blocks = [name for name in asked if any(part.isdigit() for part in name.split("."))]
    return asked if set(in_blocks) - without.keys() else []


def left_out(without: Mapping[str, str], parts: Sequence[str]) -> str:
    """A line about the layers among `without` that were asked for with `parts`; empty if there are none."""
    asked = {
        name: why for name, why in without.items() if not parts or any(is_part(part, name) for part in parts)
    }
    if not asked:
        return ""
    reasons = ", ".join(f"{number} {why}" for why, number in Counter(asked.values()).items())
    told = f"Linear layers that EK-FAC can't cover are left out: {reasons}"
    return f"{told}; the first is {next(iter(asked))!r}."


def positions(model: nn.Module) -> int:
    """How many tokens a model reads at most; RoBERTa and its kin begin to count behind the padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            kept = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - kept
    told = getattr(model.config, "max_position_embeddings", None) or 0
    return told if told > 0 else sys.maxsize
