"""IMDB reviews (Maas et al. 2011): where they come from, how they become batches.

A batch is `(input_ids, labels, texts)`: `input_ids` is `(batch, tokens)`, padded with the tokenizer's
pad id to the longest review of that batch; `labels` is `(batch,)`, 0 negative and 1 positive.
"""

import pandas as pd
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from jaxtyping import Int
from torch import Tensor
from torch.utils import data
from transformers import PreTrainedTokenizerBase

from support import assets

HUB_DATASET = "stanfordnlp/imdb"
FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
# The last 2,500 of each class: neighbours are often about one film, and whole blocks keep films apart.
HELD_OUT_ROWS = [*range(10_000, 12_500), *range(22_500, 25_000)]


def load_imdb(source: str = "packaged", revision: str | None = None) -> DatasetDict:
    """Splits `train` and `test` with columns `text` and `label`.

    `packaged`: the original training split, cut into 19,979 train and 5,000 test reviews with no text
    in both. `hub`: `stanfordnlp/imdb`, 25,000 each, at `revision` (None is the hub's `main`).
    Raises `UnknownSource`, `AssetMissing`, `AssetDamaged` or `HubUnreachable`.
    """
    if not assets.is_packaged(source):
        imdb = assets.from_hub(load_dataset, HUB_DATASET, revision)
        return DatasetDict(train=imdb["train"], test=imdb["test"])
    reviews = pd.read_csv(assets.find(assets.REVIEWS))
    reviews = reviews.loc[reviews["source"] == "imdb", ["text", "label"]].reset_index(drop=True)
    held_out = reviews.index.isin(HELD_OUT_ROWS)
    repeated = reviews["text"].isin(reviews.loc[held_out, "text"])
    parts = {"train": reviews[~held_out & ~repeated], "test": reviews[held_out]}
    tables = {name: Dataset.from_pandas(part, FEATURES, preserve_index=False) for name, part in parts.items()}
    return DatasetDict(tables)


class ImdbDataset(data.Dataset):
    """Reviews, tokenised once and cut at `max_tokens`: item n is `(input_ids, label, text)`."""

    def __init__(self, reviews: Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 512):
        self.texts = list(reviews["text"])
        self.labels = torch.tensor(reviews["label"])
        encoded = tokenizer(self.texts, truncation=True, max_length=max_tokens)
        self.input_ids = [torch.tensor(ids) for ids in encoded["input_ids"]]
        self.pad_token_id = tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> tuple[Int[Tensor, " tokens"], Int[Tensor, ""], str]:
        return self.input_ids[row], self.labels[row], self.texts[row]

    def lengths(self) -> list[int]:
        """Number of tokens of each review, after the cut."""
        return [len(ids) for ids in self.input_ids]

    def batch(self, rows: list[int]) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, " batch"], list[str]]:
        """The given rows as one batch, each padded on the right to the longest of them."""
        ids = [self.input_ids[row] for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)
        return padded, self.labels[rows], [self.texts[row] for row in rows]

    def loader(self, batch_size: int) -> data.DataLoader:
        """All reviews in order, in padded batches of `batch_size`."""
        return data.DataLoader(range(len(self)), batch_size, collate_fn=self.batch)
