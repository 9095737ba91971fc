"""Where a job's model and texts come from: the package index, the Hugging Face hub, or the disk."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from datasets import ClassLabel, Dataset, load_dataset, load_from_disk
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from support.ekfac.layers import uncovered
from support.ekfac.verification import TOLERANCE
from support.imdb import load_imdb
from support.job.errors import DatasetNotUsable, ModelNotUsable
from support.job.settings import PACKAGED, Subject
from support.model import ModelLogitsWrapper, load_model, load_tokenizer, require_gradients_only

READERS = {".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
TOKENIZER_FILES += ("tokenizer.model", "sentencepiece.bpe.model")

INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
"""Entries of a model's configuration that change nothing of what it computes here."""


@dataclass(frozen=True)
class Classifier:
    """A model in the engine's shape, its tokenizer, the numbers of its classes by their names, its
    configuration as far as it decides what the model computes, how many tokens of a text it gets, and which
    layers are left out because the engine can't cover them, in a line to be told."""

    model: ModelLogitsWrapper
    tokenizer: PreTrainedTokenizerBase
    class_names: dict[str, int]
    config: dict[str, object]
    max_tokens: int
    left_out: str


def load_classifier(subject: Subject, device: torch.device) -> Classifier:
    """The model in evaluation mode, gradients for the chosen layers only. Raises `ModelNotUsable`."""
    model, tokenizer = _model_and_tokenizer(subject.model)
    _refuse_what_does_not_fit(model, tokenizer, subject.model)
    model.config.pad_token_id = tokenizer.pad_token_id  # GPT-2 looks for the last token before it
    wrapped = ModelLogitsWrapper(model.eval(), tokenizer.pad_token_id).to(device)
    without = _not_covered(wrapped, tokenizer, subject.model, device)
    parts = [part.strip() for part in subject.layers.split(",") if part.strip()] or subject.layers.split()
    try:
        require_gradients_only(model, parts, without)
    except ValueError as error:
        raise ModelNotUsable(f"--layers {subject.layers}: {error}") from error
    asked = {name: why for name, why in without.items() if not parts or set(parts) & set(name.split("."))}
    class_names = {name: number for number, name in model.config.id2label.items()}
    config = json.loads(model.config.to_json_string(use_diff=False))
    config = {key: value for key, value in config.items() if key not in INCIDENTAL}
    longest = min(subject.max_tokens, tokenizer.model_max_length, _positions(model))
    return Classifier(wrapped, tokenizer, class_names, config, longest, _told(asked))


def _refuse_what_does_not_fit(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise `ModelNotUsable` for a loss that is no softmax over classes, and a tokenizer of another model."""
    kind = model.config.problem_type or ("regression" if model.config.num_labels == 1 else None)
    if kind not in (None, "single_label_classification"):
        raise ModelNotUsable(
            f"{name!r} is a model for {kind.replace('_', ' ')}; the job knows classifiers with a softmax "
            "over two classes or more. In Python, EkfacInfluence(model, likelihood=Gaussian()) takes "
            "regression."
        )
    if tokenizer.pad_token_id is None:
        told = f"The tokenizer of {name!r} has no padding token, so padding could not be told from text"
        raise ModelNotUsable(f"{told}. Give it one that no text has, save both to a folder, and name that.")
    words = len(model.get_input_embeddings().weight)
    largest = max(tokenizer.get_vocab().values())
    if largest >= words:
        raise ModelNotUsable(
            f"The tokenizer of {name!r} has token {tokenizer.convert_ids_to_tokens(largest)!r}, number "
            f"{largest}, but the model knows {words} tokens. Use the model's own tokenizer, or give it room: "
            "model.resize_token_embeddings(len(tokenizer)), then save both to a folder."
        )


def _not_covered(
    model: ModelLogitsWrapper, tokenizer: PreTrainedTokenizerBase, name: str, device: torch.device
) -> dict[str, str]:
    """Layers that the engine can't cover, each with the reason, as two short texts show them.

    Raises `ModelNotUsable` when the model can't read them, or reads one otherwise beside the other.
    """
    short, long = (torch.tensor(tokenizer(text)["input_ids"]) for text in ("a", "a b c d e f g h i j k"))
    ids = pad_sequence([short, long], batch_first=True, padding_value=tokenizer.pad_token_id).to(device)
    try:
        with torch.no_grad():
            beside, alone = model(ids)[0], model(ids[:1, : len(short)])[0]
        found = uncovered(model.model, {"input_ids": ids, "attention_mask": model.token_mask(ids).long()})
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model of another kind may fail in any way
        told = f"{name!r} can't read texts as token ids with an attention mask ({_first_line(error)})"
        raise ModelNotUsable(f"{told}. Name a model that reads them so.") from error
    if (beside - alone).norm() > TOLERANCE[torch.float32] * alone.norm():
        raise ModelNotUsable(
            f"{name!r} says {alone.tolist()} of a text alone and {beside.tolist()} of the same text beside a "
            "longer one: padding, or other texts, change what it says, and so would every influence. Name a "
            "model that masks padding."
        )
    return found


def _told(left_out: dict[str, str]) -> str:
    """Layers that are left out, by the reasons, with an example of each."""
    by_reason: dict[str, list[str]] = {}
    for name, why in left_out.items():
        by_reason.setdefault(why, []).append(name)
    parts = [f"{len(names)} {why} ({names[0]})" for why, names in by_reason.items()]
    return f"Linear layers that EK-FAC can't cover are left out: {', '.join(parts)}." if parts else ""


def _positions(model: nn.Module) -> int:
    """How many tokens the model reads at most; RoBERTa and its kin begin to count behind the padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            kept = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - kept
    told = getattr(model.config, "max_position_embeddings", None) or 0
    return told if told > 0 else sys.maxsize


def _model_and_tokenizer(name: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    try:
        if name == PACKAGED:
            return load_model(), load_tokenizer()
        transformers_logging.disable_progress_bar()
        folder = Path(name)
        if (folder / "config.json").exists() and not any((folder / one).exists() for one in TOKENIZER_FILES):
            raise ModelNotUsable(f"--model {name} has no tokenizer: save the model's own beside it.")
        # No pickled checkpoint and no code of the folder's: either could do anything.
        how = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        loaded = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=False, **how)
        model, missing = loaded[0], sorted(loaded[1]["missing_keys"] | loaded[1]["mismatched_keys"])
        if missing:
            raise ModelNotUsable(
                f"--model {name} has no weights for {', '.join(map(str, missing[:3]))}"
                f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}, which would be drawn at "
                "random. Name a sequence classifier that was trained."
            )
        return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ModelNotUsable:
        raise
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
            # Nothing but an empty field is a missing one: NA may be a class.
            how = {"keep_default_na": False, "na_values": [""]} if path.suffix == ".csv" else {}
            return load_dataset(READERS[path.suffix], data_files={split: name}, split=split, **how)
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
    known = _known(texts.features["label"], class_names, name)
    numbers: list[int] = []
    for batch in texts.iter(batch_size=1000):
        for text, label in zip(batch["text"], batch["label"], strict=True):
            row = f"Row {len(numbers)} of {name!r}"
            if not isinstance(text, str):
                raise DatasetNotUsable(f"{row} has no text but {text!r}.")
            if _spelling(label) not in known:
                raise DatasetNotUsable(
                    f"{row} has the label {label!r}, but the model's classes are {', '.join(class_names)}. "
                    f"Use those names, or their numbers, 0 to {len(class_names) - 1}."
                )
            numbers.append(known[_spelling(label)])
    return numbers


def _known(kind: object, class_names: dict[str, int], name: str) -> dict[str, int]:
    """The model's number for every spelling of a label."""
    by_name = {_spelling(one): number for one, number in class_names.items()}
    by_number = {str(number): number for number in class_names.values()}
    if len(by_name) < len(class_names):  # names that differ in capitals only
        by_name = dict(class_names)
    if not isinstance(kind, ClassLabel):
        return by_number | by_name if "string" in getattr(kind, "dtype", "") else by_number
    found = [by_name.get(_spelling(one)) for one in kind.names]
    if None not in found:
        return {str(number): one for number, one in enumerate(found)}
    if any(one is not None for one in found):
        raise DatasetNotUsable(
            f"{name!r} calls its classes {', '.join(kind.names)}, the model {', '.join(class_names)}: some "
            "are the same and some are not, so their numbers can't be trusted. Use the model's names."
        )
    return by_number


def _spelling(label: object) -> str:
    """One for labels that say the same: 1, 1.0, True and "1"; "Positive" and "positive"."""
    if isinstance(label, bool | float) and float(label).is_integer():
        label = int(label)
    return str(label).strip().casefold()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
