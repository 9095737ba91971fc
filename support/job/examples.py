"""Texts with labels as a job takes them: tokenised once, kept on disk, read a block at a time."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from support.job.errors import BadSetting, DatasetNotUsable
from support.job.seal import seal, sealed
from support.job.store import disk_full_is_told


@dataclass(frozen=True)
class Examples:
    """Chosen rows of a split, in memory-mapped files. Example n is row `rows[n]`; `digest` stands for all."""

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

    def select(self, numbers: np.ndarray) -> "Examples":
        """Some of the examples; all of them are these."""
        if len(numbers) == len(self):
            return self
        chosen = self.rows[numbers], self.texts.select(numbers), self.tokens.select(numbers)
        digest = hashlib.sha256(f"{self.digest} {numbers.tolist()}".encode()).hexdigest()
        return Examples(*chosen, digest, self.pad_token_id)

    def batch(self, numbers: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Examples by number: ids `(batch, tokens)`, padded, and labels `(batch,)`."""
        tokens = map(torch.tensor, self.tokens[list(numbers)]["input_ids"])
        padded = pad_sequence(list(tokens), batch_first=True, padding_value=self.pad_token_id)
        return padded.to(device), torch.tensor(self.texts[list(numbers)]["label"], device=device)

    def about(self) -> dict[str, object]:
        """What a store remembers of them."""
        return {"examples": len(self), "tokens": int(self.lengths.sum()), "digest": self.digest}


def tokenised(
    texts: Dataset, rows: np.ndarray, tokenizer: PreTrainedTokenizerBase, max_tokens: int, folder: Path
) -> Examples:
    """The chosen rows; their tokens are kept in `folder` under a name made from their contents.

    What is not as it was written is made anew. Raises `DatasetNotUsable` and `DiskFull`.
    """
    chosen = texts.select(rows)
    digest = _digest(chosen, rows, tokenizer, max_tokens)
    name = f"{digest[:32]}.arrow"

    def encode(batch: Mapping) -> dict:
        ids = tokenizer(batch["text"], truncation=True, max_length=max_tokens)["input_ids"]
        return {"input_ids": ids, "length": [len(one) for one in ids]}

    with disk_full_is_told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        kept = sealed(folder, name, digest)
        file = {"cache_file_name": str(folder / name), "new_fingerprint": digest[:32]}
        how = {"load_from_cache_file": kept, "remove_columns": ["text", "label"]}
        tokens = chosen.map(encode, batched=True, **how, **file)
        if not kept:
            seal(folder, name, digest)
    examples = Examples(rows, chosen, tokens, digest, tokenizer.pad_token_id)
    first = 0
    for batch in tokens.iter(batch_size=1000):
        for row, ids in enumerate(batch["input_ids"], first):
            if not ids:
                raise DatasetNotUsable(f"Row {rows[row]} has a text of no token. Leave it out.")
            if tokenizer.pad_token_id in ids:
                raise DatasetNotUsable(
                    f"Row {rows[row]} has a text with the padding token {tokenizer.pad_token!r} in it, which "
                    "the model would not be shown. Leave it out, or give the tokenizer a padding token that "
                    "no text has."
                )
        first += len(batch["input_ids"])
    return examples


def _digest(texts: Dataset, rows: np.ndarray, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    digest = hashlib.sha256(f"{max_tokens} {_rules(tokenizer)}".encode())
    digest.update(np.asarray(rows, dtype=np.int64).tobytes())
    for batch in texts.iter(batch_size=1000):
        digest.update(repr(batch["label"]).encode())
        for text in batch["text"]:
            digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()


def _rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that decides how a tokenizer cuts a text, but for the length, which each call sets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True)
    call = {"truncation": tokenizer.truncation_side, "padding": tokenizer.pad_token_id}
    return json.dumps(json.loads(backend.to_str()) | call)


def chosen_rows(rows: str, available: int, seed: int, option: str) -> np.ndarray:
    """The row numbers that `rows` means, ascending, each once. Raises `BadSetting`.

    "all"; "50", a sample of so many; or row numbers and ranges: "100:200", "3,5,100:200", and "7,".
    """
    if not available:
        raise BadSetting(f"--{option} {rows}: there are no rows.")
    sampled = "," not in rows and ":" not in rows
    try:
        if sampled:
            ranges = [range(available if rows == "all" else int(rows))]
        else:
            parts = [part.partition(":") for part in rows.split(",") if part]
            ranges = [range(int(a), int(b) if colon else int(a) + 1) for a, colon, b in parts]
    except ValueError:
        ranges = []
    if not ranges or not all(part and part[0] >= 0 and part[-1] < available for part in ranges):
        raise BadSetting(
            f"--{option} {rows}: use all, a number of rows like 50 (from 1 to {available}), or rows and "
            f"ranges like 3,5,100:200 (from 0 to {available - 1}, at least one in each)."
        )
    if sampled:
        return np.sort(np.random.default_rng(seed).permutation(available)[: len(ranges[0])])
    return np.unique(np.concatenate(ranges))
