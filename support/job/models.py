"""What a job asks of a kind of model, and what all kinds have in common: loading, layers, tokenizers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import peft
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from support.job.errors import BadSetting, ModelNotUsable
from support.job.settings import Subject
from support.model import with_weights

INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
"""Entries of a model's configuration that change nothing of what it computes here."""

ADAPTER = "adapter_config.json"
DECIDING = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
"""Entries of an adapter's configuration that decide what its weights do."""


@dataclass(frozen=True)
class Task:
    """All in which kinds of models differ. A classifier and a model that writes are one each.

    `model` in the engine's shape, its tokenizer, its configuration as far as it decides what the model
    computes, how many tokens of a text it gets, and which layers are left out because the engine can't
    cover them, in a line to be told. Each kind has a `likelihood`, brings its models (`load`), and says what
    it reads of a data set (`texts`), which tokens that is (`examples`), and what it says of some (`said`).
    """

    subject: Subject
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: dict[str, object]
    max_tokens: int
    left_out: str

    called: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    """How the names of the classes end that transformers has for such models."""
    own_settings: ClassVar[tuple[str, ...]]
    """Those of a `Subject` that no other task knows."""
    least: ClassVar[int] = 1
    """Tokens of a text, beside the tokenizer's own, without which nothing can be asked."""

    @staticmethod
    def shaped(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        """The model in the engine's shape."""
        return model

    @staticmethod
    def layers(model: nn.Module, without: Mapping[str, str]) -> list[str]:
        """Parts of the names of the layers that get gradients unless others are asked for; the engine does
        `without` some. None are all."""
        return []


def from_folder_or_hub(name: str, load: type, kind: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """What `load`, one of transformers' automatic classes, finds under a name. Raises `ModelNotUsable`."""
    # No pickled checkpoint and no code of the folder's: either could do anything.
    how = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    how |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    model, about = load.from_pretrained(name, **how)
    if getattr(model, "_hf_peft_config_loaded", False):  # of a head that neither has, nothing would tell
        cure = "Merge it with peft's merge_and_unload(), save that with its tokenizer, and name it"
        raise ModelNotUsable(f"--model {name} is an adapter. {cure}.")
    missing = sorted({*about["missing_keys"], *(key for key, *_ in about["mismatched_keys"])})
    if missing:
        raise ModelNotUsable(
            f"--model {name} has no weights that fit {', '.join(missing[:3])}, which would be drawn at "
            f"random: {len(missing)} in all. Name a {kind} that was trained."
        )
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def adapter_config(subject: Subject) -> dict | None:
    """What the adapter in the model's folder says of itself, None when there is no adapter."""
    path = Path(subject.model) / ADAPTER
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def base_of(subject: Subject) -> str:
    """The model that an adapter was trained on, or else the model. Raises `BadSetting`, `ModelNotUsable`."""
    adapter = adapter_config(subject)
    if adapter is None and subject.base:
        told = f"--base {subject.base}: --model {subject.model} is no folder with a LoRA adapter"
        raise BadSetting(f"{told}. Leave it out, or name the adapter's folder as the model.")
    base = subject.base or (adapter["base_model_name_or_path"] if adapter else subject.model)
    if not base:
        raise ModelNotUsable(
            f"The adapter {subject.model} doesn't say which model it was trained on. Name that with --base."
        )
    return base


def adapted(model: nn.Module, subject: Subject) -> nn.Module:
    """The model with the adapter in its layers, each of whose two matrices stays a layer of its own.

    Raises `ModelNotUsable` for an adapter that is no LoRA, that has no safetensors, or whose tensors,
    of which the first is named, are not those of this model.
    """
    folder, about = Path(subject.model), adapter_config(subject)
    weights = folder / "adapter_model.safetensors"
    if about.get("peft_type") != "LORA" or not weights.is_file():
        raise ModelNotUsable(
            f"--model {folder} holds an adapter of kind {about.get('peft_type')}; the job reads LoRA, from "
            f"{weights.name}. Save one with peft's save_pretrained, or merge it and name the whole model."
        )
    config = peft.LoraConfig.from_pretrained(folder)
    config.base_model_name_or_path = None  # where it is here is no other name than peft would warn of
    try:
        return with_weights(model, config, load_file(weights)).get_base_model()
    except ValueError as error:
        told = f"The adapter {folder} does not fit {base_of(subject)!r}: {error}"
        raise ModelNotUsable(f"{told} Name its model with --base.") from error


def configuration(model: nn.Module, subject: Subject) -> dict[str, object]:
    """All that decides, beside the weights, what the model computes."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config = {key: value for key, value in config.items() if key not in INCIDENTAL}
    adapter = adapter_config(subject)
    return config | ({"adapter": {key: adapter.get(key) for key in DECIDING}} if adapter else {})


def refuse_other_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise `ModelNotUsable` where there is none, and for one of another model."""
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids) + 1:  # made up where there was none
        raise ModelNotUsable(f"--model {name} has no tokenizer: save the model's own beside it.")
    words = len(model.get_input_embeddings().weight)
    largest = max(tokenizer.get_vocab().values())
    if largest >= words:
        raise ModelNotUsable(
            f"The tokenizer of {name!r} has token {tokenizer.convert_ids_to_tokens(largest)!r}, number "
            f"{largest}, but the model knows {words} tokens. Use the model's own tokenizer, or give it room: "
            "model.resize_token_embeddings(len(tokenizer)), then save both to a folder."
        )
