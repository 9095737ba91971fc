"""Where a job's model and texts come from: the package index, the Hugging Face hub, or the disk."""

import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from datasets import ClassLabel, Dataset, load_dataset, load_from_disk
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from support.imdb import load_imdb
from support.job.errors import DatasetNotUsable, ModelNotUsable
from support.job.settings import PACKAGED, Subject
from support.model import ModelLogitsWrapper, load_model, load_tokenizer, require_gradients_only

READERS = {".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}

INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
"""Entries of a model's configuration that change nothing of what it computes here."""


@dataclass(frozen=True)
class Classifier:
    """A model in the engine's shape, its tokenizer, the numbers of its classes by their names, and its
    configuration as far as it decides what the model computes."""

    model: ModelLogitsWrapper
    tokenizer: PreTrainedTokenizerBase
    class_names: dict[str, int]
    config: dict[str, object]


def load_classifier(subject: Subject, device: torch.device) -> Classifier:
    """The model in evaluation mode, gradients for the chosen layers only. Raises `ModelNotUsable`."""
    model, tokenizer = _model_and_tokenizer(subject.model)
    if tokenizer.pad_token_id is None:
        told = (
            f"The tokenizer of {subject.model!r} has no padding token, so padding could not be told from text"
        )
        raise ModelNotUsable(f"{told}. Give it one that no text has, save both to a folder, and name that.")
    model.config.pad_token_id = tokenizer.pad_token_id  # GPT-2 looks for the last token before it
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)
    if subject.max_tokens > longest:
        told = f"{subject.model!r} reads {longest} tokens at most"
        raise ModelNotUsable(f"{told}. Use --max-tokens {longest}, or fewer.")
    parts = [part.strip() for part in subject.layers.split(",") if part.strip()]
    try:
        require_gradients_only(model, parts)
    except ValueError as error:
        raise ModelNotUsable(f"--layers {subject.layers}: {error}") from error
    wrapped = ModelLogitsWrapper(model.eval(), tokenizer.pad_token_id).to(device)
    class_names = {name: number for number, name in model.config.id2label.items()}
    config = json.loads(model.config.to_json_string(use_diff=False))
    config = {key: value for key, value in config.items() if key not in INCIDENTAL}
    return Classifier(wrapped, tokenizer, class_names, config)


def _model_and_tokenizer(name: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    try:
        if name == PACKAGED:
            return load_model(), load_tokenizer()
        transformers_logging.disable_progress_bar()
        # Safetensors only: a pickled checkpoint could run code.
        how = {"dtype": torch.float32, "use_safetensors": True}
        model = AutoModelForSequenceClassification.from_pretrained(name, **how)
        return model, AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the loaders' and the hub's errors share no narrower class
        raise ModelNotUsable(
            f"--model {name} can't be loaded as a sequence classifier with its tokenizer "
            f"({_first_line(error)}). Name a folder that holds config.json, model.safetensors and the "
            f"tokenizer's files, a name on the hub, or {PACKAGED!r}."
        ) from error


def load_texts(name: str, split: str, subject: Subject, class_names: dict[str, int]) -> Dataset:
    """A split with columns `text` and `label`, the model's numbers. Raises `DatasetNotUsable`."""
    datasets.disable_progress_bars()
    found, columns = _read(name, split), [subject.text_column, subject.label_column]
    if isinstance(found, dict) and split not in found:
        raise DatasetNotUsable(f"{name!r} has no split {split!r}. There are: {', '.join(found)}.")
    found = found[split] if isinstance(found, dict) else found
    for column in columns:
        if column not in found.column_names:
            told = f"{name!r} has no column {column!r}. There are: {', '.join(found.column_names)}"
            raise DatasetNotUsable(f"{told}. Say which ones with --text-column and --label-column.")
    found = found.select_columns(columns)
    found = found.rename_columns(dict(zip(columns, ("text", "label"), strict=True)))
    numbers = _numbers(found, class_names, name)
    return found.remove_columns("label").add_column("label", numbers)


def refuse_single_split(name: str) -> None:
    """Raise `DatasetNotUsable` when all splits that one asks for would be the same rows."""
    path = Path(name)
    is_one = (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists()
    if path.is_file() or is_one:
        told = f"{name!r} has one split: its rows would be training examples and queries at once"
        cure = "Name the queries' file or folder with --queries, or say --query-split train if you mean that"
        raise DatasetNotUsable(f"{told}. {cure}.")


def _read(name: str, split: str) -> Dataset | dict:
    path = Path(name)
    if path.is_file() and path.suffix not in READERS:
        raise DatasetNotUsable(f"{path.name} is neither of {', '.join(READERS)}, which can be read.")
    try:
        if name == PACKAGED:
            return load_imdb()
        if path.is_file():
            return load_dataset(READERS[path.suffix], data_files={split: name}, split=split)
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return load_from_disk(name)
        return load_dataset(name)
    except Exception as error:  # the readers' and the hub's errors share no narrower class
        raise DatasetNotUsable(
            f"{name!r} can't be read ({_first_line(error)}). Name a file ({', '.join(READERS)}), a "
            f"folder with files called {split}.csv or the like, a name on the hub, or {PACKAGED!r}."
        ) from error


def _numbers(texts: Dataset, class_names: dict[str, int], name: str) -> list[int]:
    """The labels as the model's numbers; labels by name may stand in another order than the model's."""
    kind, known = texts.features["label"], class_names
    if isinstance(kind, ClassLabel) and set(kind.names) <= class_names.keys():
        known = {str(number): class_names[one] for number, one in enumerate(kind.names)}
    elif "int" in getattr(kind, "dtype", ""):
        known = {str(number): number for number in class_names.values()}
    numbers: list[int] = []
    for batch in texts.iter(batch_size=1000):
        for text, label in zip(batch["text"], batch["label"], strict=True):
            row = f"Row {len(numbers)} of {name!r}"
            if not isinstance(text, str):
                raise DatasetNotUsable(f"{row} has no text but {text!r}.")
            if str(label) not in known:
                raise DatasetNotUsable(
                    f"{row} has the label {label!r}, but the model's classes are {', '.join(class_names)}. "
                    f"Use those names, or their numbers, 0 to {len(class_names) - 1}."
                )
            numbers.append(known[str(label)])
    return numbers


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
