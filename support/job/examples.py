"""Texts with labels as a job takes them: tokenised once, kept on disk, read a block at a time."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from support.job.errors import DatasetNotUsable, StoreDamaged
from support.job.sources import Classifier, tokenizer_text
from support.job.store import disk_full_is_told


@dataclass(frozen=True)
class Examples:
    """Chosen rows of a split. Example n is row `rows[n]`; `digest` stands for all their contents.

    Token ids lie in a memory-mapped file: memory does not grow with the number of examples.
    """

    rows: np.ndarray
    texts: Dataset
    tokens: Dataset
    digest: str
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.asarray(self.tokens["length"])

    @property
    def labels(self) -> np.ndarray:
        return np.asarray(self.texts["label"])

    def select(self, numbers: np.ndarray) -> "Examples":
        """Some of the examples; all of them are these."""
        if len(numbers) == len(self):
            return self
        return Examples(
            self.rows[numbers],
            self.texts.select(numbers),
            self.tokens.select(numbers),
            hashlib.sha256(f"{self.digest} {numbers.tolist()}".encode()).hexdigest(),
            self.pad_token_id,
        )

    def batch(
        self, numbers: range | list[int], device: torch.device
    ) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, " batch"]]:
        """Examples by number as one padded batch, with their labels."""
        ids = [
            torch.tensor(ids, dtype=torch.long) for ids in self.tokens[list(numbers)]["input_ids"]
        ]
        labels = torch.tensor(self.texts[list(numbers)]["label"])
        padded = pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)
        return padded.to(device), labels.to(device)


def tokenised(
    texts: Dataset, rows: np.ndarray, classifier: Classifier, max_tokens: int, folder: Path
) -> Examples:
    """The chosen rows; their tokens are kept in `folder` under a name made from their contents.

    Raises `DatasetNotUsable` for a text without a token, `DiskFull` and `StoreDamaged`.
    """
    chosen = texts.select(rows)
    digest = _digest(chosen, rows, classifier, max_tokens)
    path = folder / f"{digest[:32]}.arrow"

    def encode(batch: Mapping) -> dict:
        ids = classifier.tokenizer(batch["text"], truncation=True, max_length=max_tokens)
        return {"input_ids": ids["input_ids"], "length": [len(one) for one in ids["input_ids"]]}

    with disk_full_is_told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            tokens = chosen.map(
                encode,
                batched=True,
                remove_columns=["text", "label"],
                cache_file_name=str(path),
                new_fingerprint=digest[:32],
            )
        except pyarrow.ArrowInvalid as error:
            raise StoreDamaged(
                f"{folder.name}/{path.name} can't be read ({error}). Remove it: it is made anew."
            ) from error
    examples = Examples(rows, chosen, tokens, digest, classifier.tokenizer.pad_token_id)
    _refuse_empty(examples)
    return examples


def _refuse_empty(examples: Examples) -> None:
    empty = np.flatnonzero(examples.lengths == 0)
    if len(empty):
        raise DatasetNotUsable(
            f"Row {examples.rows[empty[0]]} has a text of no token. Leave it out."
        )


def _digest(texts: Dataset, rows: np.ndarray, classifier: Classifier, max_tokens: int) -> str:
    digest = hashlib.sha256(f"{max_tokens} {tokenizer_text(classifier.tokenizer)}".encode())
    digest.update(np.asarray(rows, dtype=np.int64).tobytes())
    for batch in texts.iter(batch_size=1000):
        digest.update(repr(batch["label"]).encode())
        for text in batch["text"]:
            digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()
