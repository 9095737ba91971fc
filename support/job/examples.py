"""Texts with labels as a job takes them: tokenised once, kept on disk, read a block at a time."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from support.job.sources import Classifier, tokenizer_text


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

    def batch(
        self, numbers: range | list[int], device: torch.device
    ) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, " batch"]]:
        """Examples by number as one padded batch, with their labels."""
        ids = [torch.tensor(ids) for ids in self.tokens[list(numbers)]["input_ids"]]
        labels = torch.tensor(self.texts[list(numbers)]["label"])
        padded = pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id)
        return padded.to(device), labels.to(device)


def tokenised(
    texts: Dataset, rows: np.ndarray, classifier: Classifier, max_tokens: int, folder: Path
) -> Examples:
    """The chosen rows; their tokens are kept in `folder` under a name made from their contents."""
    chosen = texts.select(rows)
    digest = _digest(chosen, rows, classifier, max_tokens)
    folder.mkdir(parents=True, exist_ok=True)

    def encode(batch: Mapping) -> dict:
        ids = classifier.tokenizer(batch["text"], truncation=True, max_length=max_tokens)
        return {"input_ids": ids["input_ids"], "length": [len(one) for one in ids["input_ids"]]}

    tokens = chosen.map(
        encode,
        batched=True,
        remove_columns=["text", "label"],
        cache_file_name=str(folder / f"{digest[:32]}.arrow"),
        new_fingerprint=digest[:32],
    )
    return Examples(rows, chosen, tokens, digest, classifier.tokenizer.pad_token_id)


def _digest(texts: Dataset, rows: np.ndarray, classifier: Classifier, max_tokens: int) -> str:
    digest = hashlib.sha256(f"{max_tokens} {tokenizer_text(classifier.tokenizer)}".encode())
    digest.update(np.asarray(rows, dtype=np.int64).tobytes())
    for batch in texts.iter(batch_size=1000):
        digest.update(repr(batch["label"]).encode())
        for text in batch["text"]:
            digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()
