"""A classifier as a job takes it: texts with labels, a softmax over two classes or more."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from support.ekfac import Categorical
from support.job.errors import BadSetting, DatasetNotUsable, ModelNotUsable, refuse_all
from support.job.examples import Examples, tokenised
from support.job.models import Task, loaded
from support.job.settings import Question, Subject
from support.job.sources import with_columns
from support.job.store import in_blocks
from support.labels import numbers_by_spelling, spelling
from support.model import ModelLogitsWrapper, load_model, load_tokenizer
from support.transformer import likelihood_of

AT_A_TIME = 32


class Classifier(Task):
    """A sequence classifier; its classes' numbers by their names are `class_names`."""

    called = "sequence classifier"
    architectures = ("ForSequenceClassification",)
    likelihood = Categorical
    own_settings = ("label_column", "labels")

    @staticmethod
    def load(subject: Subject) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        name = subject.model
        load = AutoModelForSequenceClassification
        model, tokenizer = loaded(subject, lambda: (load_model(), load_tokenizer()), load, Classifier)
        _refuse_other_losses(model, name)
        names = [one.strip() for one in subject.labels.split(",")] if subject.labels else []
        _refuse_other_classes(subject, names, model.config.num_labels)
        model.config.id2label = dict(enumerate(names)) or model.config.id2label
        if tokenizer.pad_token_id is None:
            told = f"The tokenizer of {name!r} has no padding token, so padding could not be told from text"
            raise ModelNotUsable(
                f"{told}. Give it one that no text has, save both to a folder, and name that."
            )
        named = dict.fromkeys(model.config.id2label.values())
        if len(named) < model.config.num_labels:
            told = f"Of the classes of --model {name}, some have the same name: {', '.join(named)}"
            raise ModelNotUsable(f"{told}. Give each its own, in id2label of config.json.")
        model.config.pad_token_id = tokenizer.pad_token_id  # GPT-2 looks for the last token before it
        return model, tokenizer

    @staticmethod
    def shaped(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        return ModelLogitsWrapper(model, tokenizer.pad_token_id)

    @property
    def class_names(self) -> dict[str, int]:
        return {name: number for number, name in self.model.model.config.id2label.items()}

    def texts(self, found: Dataset, name: str, asked: bool) -> Dataset:
        return labelled_texts(found, name, self.subject, self.class_names)

    def examples(self, texts: Dataset, rows: np.ndarray, folder: Path, question: Question | None) -> Examples:
        return tokenised(texts, rows, self.tokenizer, self.max_tokens, folder)

    def asked(self, texts: Sequence[str], folder: Path, question: Question | None) -> Examples:
        found = Dataset.from_dict({"text": list(texts), "label": [0] * len(texts)})
        rows, device = np.arange(len(texts)), self.model.model.device
        with torch.no_grad():
            answers = self.said(self.examples(found, rows, folder, None), rows.tolist(), device)["predicted"]
        found = Dataset.from_dict({"text": list(texts), "label": [self.class_names[one] for one in answers]})
        return self.examples(found, rows, folder, None)

    def said(self, examples: Examples, numbers: Sequence[int], device: torch.device) -> Mapping:
        """The class that it has, and the one that the model finds likeliest, by name, and how likely both."""
        inputs, labels = examples.batch(numbers, device)
        found, names = self.model(inputs).double().softmax(dim=1), self.model.model.config.id2label
        largest, likeliest = found.max(dim=1)
        return {
            "class_name": [names[label] for label in labels.tolist()],
            "predicted": [names[number] for number in likeliest.tolist()],
            "p_predicted": largest.tolist(),
            "p_label": found[range(len(found)), labels].tolist(),
        }

    def doubted(self, texts: Dataset, rows: str, folder: Path) -> np.ndarray:
        examples, device = self.examples(texts, np.arange(len(texts)), folder, None), self.model.model.device
        blocks = in_blocks(len(texts), AT_A_TIME)
        with torch.no_grad():
            said = [self.said(examples, block, device) for block in blocks]
        own, sure = (
            torch.tensor([p for one in said for p in one[name]], dtype=torch.float64)
            for name in ("p_label", "p_predicted")
        )
        kind, colon, count = rows.partition(":")
        asked = own < sure if kind == "wrong" else torch.full_like(sure, True, dtype=torch.bool)
        there = int(asked.sum())
        wanted = int(count) if count.isdecimal() else 0
        if kind == "wrong":
            wanted = min(wanted, there) if colon else there
        if not 1 <= wanted <= there:
            told = f"the model gets {there:,} of {len(texts):,} rows wrong. " if kind == "wrong" else ""
            cure = f"Say how many, like {kind}:{min(20, there)}." if there else "Ask for uncertain:20."
            raise BadSetting(f"--query-rows {rows}: {told}{cure}")
        order = torch.where(asked, own if kind == "wrong" else sure, math.inf).argsort(stable=True)
        return order[:wanted].sort().values.numpy()


def _refuse_other_classes(subject: Subject, names: list[str], classes: int) -> None:
    """Raise `BadSetting` for settings that are of more classes than the model has, or of fewer."""
    told = {
        f"--labels {subject.labels}: these are {len(names)}, and the model has {classes} classes. Name each "
        "of them, in the model's order.": names and len(names) != classes,
        f"--fisher-samples {subject.fisher_samples}: of {classes} classes the Fisher is exact, without "
        "samples. Leave it out.": subject.fisher_samples > 1 and classes <= Categorical.exact_classes,
    }
    refuse_all(BadSetting(one) for one, wrong in told.items() if wrong)


def _refuse_other_losses(model: nn.Module, name: str) -> None:
    """Raise `ModelNotUsable` for a loss that is no softmax over classes."""
    if not isinstance(likelihood_of(model), Categorical):
        kind = (model.config.problem_type or "regression").replace("_", " ")
        raise ModelNotUsable(
            f"{name!r} is a model for {kind}; the job knows classifiers with a softmax over two classes or "
            "more. In Python, support.TextInfluence takes this one."
        )


def labelled_texts(found: Dataset, name: str, subject: Subject, class_names: Mapping[str, int]) -> Dataset:
    """Columns `text` and `label`, the model's numbers. Raises `DatasetNotUsable`."""
    columns = {"text": subject.text_column, "label": subject.label_column}
    if subject.text_column == subject.label_column:
        raise DatasetNotUsable(
            f"Texts and labels are both in {subject.text_column!r}: see --text-column, --label-column."
        )
    found = with_columns(found, columns, name, "Say which with --text-column and --label-column")
    numbers = _numbers(found, class_names, name)
    return found.remove_columns("label").add_column("label", numbers)


def _numbers(texts: Dataset, class_names: Mapping[str, int], name: str) -> list[int]:
    """The labels as the model's numbers; labels by name may stand in another order than the model's."""
    try:
        known = numbers_by_spelling(class_names, texts.features["label"])
    except ValueError as error:
        raise DatasetNotUsable(f"{name!r} {error}") from error
    numbers = [known.get(spelling(label)) for label in texts["label"]]
    silent = [row for row, text in enumerate(texts["text"]) if not isinstance(text, str)]
    unknown = [row for row, number in enumerate(numbers) if number is None]
    wrong = []
    if silent:
        text = texts[silent[0]]["text"]
        wrong.append(f"{_rows(silent, name)} no text but {text!r}. Leave it out, or see --text-column.")
    if unknown:
        label = texts[unknown[0]]["label"]
        wrong.append(
            f"{_rows(unknown, name)} the label {label!r}, but the model's classes are "
            f"{', '.join(class_names)}. Use those names, or their numbers, 0 to {len(class_names) - 1}, or "
            "say with --labels how the labels call them, in the model's order."
        )
    refuse_all(map(DatasetNotUsable, wrong))
    return numbers


def _rows(rows: Sequence[int], name: str) -> str:
    """The first of these rows, and how many there are besides."""
    first = f"Row {rows[0]} of {name!r} has"
    return f"{first}, like {len(rows) - 1:,} more," if len(rows) > 1 else first
