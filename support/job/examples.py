"""Examples as a job takes them: tokenised once, kept on disk, read a block at a time."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from support.job.errors import BadSetting, DatasetNotUsable
from support.job.layout import seal, sealed
from support.job.store import disk_full_is_told
from support.language import IGNORED, padded

NOT = " – and not: "
"""Stands before what a query is contrasted with."""


@dataclass(frozen=True)
class Examples:
    """Chosen rows of a split, texts with labels, in memory-mapped files. Example n is row `rows[n]`;
    `digest` stands for all."""

    rows: np.ndarray
    texts: Dataset
    tokens: Dataset
    digest: str
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def told(self) -> str:
        """A line about examples that are of no use; empty if there are none."""
        return ""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.asarray(self.tokens["length"])

    def select(self, numbers: np.ndarray) -> "Examples":
        """Some of the examples; all of them are these."""
        if len(numbers) == len(self):
            return self
        chosen = {name: getattr(self, name).select(numbers) for name in ("texts", "tokens")}
        digest = hashlib.sha256(f"{self.digest} {numbers.tolist()}".encode()).hexdigest()
        return replace(self, rows=self.rows[numbers], digest=digest, **chosen)

    def batch(self, numbers: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Examples by number: ids `(batch, tokens)`, padded, and labels `(batch,)`."""
        tokens = map(torch.tensor, self.tokens[list(numbers)]["input_ids"])
        padded = pad_sequence(list(tokens), batch_first=True, padding_value=self.pad_token_id)
        return padded.to(device), torch.tensor(self.texts[list(numbers)]["label"], device=device)

    def added_up(self, values: Tensor, numbers: Sequence[int]) -> Tensor:
        """What is known of these examples as they come in a batch, in the last dimension; of each example."""
        return values

    def weights(self, numbers: Sequence[int]) -> Tensor | None:
        """How much what comes in a batch counts for each of these examples, None where each is one."""
        return None

    def of_tokens(self, values: np.ndarray, numbers: Sequence[int]) -> list[np.ndarray]:
        """What is known of each position of these examples as they come in a batch; of each one's tokens."""
        return [own[:length] for own, length in zip(values, self.lengths[list(numbers)], strict=True)]

    def described(self, numbers: Sequence[int]) -> Mapping:
        """What a reader is shown of examples, by column."""
        chosen = self.texts.select(numbers)
        # A list of no labels has no type, and would make the others' numbers floats.
        return {"label": np.array(chosen["label"][:], dtype=np.int64), "text": chosen["text"][:]}

    def about(self) -> dict[str, object]:
        """What a store remembers of them."""
        return {"examples": len(self), "tokens": int(self.lengths.sum()), "digest": self.digest}


@dataclass(frozen=True)
class Sequences(Examples):
    """Examples of a model that writes: each token, and whether it is asked; `max_tokens` are read at a time.

    Longer ones are in pieces. A piece begins with the token that the one before it ended with, so that of a
    long text, too, each token but the first is said once from what precedes it. A contrast, whose loss
    counts against that of its query, is one more piece.
    """

    max_tokens: int
    tokenizer: PreTrainedTokenizerBase

    @property
    def told(self) -> str:
        """How many have nothing to say; empty if none."""
        silent = int((np.asarray(self.tokens["targets"]) == 0).sum())
        if not silent:
            return ""
        them = "it has" if silent == 1 else "they have"
        return (
            f"Of {len(self):,} training examples {silent:,} ask about no token, being empty or all prompt as "
            f"far as they are read: {them} no influence."
        )

    def batch(self, numbers: Sequence[int], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Examples by number, piece after piece: a mapping of `input_ids` and `attention_mask`, and labels,
        −100 where nothing is asked; each `(pieces, tokens)`."""
        sequences = []
        for _, _, ids, asked, _ in self.pieces(numbers):
            ids = torch.tensor(ids)[None]
            labels = ids.where(torch.tensor(asked)[None], IGNORED)
            sequences.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        inputs = {name: part.to(device) for name, part in padded(sequences).items()}
        return inputs, inputs.pop("labels")

    def pieces(self, numbers: Sequence[int]) -> list[tuple[int, int, list[int], list[bool], int]]:
        """Of these examples, the pieces that ask about something, one at least: its place among the numbers,
        where it begins, its tokens, which are asked, and the sign with which its loss counts."""
        found = []
        rows = self.tokens[list(numbers)]
        for place, (ids, asked) in enumerate(zip(rows["input_ids"], rows["asked"], strict=True)):
            starts = range(0, max(1, len(ids) - 1), self.max_tokens - 1)
            parts = [slice(start, start + self.max_tokens) for start in starts]
            parts = [part for part in parts if any(asked[part][1:])] or parts[:1]
            found += [(place, part.start, ids[part], asked[part], 1) for part in parts]
            if "contrast" in rows and any(rows["contrast_asked"][place]):
                found.append((place, 0, rows["contrast"][place], rows["contrast_asked"][place], -1))
        return found

    def weights(self, numbers: Sequence[int]) -> Tensor | None:
        """1 for each query's own piece, −1 for its contrast, `(queries, pieces)`; None without contrasts."""
        pieces = self.pieces(numbers)
        weights = torch.zeros(len(numbers), len(pieces))
        for piece, (place, *_, sign) in enumerate(pieces):
            weights[place, piece] = sign
        return weights if len(pieces) > len(numbers) else None

    def added_up(self, values: Tensor, numbers: Sequence[int]) -> Tensor:
        """What is known of each piece of these examples, in the last dimension: the sum for each example."""
        owners = torch.tensor([place for place, *_ in self.pieces(numbers)], device=values.device)
        return values.new_zeros(*values.shape[:-1], len(numbers)).index_add_(-1, owners, values)

    def of_tokens(self, values: np.ndarray, numbers: Sequence[int]) -> list[np.ndarray]:
        """As of others; where two pieces share a token, the sum."""
        found = [np.zeros(length, values.dtype) for length in self.lengths[list(numbers)]]
        for own, (place, start, ids, *_) in zip(values, self.pieces(numbers), strict=True):
            found[place][start : start + len(ids)] += own[: len(ids)]
        return found

    def described(self, numbers: Sequence[int]) -> Mapping:
        """The `prompt`, up to the first token that is asked, and the `text` from there, as they were read,
        with what it is contrasted with."""
        rows = self.tokens[list(numbers)]
        prompts, texts = [], []
        for ids, asked in zip(rows["input_ids"], rows["asked"], strict=True):
            first = asked.index(True) if True in asked else 0
            prompts.append(self.tokenizer.decode(ids[:first], skip_special_tokens=True))
            texts.append(self.tokenizer.decode(ids[first:], skip_special_tokens=True))
        for place, asked in enumerate(rows.get("contrast_asked", [])):
            if True in asked:
                against = rows["contrast"][place][asked.index(True) :]
                texts[place] += f"{NOT}{self.tokenizer.decode(against, skip_special_tokens=True)}"
        return {"prompt": prompts, "text": texts}


Encode = Callable[[Mapping, list[int]], dict[str, list]]
"""Columns of tokens, of a batch of columns of texts, whose places among the chosen rows come with them."""


def kept_tokens(
    texts: Dataset, rows: np.ndarray, rules: str, encode: Encode, folder: Path
) -> tuple[Dataset, Dataset, str]:
    """The chosen rows, what `encode` makes of them, and a digest of both: of the texts and of the `rules`
    that say how. Tokens are kept in `folder` under a name made from it; what is not as it was written is
    made anew. Raises `DiskFull`, and as `encode` does."""
    chosen = texts.select(rows)
    digest = _digest(chosen, rows, rules)
    name = f"{digest[:32]}.arrow"
    with disk_full_is_told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        kept = sealed(folder, name, digest)
        file = {"cache_file_name": str(folder / name), "new_fingerprint": digest[:32]}
        how = {"load_from_cache_file": kept, "remove_columns": chosen.column_names}
        tokens = chosen.map(encode, batched=True, with_indices=True, **how, **file)
        if not kept:
            seal(folder, name, digest)
    return chosen, tokens, digest


def tokenised(
    texts: Dataset, rows: np.ndarray, tokenizer: PreTrainedTokenizerBase, max_tokens: int, folder: Path
) -> Examples:
    """The chosen rows of texts with labels. Raises `DatasetNotUsable`, and as `kept_tokens` does."""

    def encode(batch: Mapping, places: list[int]) -> dict:
        ids = tokenizer(batch["text"], truncation=True, max_length=max_tokens)["input_ids"]
        for place, one in zip(places, ids, strict=True):
            if not one:
                raise DatasetNotUsable(f"Row {rows[place]} has a text of no token. Leave it out.")
            if tokenizer.pad_token_id in one:
                raise DatasetNotUsable(
                    f"Row {rows[place]} has a text with the padding token {tokenizer.pad_token!r} in it, "
                    "which the model would not be shown. Leave it out, or give the tokenizer a padding token "
                    "that no text has."
                )
        return {"input_ids": ids, "length": list(map(len, ids))}

    chosen, tokens, digest = kept_tokens(texts, rows, f"{max_tokens} {rules_of(tokenizer)}", encode, folder)
    return Examples(rows, chosen, tokens, digest, tokenizer.pad_token_id)


def _digest(texts: Dataset, rows: np.ndarray, rules: str) -> str:
    digest = hashlib.sha256(rules.encode())
    digest.update(np.asarray(rows, dtype=np.int64).tobytes())
    for batch in texts.iter(batch_size=1000):
        digest.update(repr(batch).encode())
    return digest.hexdigest()


def rules_of(tokenizer: PreTrainedTokenizerBase) -> str:
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
