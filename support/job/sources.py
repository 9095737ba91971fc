"""Where a job's model and texts come from: the package index, the Hugging Face hub, or the disk."""

import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, load_dataset, load_from_disk
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from support.assets import AssetChanged, AssetMissing
from support.imdb import load_imdb
from support.job.errors import BadSetting, DatasetNotUsable, ModelNotUsable
from support.job.settings import PACKAGED, Subject
from support.model import (
    AdapterDamaged,
    AdapterMismatch,
    ModelLogitsWrapper,
    load_model,
    load_tokenizer,
)

READERS = {".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}
"""The reader of `datasets` for each kind of file."""

INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
"""Entries of a model's configuration that change nothing of what it computes here."""

PACKAGE_ERRORS = (AssetMissing, AssetChanged, AdapterMismatch, AdapterDamaged)
"""What can be wrong with the packaged model and reviews; each says what to do."""


@dataclass(frozen=True)
class Classifier:
    """A model in the engine's shape, its tokenizer, what it calls its classes, and its configuration
    as far as it decides what the model computes."""

    model: ModelLogitsWrapper
    tokenizer: PreTrainedTokenizerBase
    class_names: dict[str, int]
    config: dict[str, object]


def load_classifier(subject: Subject, device: torch.device) -> Classifier:
    """The model of a job in evaluation mode on a device, gradients for the chosen layers only.

    Raises `ModelNotUsable`.
    """
    if subject.model == PACKAGED:
        try:
            model, tokenizer = load_model(), load_tokenizer()
        except PACKAGE_ERRORS as error:
            raise ModelNotUsable(str(error)) from error
    else:
        model, tokenizer = _from_name_or_folder(subject.model)
    if tokenizer.pad_token_id is None:
        raise ModelNotUsable(
            f"The tokenizer of {subject.model!r} has no padding token, so padding could not be told "
            "from text. Give it one that no text has, save both to a folder, and name that."
        )
    model.config.pad_token_id = tokenizer.pad_token_id  # GPT-2 looks for the last token before it
    _refuse_long_texts(model, tokenizer, subject)
    _choose_layers(model, subject)
    wrapped = ModelLogitsWrapper(model.eval(), tokenizer.pad_token_id).to(device)
    class_names = {name: number for number, name in model.config.id2label.items()}
    return Classifier(wrapped, tokenizer, class_names, _decisive(model.config))


def _refuse_long_texts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, subject: Subject
) -> None:
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    longest = min(positions, tokenizer.model_max_length)
    if subject.max_tokens > longest:
        raise ModelNotUsable(
            f"{subject.model!r} reads {longest} tokens at most. Use --max-tokens {longest}, or fewer."
        )


def _decisive(config: PreTrainedConfig) -> dict[str, object]:
    """A configuration without where it came from, as JSON keeps it."""
    written = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in written.items() if key not in INCIDENTAL}


def _from_name_or_folder(name: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=torch.float32,
            use_safetensors=True,  # a pickled checkpoint could run code
        )
        return model, AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the loaders' and the hub's errors share no narrower class
        raise ModelNotUsable(
            f"--model {name} can't be loaded as a sequence classifier with its tokenizer "
            f"({type(error).__name__}: {_first_line(error)}). Name a folder that holds config.json, "
            f"model.safetensors and the tokenizer's files, a name on the hub, or {PACKAGED!r}."
        ) from error


def _choose_layers(model: nn.Module, subject: Subject) -> None:
    linear = [name for name, part in model.named_modules() if _is_linear(part)]
    wanted = {part.strip() for part in subject.layers.split(",")}
    chosen = [name for name in linear if not subject.layers or wanted & set(name.split("."))]
    if not chosen:
        parts = sorted({part for name in linear for part in name.split(".") if not part.isdigit()})
        raise ModelNotUsable(
            f"--layers {subject.layers}: no linear layer of {subject.model!r} has such a part in its "
            f"name. There are: {', '.join(parts)}."
        )
    model.requires_grad_(False)
    for name in chosen:
        model.get_submodule(name).requires_grad_(True)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def load_texts(name: str, split: str, subject: Subject, class_names: dict[str, int]) -> Dataset:
    """A split with columns `text` and `label`, labels as the model's numbers.

    Raises `DatasetNotUsable`.
    """
    datasets.disable_progress_bars()
    found = _packaged() if name == PACKAGED else _read(name, split)
    if isinstance(found, dict):
        if split not in found:
            raise DatasetNotUsable(
                f"{name!r} has no split {split!r}. There are: {', '.join(found)}."
            )
        found = found[split]
    for column in (subject.text_column, subject.label_column):
        if column not in found.column_names:
            raise DatasetNotUsable(
                f"{name!r} has no column {column!r}. There are: {', '.join(found.column_names)}. "
                "Say which ones with --text-column and --label-column."
            )
    found = found.select_columns([subject.text_column, subject.label_column])
    found = found.rename_columns({subject.text_column: "text", subject.label_column: "label"})
    _refuse_missing_texts(found, name)
    return _with_numbers(found, class_names, name)


def refuse_single_split(name: str) -> None:
    """Raise `DatasetNotUsable` when all splits that one asks for would be the same rows."""
    path = Path(name)
    is_one = (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists()
    if path.is_file() or is_one:
        raise DatasetNotUsable(
            f"{name!r} has one split: its rows would be training examples and queries at once. Name the "
            "queries' file or folder with --queries, or say --query-split train if you mean that."
        )


def _packaged() -> dict:
    try:
        return load_imdb()
    except PACKAGE_ERRORS as error:
        raise DatasetNotUsable(str(error)) from error


def _refuse_missing_texts(texts: Dataset, name: str) -> None:
    row = 0
    for batch in texts.iter(batch_size=1000):
        for text in batch["text"]:
            if not isinstance(text, str):
                raise DatasetNotUsable(f"Row {row} of {name!r} has no text but {text!r}.")
            row += 1


def _read(name: str, split: str) -> Dataset | dict:
    path = Path(name)
    try:
        if path.is_file():
            if path.suffix not in READERS:
                raise DatasetNotUsable(
                    f"{path.name} is neither of {', '.join(READERS)}, which can be read."
                )
            return load_dataset(READERS[path.suffix], data_files={split: name}, split=split)
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return load_from_disk(name)
        return load_dataset(name)
    except DatasetNotUsable:
        raise
    except Exception as error:  # the readers' and the hub's errors share no narrower class
        raise DatasetNotUsable(
            f"{name!r} can't be read ({type(error).__name__}: {_first_line(error)}). Name a file "
            f"({', '.join(READERS)}), a folder with files called {split}.csv or the like, a name on "
            f"the hub, or {PACKAGED!r}."
        ) from error


def _with_numbers(texts: Dataset, class_names: dict[str, int], name: str) -> Dataset:
    kind = texts.features["label"]
    if isinstance(kind, ClassLabel) and set(kind.names) <= class_names.keys():
        # The same names may stand in another order.
        numbers = [class_names[kind.names[number]] for number in texts["label"]]
        return texts.remove_columns("label").add_column("label", numbers)
    if isinstance(kind, ClassLabel) or "int" in getattr(kind, "dtype", ""):
        _refuse_other_numbers(texts, len(class_names), name)
        return texts
    unknown = sorted({str(label) for label in texts.unique("label")} - class_names.keys())
    if unknown:
        raise DatasetNotUsable(
            f"{name!r} has the label {unknown[0]!r}, but the model's classes are "
            f"{', '.join(class_names)}. Use those names, or their numbers."
        )
    numbers = [class_names[str(label)] for label in texts["label"]]
    return texts.remove_columns("label").add_column("label", numbers)


def _refuse_other_numbers(texts: Dataset, classes: int, name: str) -> None:
    row = 0
    for batch in texts.iter(batch_size=1000):
        for label in batch["label"]:
            if label is None or not 0 <= label < classes:
                raise DatasetNotUsable(
                    f"Row {row} of {name!r} has the label {label}, but the model's classes are 0 to "
                    f"{classes - 1}."
                )
            row += 1


def chosen_rows(rows: str, available: int, seed: int, option: str) -> np.ndarray:
    """The row numbers that `rows` means, ascending, each once. Raises `BadSetting`.

    "all"; "50", a sample of so many; or, with commas, row numbers and ranges: "100:200" has all from the
    first to before the last, "3,5,100:200" and "7," name single rows.
    """
    if not available:
        raise BadSetting(f"--{option} {rows}: there are no rows.")
    if rows == "all":
        return np.arange(available)
    try:
        if "," not in rows and ":" not in rows:
            return _sample(int(rows), available, seed)
        parts = [part.partition(":") for part in rows.split(",") if part]
        ranges = [range(int(a), int(b) if colon else int(a) + 1) for a, colon, b in parts]
        inside = [part for part in ranges if part and part[0] >= 0 and part[-1] < available]
        if len(inside) < len(ranges) or not ranges:
            raise BadSetting(
                f"--{option} {rows}: choose from rows 0 to {available - 1}, at least one in each range."
            )
        return np.unique(np.concatenate([np.asarray(part) for part in inside]))
    except ValueError as error:
        raise BadSetting(
            f"--{option} {rows}: use all, a number of rows like 50 (from 1 to {available}), or rows and "
            "ranges like 3,5,100:200."
        ) from error


def _sample(number: int, available: int, seed: int) -> np.ndarray:
    if not 1 <= number <= available:
        raise ValueError(number)
    return np.sort(np.random.default_rng(seed).permutation(available)[:number])


def tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides how a tokenizer cuts a text, but for the length, which each call sets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True)
    call = {"truncation": tokenizer.truncation_side, "padding": tokenizer.pad_token_id}
    return json.dumps(json.loads(backend.to_str()) | call)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
