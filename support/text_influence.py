"""`TextInfluence`: the engine on a model of transformers and rows of texts, its answers with their names."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import compress

import pandas as pd
import torch
from datasets import Dataset, DatasetDict
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from support.ekfac import Bernoulli, Categorical, EachToken, EkfacInfluence, Gaussian, NextToken
from support.ekfac.batches import Inputs, labelled
from support.ekfac.blocks import Block, loader_blocks
from support.ekfac.likelihood import Likelihood
from support.labels import numbers_by_spelling, spelling
from support.language import Batch, encoded, padded
from support.transformer import choose_layers, likelihood_of, not_covered, positions

Rows = Dataset | pd.DataFrame
Data = Rows | Iterable
"""Rows of texts and labels, or tokenised; or batches as the engine takes them, or one of them."""

EFFECTS = {"helps": 1, "harms": -1}


class RowsNotUsable(ValueError):
    """Texts or labels of a data set are none that the model could be asked about."""


class TextInfluence(EkfacInfluence):
    """Influence functions for a model of transformers: a classifier of texts or tokens, a regression, or a
    model that writes.

    Puts the model, which may have an adapter of peft, into evaluation mode and freezes all but `layers`,
    parts of names, or those of `choose_layers`; `left_out` tells of some that can't be covered. The loss is
    that of `likelihood_of`, `settings` and what is raised those of `Engine`; `ValueError` tells of layers
    that there are not.

    `fit`, `score`, `plan` and `influences` take data sets of `datasets`, frames, a DataLoader, or batches;
    what else the engine has takes rows as `batch` gives them. `text` and `label` name columns. Two of texts
    are a pair; for a model that writes, a prompt and its completion, which alone is asked. Several of labels
    hold a number each; `labels`, as `Trainer` has it, stands in. Rows with `input_ids` are taken as they are:
    all must be such for a model that puts tokens into classes. Texts are cut at `max_tokens`. `name` is a
    column by which answers name examples, instead of by their row. All raise `RowsNotUsable`.

    Load what was saved by `TextInfluence.load(path, model, tokenizer=tokenizer)`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        layers: str | Sequence[str] = (),
        text: str | Sequence[str] = "text",
        label: str | Sequence[str] = "label",
        name: str | None = None,
        max_tokens: int = 512,
        likelihood: Likelihood | None = None,
        **settings,
    ):
        if isinstance(model, PeftModel):
            if model.active_peft_config.is_prompt_learning:
                raise ValueError("The adapter adds words before a text, and no layers that could be asked.")
            model = model.get_base_model()
        likelihood = likelihood or likelihood_of(model)
        layers, self.text, self.label = (
            [one] if isinstance(one, str) else list(one) for one in (layers, text, label)
        )
        if tokenizer.pad_token_id is not None:
            model.config.pad_token_id = tokenizer.pad_token_id  # GPT-2 looks for the last token before it
        model.config.use_cache = False
        self.left_out = choose_layers(model.eval(), layers, not_covered(model, tokenizer))
        super().__init__(model, likelihood=likelihood, **settings)
        self.tokenizer, self.name = tokenizer, name
        self.max_tokens = min(max_tokens, tokenizer.model_max_length, positions(model))
        self.class_names = [name for _, name in sorted(model.config.id2label.items())]
        self._by_token = isinstance(likelihood, NextToken)

    def batches(self, data: Data, at_a_time: int = 64) -> Iterable:
        """All examples in order, as the engine takes them."""
        data = _rows(data)
        if not isinstance(data, Dataset):
            return [data] if isinstance(data, Mapping) else data
        labels = self._labels(data)
        return DataLoader(range(len(data)), at_a_time, collate_fn=partial(self._batch, data, labels))

    def batch(self, data: Rows) -> tuple[Inputs, Tensor]:
        """All rows as one batch, apart: `influence.self_influences(*influence.batch(data))`."""
        return next(labelled(self.batches(data, len(data))))

    def influences(
        self, queries: Data, training: Data | None = None, x: Inputs | None = None, y: Tensor | None = None
    ) -> Float[Tensor, "queries training"]:
        """`score` of queries and training examples, or of queries on each other; or, given tensors of inputs
        and labels, `EkfacInfluence.influences`."""
        if isinstance(training, Tensor):
            return super().influences(queries, training, x, y)
        return self.score(queries, queries if training is None else training)

    def score_frame(self, queries: Data, training: Data, normalisation: str = "plain") -> pd.DataFrame:
        """`score`, a row for each query and a column for each training example, by their names."""
        scores = self.score(queries, training, normalisation)
        names = self._names(queries, scores.shape[0]), self._names(training, scores.shape[1])
        return pd.DataFrame(scores.numpy(force=True), *names)

    def top(
        self,
        queries: Data,
        training: Data,
        count: int = 5,
        normalisation: str = "plain",
        scores: Float[Tensor, "queries training"] | None = None,
    ) -> pd.DataFrame:
        """The `count` training examples that help each query most and those that harm it most, or as many
        as do: `query`, `effect`, `score`, `training`, both by their names, and what is `described` of it.

        `scores` are what `score` gave before, if it did. Raises `ValueError` when they are of other examples.
        """
        scores = self.score(queries, training, normalisation) if scores is None else scores
        names, found = self._names(training, scores.shape[1]), []
        for query, row in zip(self._names(queries, len(scores)), scores, strict=True):
            for effect, sign in EFFECTS.items():
                sizes, rows = (sign * row).topk(min(count, len(row)))
                strong = {"score": (sign * sizes[sizes > 0]).tolist(), "row": rows[sizes > 0].tolist()}
                found.append(pd.DataFrame({"query": query, "effect": effect} | strong))
        strongest = pd.concat(found, ignore_index=True)
        rows, training = sorted({*strongest["row"]}), _rows(training)
        is_set = isinstance(training, Dataset)
        about = self.described(training.select(rows)) if is_set else self.described(training).iloc[rows]
        about.index, strongest["training"] = rows, names[strongest["row"]]
        return strongest.join(about, on="row").drop(columns="row")

    def described(self, data: Data) -> pd.DataFrame:
        """Of each example, by its name: `label`, what is `predicted`, and the `probability` of that, where
        there is one, the `loss`, and a data set's own columns; of tokens alone the text as it is decoded."""
        data = _rows(data)
        own = data.to_pandas() if isinstance(data, Dataset) else pd.DataFrame()
        blocks = loader_blocks(labelled(self.batches(data)), *self.passes.together)
        said = pd.concat([self._said(block.ordinary(self.passes.device)) for block in blocks]).sort_index()
        said = said.drop(columns="text") if {*self.text} <= {*own} else said
        hidden = {*own} & {*said, *self.tokenizer.model_input_names, self.name}
        return said.join(own.drop(columns=[*hidden])).set_index(self._names(data, len(said)))

    @torch.inference_mode()
    def _said(self, block: Block) -> pd.DataFrame:
        """What the model says of a block's examples, by row."""
        outputs, mask = self.passes.outputs(block.inputs).float(), self.passes.token_mask(block.inputs)
        labels = self.likelihood.asked(block.labels, mask)
        self.likelihood.check(outputs, labels)
        said, names = {}, self.class_names
        if isinstance(self.likelihood, Categorical):
            probability, predicted = outputs.softmax(dim=1).max(dim=1)
            classes = {"label": labels, "predicted": predicted}
            said = {column: [names[one] for one in of.tolist()] for column, of in classes.items()}
            said["probability"] = probability.tolist()
        elif isinstance(self.likelihood, Bernoulli):
            yes = {"label": labels > 0.5, "predicted": outputs > 0}
            said = {column: [", ".join(compress(names, row)) for row in of] for column, of in yes.items()}
        elif isinstance(self.likelihood, Gaussian):
            said = {"label": labels.squeeze(1).tolist(), "predicted": outputs.squeeze(1).tolist()}
        said["loss"] = self.likelihood.loss(outputs, labels).tolist()
        ids = [one[real].tolist() for one, real in zip(block.inputs["input_ids"], mask, strict=True)]
        said["text"] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return pd.DataFrame(said, index=block.rows)

    def _names(self, data: Data, size: int) -> pd.Index:
        """Of examples that there are so many of. Raises `ValueError` when there are not."""
        data = _rows(data)
        if isinstance(data, Dataset) and len(data) != size:
            raise ValueError(f"The scores are of {size} examples, but the data set has {len(data)}.")
        named = isinstance(data, Dataset) and self.name in data.column_names
        return pd.Index(data[self.name][:] if named else range(size))

    def _labels(self, data: Dataset) -> list:
        """Of each row as the likelihood has it; none where tokens have them. Raises `RowsNotUsable`, with all
        that is wrong."""
        there = data.column_names
        texts = [] if "input_ids" in there else self.text
        labels = self.label if {*self.label} <= {*there} or "labels" not in there else ["labels"]
        labels = [] if self._by_token else labels
        needed = ["input_ids", "labels"] if isinstance(self.likelihood, EachToken) else texts + labels
        missing = [repr(column) for column in needed if column not in there]
        if missing:
            told = f"The data set has no column {', '.join(missing)}. There are: {', '.join(there)}"
            raise RowsNotUsable(f"{told}. Say which hold texts and labels with text=… and label=….")
        readers = {column: (_text, f"no text in {column!r}") for column in texts}
        readers |= {column: self._number(data.features[column]) for column in labels}
        found, wrong = {}, []
        for column, (read, what) in readers.items():
            found[column] = [read(one) for one in data[column]]
            rows = [row for row, one in enumerate(found[column]) if one is None]
            if rows:
                told = f"{len(rows)} of {len(data)} rows have {what}; the first is row {rows[0]}, with"
                wrong.append(f"{told} {data[column][rows[0]]!r}.")
        if wrong:
            raise RowsNotUsable(" ".join(wrong))
        numbers = [found[column] for column in labels]
        return numbers[0] if len(numbers) == 1 else list(zip(*numbers, strict=True))

    def _number(self, kind: object) -> tuple[Callable[[object], object], str]:
        """What reads labels of this kind, None where there is none; and what there is then."""
        if not isinstance(self.likelihood, Categorical):
            return _finite, "a label that is no number"
        names = {name: number for number, name in enumerate(self.class_names)}
        try:
            known = numbers_by_spelling(names, kind)
        except ValueError as error:
            raise RowsNotUsable(f"The data set {error}") from error
        return lambda label: known.get(spelling(label)), f"a label that is none of {', '.join(names)}"

    def _batch(self, data: Dataset, labels: list, rows: list[int]) -> Batch:
        batch = padded([self._sequence(data[row]) for row in rows], self.tokenizer.pad_token_id or 0)
        kind = torch.int64 if isinstance(self.likelihood, Categorical) else torch.float32
        return batch | ({"labels": torch.tensor([labels[row] for row in rows], dtype=kind)} if labels else {})

    def _sequence(self, row: Mapping) -> Batch:
        """One row as `(1, tokens)`, with labels if tokens have them."""
        texts = [row.get(column) for column in self.text]
        if "input_ids" not in row and self._by_token:
            return encoded(self.tokenizer, *texts, max_tokens=self.max_tokens)
        cut = {"truncation": True, "max_length": self.max_tokens}
        tokens = row if "input_ids" in row else self.tokenizer(*texts, **cut)
        names = [*self.tokenizer.model_input_names, *(["labels"] if self._by_token else [])]
        sequence = {name: torch.tensor([tokens[name]]) for name in names if name in tokens}
        sequence.setdefault("attention_mask", torch.ones_like(sequence["input_ids"]))
        return ({"labels": sequence["input_ids"]} if self._by_token else {}) | sequence


def _rows(data: Data) -> Data:
    """Rows as a data set, slices of one included; batches as they are. Raises `RowsNotUsable` for splits."""
    if isinstance(data, DatasetDict):
        raise RowsNotUsable(f"A data set in splits is not one of rows: choose one of {', '.join(data)}.")
    if isinstance(data, pd.DataFrame):
        return Dataset.from_pandas(data, preserve_index=False)
    if isinstance(data, dict) and not any(isinstance(column, Tensor) for column in data.values()):
        return Dataset.from_dict(data)
    return data.with_format(None) if isinstance(data, Dataset) else data


def _text(text: object) -> str | None:
    return text if isinstance(text, str) and text else None


def _finite(label: object) -> object | None:
    numbers = label if isinstance(label, list) else [label]
    return label if all(isinstance(one, int | float) and math.isfinite(one) for one in numbers) else None
