"""Where a job's model and texts come from: the package index, the Hugging Face hub, or the disk."""

import glob
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from support.assets import AssetDamaged, AssetMissing, sha256
from support.ekfac.layers import uncovered
from support.imdb import load_imdb
from support.job.errors import DatasetNotUsable, ModelNotUsable
from support.job.settings import PACKAGED, Subject
from support.labels import numbers_by_spelling, spelling
from support.model import (
    ModelLogitsWrapper,
    left_out,
    load_model,
    load_tokenizer,
    positions,
    require_gradients_only,
)

READERS = {".csv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}
FORMS = {
    "csv": "A csv file is UTF-8, names its columns in the first line, has a line for each text, commas "
    "between the fields and double quotes around a text with commas",
    "parquet": "A parquet file ends with what describes it, so half a file is none: write or copy it again",
    "json": "A json file is UTF-8 and holds an object for each text, one a line, all with the same fields",
    None: f"Name a file ({', '.join(READERS)}), a folder with files called train.csv or the like, all of one "
    f"kind and with the same columns, a name on the hub, or {PACKAGED!r}",
}
"""What has to be there, by the kind of a file that can't be read."""

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
    """The model in evaluation mode, gradients for the chosen layers only.

    Raises `ModelNotUsable`, and for the packaged one `AssetDamaged` and `AssetMissing`.
    """
    try:
        model, tokenizer = _model_and_tokenizer(subject.model)
        _refuse_what_does_not_fit(model, tokenizer, subject.model)
        model.config.pad_token_id = tokenizer.pad_token_id  # GPT-2 looks for the last token before it
        wrapped = ModelLogitsWrapper(model.eval(), tokenizer.pad_token_id).to(device)
        texts = tokenizer(["a", "a b c d e f g h i j k"], padding=True, return_tensors="pt").to(device)
        without = uncovered(model, {name: texts[name] for name in ("input_ids", "attention_mask")})
    except (ModelNotUsable, AssetDamaged, AssetMissing):
        raise
    except Exception as error:  # the loaders', the hub's and the models' errors share no narrower class
        raise ModelNotUsable(
            f"--model {subject.model} can't be loaded as a sequence classifier with its tokenizer, or can't "
            f"read texts ({_cause(error)}). Name a folder that holds config.json, model.safetensors and the "
            f"tokenizer's files, a name on the hub, or {PACKAGED!r}."
        ) from error
    parts = [part.strip() for part in subject.layers.split(",") if part.strip()] or subject.layers.split()
    try:
        require_gradients_only(model, parts, without)
    except ValueError as error:
        raise ModelNotUsable(f"--layers {subject.layers}: {error}") from error
    class_names = {name: number for number, name in model.config.id2label.items()}
    if len(class_names) < model.config.num_labels:
        told = f"Of the classes of --model {subject.model}, some have the same name: {', '.join(class_names)}"
        raise ModelNotUsable(f"{told}. Give each its own, in id2label of config.json.")
    config = json.loads(model.config.to_json_string(use_diff=False))
    config = {key: value for key, value in config.items() if key not in INCIDENTAL}
    longest = min(subject.max_tokens, tokenizer.model_max_length, positions(model))
    if longest <= (own := tokenizer.num_special_tokens_to_add()):
        raise ModelNotUsable(f"--max-tokens {longest}: {own} are the tokenizer's own. Use {own + 1} or more.")
    return Classifier(wrapped, tokenizer, class_names, config, longest, left_out(without, parts))


def _refuse_what_does_not_fit(model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise `ModelNotUsable` for a loss that is no softmax over classes, and a tokenizer of another model."""
    kind = model.config.problem_type or ("regression" if model.config.num_labels == 1 else None)
    if kind not in (None, "single_label_classification"):
        raise ModelNotUsable(
            f"{name!r} is a model for {kind.replace('_', ' ')}; the job knows classifiers with a softmax "
            "over two classes or more. In Python, EkfacInfluence(model, likelihood=…) takes Gaussian() for "
            "regression and Bernoulli() for multi-label models, both from support.ekfac."
        )
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids) + 1:  # made up where there was none
        raise ModelNotUsable(f"--model {name} has no tokenizer: save the model's own beside it.")
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


def _model_and_tokenizer(name: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    if name == PACKAGED:
        return load_model(), load_tokenizer()
    transformers_logging.disable_progress_bar()
    # No pickled checkpoint and no code of the folder's: either could do anything.
    how = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    how |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    model, about = AutoModelForSequenceClassification.from_pretrained(name, **how)
    if getattr(model, "_hf_peft_config_loaded", False):  # of a head that neither has, nothing would tell
        cure = "Merge it with peft's merge_and_unload(), save that with its tokenizer, and name it"
        raise ModelNotUsable(f"--model {name} is an adapter. {cure}.")
    missing = sorted({*about["missing_keys"], *(key for key, *_ in about["mismatched_keys"])})
    if missing:
        raise ModelNotUsable(
            f"--model {name} has no weights that fit {', '.join(missing[:3])}, which would be drawn at "
            f"random: {len(missing)} in all. Name a sequence classifier that was trained."
        )
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_texts(name: str, split: str, subject: Subject, class_names: dict[str, int]) -> Dataset:
    """A split with columns `text` and `label`, the model's numbers. Raises `DatasetNotUsable`."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is told here
    found, columns = _read(name, split), [subject.text_column, subject.label_column]
    if isinstance(found, dict) and split not in found:
        raise DatasetNotUsable(f"{name!r} has no split {split!r}. There are: {', '.join(found)}.")
    found = found[split] if isinstance(found, dict) else found
    if subject.text_column == subject.label_column:
        raise DatasetNotUsable(
            f"Texts and labels are both in {columns[0]!r}: see --text-column, --label-column."
        )
    there = ", ".join(found.column_names)
    for column in columns:
        if column not in found.column_names:
            cure = "Say which with --text-column and --label-column"
            cure = FORMS["csv"] if re.search(r"[;\t|]", there) else cure
            raise DatasetNotUsable(f"{name!r} has no column {column!r}. There are: {there}. {cure}.")
    if "__index_level_0__" in there and found.info.builder_name == "csv":
        raise DatasetNotUsable(f"{name!r} has more fields than names of columns. {FORMS['csv']}.")
    found = found.select_columns(columns)
    found = found.rename_columns(dict(zip(columns, ("text", "label"), strict=True)))
    numbers = _numbers(found, class_names, name)
    return found.remove_columns("label").add_column("label", numbers)


def refuse_single_split(name: str) -> None:
    """Raise `DatasetNotUsable` when all splits that one asks for would be the same rows."""
    path = Path(name)
    is_one = (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists()
    if path.is_file() or is_one:
        raise DatasetNotUsable(
            f"{name!r} has one split: its rows would be training examples and queries at once. Name the "
            "queries' file or folder with --queries, or say --query-split train if you mean that."
        )


def _read(name: str, split: str) -> Dataset | dict:
    path = Path(name)
    if name == PACKAGED:
        return load_imdb()
    all_files = sorted(file for file in (path, *path.rglob("*")) if file.is_file())
    files = {file: READERS[file.suffix.lower()] for file in all_files if file.suffix.lower() in READERS}
    if path.is_file() and not files:
        raise DatasetNotUsable(f"{path.name} is neither of {', '.join(READERS)}, which can be read.")
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return load_from_disk(name)
        # The library would know a file again by name, time and size.
        contents = "".join(f"{file} {sha256(file)}" for file in all_files).encode(errors="surrogateescape")
        cache = f"{datasets.config.HF_DATASETS_CACHE}/by-contents/{hashlib.sha256(contents).hexdigest()}"
        how = {"cache_dir": cache} if all_files else {}
        if {*files.values()} == {"csv"}:  # nothing but an empty field is a missing one: NA may be a class
            how |= {"keep_default_na": False, "na_values": [""]}
        if not path.is_file():
            found = load_dataset(name, **how)
            copies = [Path(file["filename"]) for one in found.values() for file in one.cache_files]
            if not path.exists() and any(len(copy.parent.name) < 40 for copy in copies):  # no commit
                raise ValueError("the hub can't be reached, and what is kept here was a folder of that name")
            return found
        if not path.stat().st_size:
            raise ValueError("it is empty")
        return load_dataset(files[path], data_files=glob.escape(name), split="train", **how)
    except Exception as error:  # the readers' and the hub's errors share no narrower class
        for file in files if path.is_dir() else ():  # one that can't be read alone is told by its name
            _read(str(file), split)
        raise DatasetNotUsable(
            f"{name!r} can't be read ({_cause(error)}). {FORMS[files.get(path)]}."
        ) from error


def _cause(error: BaseException) -> str:
    """What went wrong, in short: what is behind an error that only says that there is one."""
    while type(error) is DatasetGenerationError and (behind := error.__cause__ or error.__context__):
        error = behind
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None):
        raise error  # neither the file's fault nor the model's
    told = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return told if len(told) <= 300 else f"{told[:299]}…"


def _numbers(texts: Dataset, class_names: dict[str, int], name: str) -> list[int]:
    """The labels as the model's numbers; labels by name may stand in another order than the model's."""
    try:
        known = numbers_by_spelling(class_names, texts.features["label"])
    except ValueError as error:
        raise DatasetNotUsable(f"{name!r} {error}") from error
    numbers: list[int] = []
    for batch in texts.iter(batch_size=1000):
        for text, label in zip(batch["text"], batch["label"], strict=True):
            row = f"Row {len(numbers)} of {name!r}"
            if not isinstance(text, str):
                raise DatasetNotUsable(f"{row} has no text but {text!r}. Leave it out, or see --text-column.")
            if spelling(label) not in known:
                raise DatasetNotUsable(
                    f"{row} has the label {label!r}, but the model's classes are {', '.join(class_names)}. "
                    f"Use those names, or their numbers, 0 to {len(class_names) - 1}."
                )
            numbers.append(known[spelling(label)])
    return numbers
