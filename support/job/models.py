"""What a job asks of a kind of model, and what all kinds have in common: loading, layers, tokenizers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import peft
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from support.job.errors import BadSetting, ModelNotUsable
from support.job.examples import Examples
from support.job.settings import PACKAGED, Question, Subject
from support.model import with_weights

INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
"""Entries of a model's configuration that change nothing of what it computes here."""

DOUBTS = ("wrong", "uncertain")
"""Rows that only the model can choose."""

ADAPTER = "adapter_config.json"
DECIDING = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
"""Entries of an adapter's configuration that decide what its weights do."""


@dataclass(frozen=True)
class Task:
    """All in which kinds of models differ. A classifier and a model that writes are one each.

    `model` in the engine's shape, its tokenizer, its configuration as far as it decides what the model
    computes, how many tokens of a text it gets, and what is to be `told`: which layers are left out because
    the engine can't cover them, and where texts are cut though not asked to be. Each kind has a class of
    `likelihood`, brings its models (`load`), and says what it reads of a data set (`texts`), which tokens
    that is (`examples`), and what it says of some (`said`).
    """

    subject: Subject
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: dict[str, object]
    max_tokens: int
    told: str

    called: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    """How the names of the classes end that transformers has for such models."""
    own_settings: ClassVar[tuple[str, ...]]
    """Those of a `Subject` that no other task knows."""
    least: ClassVar[int] = 1
    """Tokens of a text, beside the tokenizer's own, without which nothing can be asked."""

    def asked(self, texts: Sequence[str], folder: Path, question: Question) -> Examples:
        """Texts that someone types, as examples that ask for what the model answers."""
        raise NotImplementedError

    def doubted(self, texts: Dataset, rows: str, folder: Path) -> np.ndarray:
        """Rows whose labels the model gets wrong, or of which it is least sure. Raises `BadSetting` where it
        has no classes, and when there aren't so many."""
        raise BadSetting(f"--query-rows {rows}: a {self.called} knows no classes. Use numbers of rows.")

    @staticmethod
    def shaped(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        """The model in the engine's shape."""
        return model


def loaded(
    subject: Subject, packaged: Callable, load: type, kind: type[Task]
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model with its tokenizer: the `packaged` ones, or what `load`, one of transformers' automatic
    classes, finds; an adapter stays one in the model it belongs to, and may bring a head, of as many classes
    as it has. Raises `BadSetting` and `ModelNotUsable`."""
    name, adapter = base_of(subject), adapter_config(subject)
    own = adapter_weights(subject) if adapter else {}
    if name == PACKAGED:
        model, tokenizer = packaged()
    else:
        # No pickled checkpoint and no code of the folder's: either could do anything.
        how = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
        how |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        heads = [len(tensor) for key, tensor in own.items() if "lora_" not in key and tensor.ndim == 2]
        if heads and hasattr(kind, "class_names"):
            how["num_labels"] = min(heads)
        model, about = load.from_pretrained(name, **how)
        if getattr(model, "_hf_peft_config_loaded", False):  # of a head that neither has, nothing would tell
            cure = "Download it, and name its folder, and its model with --base"
            raise ModelNotUsable(f"--model {name} is an adapter that is not in a folder. {cure}.")
        missing = {*about["missing_keys"], *(key for key, *_ in about["mismatched_keys"])}
        missing = sorted(key for key in missing if f"base_model.model.{key}" not in own)
        if missing:
            raise ModelNotUsable(
                f"--model {name} has no weights that fit {', '.join(missing[:3])}, which would be drawn at "
                f"random: {len(missing)} in all. Name a {kind.called} that was trained."
            )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if adapter and (Path(subject.model) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(subject.model, trust_remote_code=False)
    return adapted(model, subject, own) if adapter else model, tokenizer


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


def adapter_weights(subject: Subject) -> dict[str, Tensor]:
    """All of an adapter's. Raises `ModelNotUsable` for one that is no LoRA, or that has no safetensors."""
    folder, about = Path(subject.model), adapter_config(subject)
    weights = folder / "adapter_model.safetensors"
    if about.get("peft_type") != "LORA" or not weights.is_file():
        raise ModelNotUsable(
            f"--model {folder} holds an adapter of kind {about.get('peft_type')}; the job reads LoRA, from "
            f"{weights.name}. Save one with peft's save_pretrained, or merge it and name the whole model."
        )
    return load_file(weights)


def adapted(model: nn.Module, subject: Subject, own: Mapping[str, Tensor]) -> nn.Module:
    """The model with the adapter in its layers, each of whose two matrices stays a layer of its own.

    Raises `ModelNotUsable` for weights of its `own`, of which the first is named, that are not of this model.
    """
    folder = Path(subject.model)
    config = peft.LoraConfig.from_pretrained(folder)
    config.base_model_name_or_path = None  # where it is here is no other name than peft would warn of
    try:
        return with_weights(model, config, own).get_base_model()
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
