"""Rows of a data set as the engine takes them: texts cut into tokens, labels as the model's numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from support.ekfac import Categorical, EachToken, NextToken
from support.ekfac.likelihood import Likelihood
from support.labels import numbers_by_spelling, spelling
from support.language import Batch, encoded, padded


class RowsNotUsable(ValueError):
    """Texts or labels of a data set are none that the model could be asked about."""


@dataclass(frozen=True)
class Reader:
    """How the rows of a data set become batches: mappings of tensors, with `labels`.

    `texts` are the columns that the tokenizer reads, one or a pair; for a model that writes, a prompt and its
    completion, which alone is asked. `labels` is a column, or several with a number each; where they are
    missing, `labels`, as `Trainer` has it. Rows with `input_ids` are taken as they are; of a model that puts
    tokens into classes all are such.
    """

    tokenizer: PreTrainedTokenizerBase
    likelihood: Likelihood
    class_names: Mapping[str, int]
    texts: Sequence[str]
    labels: Sequence[str]
    max_tokens: int

    def loader(self, data: Dataset, at_a_time: int = 64) -> DataLoader:
        """All rows in order. Raises `RowsNotUsable` with all that is wrong with them."""
        data, there = data.with_format(None), data.column_names
        texts = () if "input_ids" in there else self.texts
        labels = self.labels if {*self.labels} <= {*there} or "labels" not in there else ("labels",)
        if self._by_token:
            labels = ()
        needed = ("input_ids", "labels") if isinstance(self.likelihood, EachToken) else (*texts, *labels)
        missing = [repr(column) for column in needed if column not in there]
        if missing:
            raise RowsNotUsable(
                f"The data set has no column {', '.join(missing)}. There are: {', '.join(there)}. Say which "
                "hold texts and labels with text=… and label=…."
            )
        wrong, answers = [], []
        for column in texts:
            read = [text if isinstance(text, str) and text else None for text in data[column]]
            wrong.append(_told(read, data[column], f"no text in {column!r}"))
        if labels:
            given = list(zip(*(data[column] for column in labels), strict=True))
            answers = self._numbers(given, data.features[labels[0]])
            classes = ", ".join(self.class_names) if isinstance(self.likelihood, Categorical) else "numbers"
            wrong.append(_told(answers, given, f"a label that is none of {classes}"))
        if any(wrong):
            raise RowsNotUsable(" ".join(filter(None, wrong)))
        return DataLoader(range(len(data)), at_a_time, collate_fn=partial(self._batch, data, answers))

    @property
    def _by_token(self) -> bool:
        return isinstance(self.likelihood, NextToken)

    def _numbers(self, given: list[tuple], kind: object) -> list:
        """The labels of each row as the likelihood takes them, None for what are none."""
        if isinstance(self.likelihood, Categorical):
            try:
                known = numbers_by_spelling(self.class_names, kind)
            except ValueError as error:
                raise RowsNotUsable(f"The data set {error}") from error
            return [known.get(spelling(label)) for (label,) in given]
        rows = [row[0] if isinstance(row[0], list) else row for row in given]
        finite = [all(isinstance(one, int | float) and math.isfinite(one) for one in row) for row in rows]
        return [list(map(float, row)) if right else None for row, right in zip(rows, finite, strict=True)]

    def _batch(self, data: Dataset, answers: list, rows: list[int]) -> Batch:
        batch = padded([self._sequence(data[row]) for row in rows], self.tokenizer.pad_token_id or 0)
        return batch | ({"labels": torch.tensor([answers[row] for row in rows])} if answers else {})

    def _sequence(self, row: Mapping) -> Batch:
        """One row as `(1, tokens)`, with labels if tokens have them."""
        texts = [row.get(column) for column in self.texts]
        if "input_ids" not in row and self._by_token:
            return encoded(self.tokenizer, *texts, max_tokens=self.max_tokens)
        cut = {"truncation": True, "max_length": self.max_tokens}
        tokens = row if "input_ids" in row else self.tokenizer(*texts, **cut)
        names = (*self.tokenizer.model_input_names, *(["labels"] if self._by_token else []))
        sequence = {name: torch.tensor([tokens[name]]) for name in names if name in tokens}
        sequence.setdefault("attention_mask", torch.ones_like(sequence["input_ids"]))
        if self._by_token:
            sequence.setdefault("labels", sequence["input_ids"])
        return sequence


def _told(read: Sequence, given: Sequence, what: str) -> str:
    """A sentence about rows that could not be read; empty if there are none."""
    rows = [row for row, one in enumerate(read) if one is None]
    told = f"{len(rows)} of {len(read)} rows have {what}"
    return f"{told}; the first is row {rows[0]}, with {given[rows[0]]!r}." if rows else ""
