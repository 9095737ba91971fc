"""`TextInfluence`: the engine on a model of transformers, its answers with texts, labels and predictions."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress

import pandas as pd
import torch
from datasets import Dataset, DatasetDict
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from support.ekfac import Bernoulli, Categorical, EkfacInfluence, Gaussian
from support.ekfac.batches import Inputs, labelled
from support.ekfac.blocks import Block, loader_blocks
from support.ekfac.likelihood import Likelihood
from support.rows import Reader, RowsNotUsable
from support.transformer import choose_layers, likelihood_of, not_covered, positions

Data = Dataset | pd.DataFrame | Iterable
"""Rows of texts and labels, or tokenised; or batches as the engine takes them, or one of them."""

EFFECTS = {"helps": 1, "harms": -1}


class TextInfluence(EkfacInfluence):
    """Influence functions for a model of transformers: a classifier of texts or tokens, a regression, or a
    model that writes.

    Puts the model, which may have an adapter of peft, into evaluation mode and freezes all but `layers`,
    parts of names, or those of `choose_layers`; `left_out` tells of some that can't be covered. The loss is
    that of `likelihood_of`. `text` and `label` are columns of data sets, one or several, as `Reader` has
    them, `name` one by which answers name examples, instead of by their row; texts are cut at `max_tokens`.
    Other settings, and what is raised, are those of `Engine`; `ValueError` tells of layers that there are not.

    `fit`, `score`, `plan` and `influences` take data sets of `datasets`, frames, a DataLoader, or batches;
    what else the engine has takes them as `batch` gives them. `RowsNotUsable` says what is wrong with rows.
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
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        layers, text, label = ([one] if isinstance(one, str) else list(one) for one in (layers, text, label))
        likelihood = likelihood or likelihood_of(model)
        model.config.pad_token_id = tokenizer.pad_token_id  # GPT-2 looks for the last token before it
        self.left_out = choose_layers(model.eval(), layers, not_covered(model, tokenizer))
        super().__init__(model, likelihood=likelihood, **settings)
        longest = min(max_tokens, tokenizer.model_max_length, positions(model))
        classes = {name: number for number, name in model.config.id2label.items()}
        self.reader, self.name = Reader(tokenizer, likelihood, classes, text, label, longest), name

    def batches(self, data: Data) -> Iterable:
        """All examples in order, as the engine takes them."""
        data = _rows(data)
        if isinstance(data, Dataset):
            return self.reader.loader(data)
        return [data] if isinstance(data, Mapping) else data

    def batch(self, data: Dataset | pd.DataFrame) -> tuple[Inputs, Tensor]:
        """All rows as one batch, apart: `influence.self_influences(*influence.batch(data))`."""
        data = _rows(data)
        return next(labelled(self.reader.loader(data, len(data))))

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
        training: Dataset | pd.DataFrame,
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
        rows = sorted({*strongest["row"]})
        about = self.described(_rows(training).select(rows)).set_index(pd.Index(rows))
        strongest["training"] = names[strongest["row"]]
        return strongest.join(about, on="row").drop(columns="row")

    def described(self, data: Dataset | pd.DataFrame) -> pd.DataFrame:
        """Of each example, by its name: `label`, what is `predicted`, and the `probability` of that, where there
        is one, the `loss`, and the data set's own columns; of tokens alone the text as it is decoded.

        Raises `LabelsMismatch` for labels that are none of the model's."""
        data = _rows(data)
        blocks = loader_blocks(labelled(self.batches(data)), *self.passes.together)
        said = pd.concat([self._said(block.ordinary(self.passes.device)) for block in blocks]).sort_index()
        own = data.to_pandas()
        if {*self.reader.texts} <= {*own}:
            said = said.drop(columns="text")
        hidden = {*said, *self.reader.tokenizer.model_input_names} & {*own}
        return said.join(own.drop(columns=[*hidden])).set_index(self._names(data, len(said)))

    @torch.inference_mode()
    def _said(self, block: Block) -> pd.DataFrame:
        """What the model says of a block's examples, by row."""
        outputs, mask = self.passes.outputs(block.inputs).float(), self.passes.token_mask(block.inputs)
        labels = self.likelihood.asked(block.labels, mask)
        self.likelihood.check(outputs, labels)
        said = _in_words(self.likelihood, list(self.reader.class_names), outputs, labels)
        said["loss"] = self.likelihood.loss(outputs, labels).tolist()
        ids = [one[real].tolist() for one, real in zip(block.inputs["input_ids"], mask, strict=True)]
        said["text"] = self.reader.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return pd.DataFrame(said, index=block.rows)

    def _names(self, data: Data, size: int) -> pd.Index:
        """Of examples that there are so many of. Raises `ValueError` when there are not."""
        data = _rows(data)
        if isinstance(data, Dataset) and len(data) != size:
            raise ValueError(f"The scores are of {size} examples, but the data set has {len(data)}.")
        named = isinstance(data, Dataset) and self.name in data.column_names
        return pd.Index(data[self.name][:] if named else range(size))


def _rows(data: Data) -> Data:
    """A frame as a data set. Raises `RowsNotUsable` for one in splits."""
    if isinstance(data, DatasetDict):
        raise RowsNotUsable(f"A data set in splits is not one of rows: choose one of {', '.join(data)}.")
    return Dataset.from_pandas(data, preserve_index=False) if isinstance(data, pd.DataFrame) else data


def _in_words(likelihood: Likelihood, names: list[str], outputs: Tensor, labels: Tensor) -> dict[str, list]:
    """Columns `label` and `predicted`, where examples have one, and the `probability` of that."""
    if isinstance(likelihood, Categorical):
        probability, predicted = outputs.softmax(dim=1).max(dim=1)
        said = {"label": labels.tolist(), "predicted": predicted.tolist()}
        said = {column: [names[number] for number in numbers] for column, numbers in said.items()}
        return said | {"probability": probability.tolist()}
    if isinstance(likelihood, Bernoulli):
        said = {"label": labels > 0.5, "predicted": outputs > 0}
        return {column: [", ".join(compress(names, row)) for row in yes] for column, yes in said.items()}
    if isinstance(likelihood, Gaussian):
        return {"label": labels.squeeze(1).tolist(), "predicted": outputs.squeeze(1).tolist()}
    return {}
