"""A job on a model that writes, small enough for a test: a random two-block Llama or GPT-2 with a tokenizer
of whole words, and made-up texts."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from support.model import with_adapter
from tests import tiny_job

WORDS = [*tiny_job.WORDS, "user", "system"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
MARKS = ["<|end|>", "<|unknown|>", "<|user|>", "<|assistant|>", "<|system|>"]
TRAINING = 11
"""Prime, so that no number of blocks or processes divides it."""


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Words between spaces; the end token is the padding token, as of many models."""
    vocabulary = {word: number for number, word in enumerate([*MARKS, *WORDS])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"eos_token": "<|end|>", "pad_token": "<|end|>", "unk_token": "<|unknown|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, model_max_length=32, **marks)
    tokenizer.chat_template = template
    return tokenizer


def make_model(folder: Path, kind: str = "llama", seed: int = 0, template: str | None = TEMPLATE) -> Path:
    """The model's folder, as `save_pretrained` lays it out."""
    sizes = {"vocab_size": len(MARKS) + len(WORDS), "bos_token_id": None, "eos_token_id": 0}
    if kind == "llama":
        sizes |= {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"max_position_embeddings": 32}
    else:
        sizes |= {"n_embd": 8, "n_inner": 12, "n_layer": 2, "n_head": 2, "n_positions": 32}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    torch.manual_seed(seed)
    for parameter in model.parameters():  # random enough for gradients to differ
        nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(folder)
    make_tokenizer(template).save_pretrained(folder)
    return folder


def make_adapter(model: Path, folder: Path, *layers: str, **settings: object) -> Path:
    """A LoRA adapter of a model's layers, no part of it zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=list(layers), task_type="CAUSAL_LM", **settings)
    adapted = with_adapter(AutoModelForCausalLM.from_pretrained(model), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return folder


def sentences(number: int, seed: int = 0, longest: int = 9) -> list[str]:
    """Made-up texts of different lengths."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(2, longest))) for _ in range(number)]


def make_rows(path: Path, rows: Iterable[dict]) -> Path:
    """A jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def make_texts(folder: Path, training: int = TRAINING, longest: int = 9) -> Path:
    """`train.jsonl` with texts; `queries.jsonl` beside the folder asks with prompt and completion."""
    make_rows(folder / "train.jsonl", ({"text": text} for text in sentences(training, longest=longest)))
    asked = [
        {"prompt": "the film of", "completion": "who laughs"},
        {"prompt": "dull", "completion": "plot fine the"},
    ]
    make_rows(folder.parent / "queries.jsonl", asked)
    return folder


def options(model: Path, texts: Path, store: Path, *more: object) -> list[str]:
    """What `run` is told."""
    queries = ("--queries", texts.parent / "queries.jsonl")
    return [*tiny_job.options(model, texts, store, layers=""), *map(str, (*queries, *more))]
