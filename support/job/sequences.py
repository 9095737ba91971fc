"""Examples of a model that writes: each token, and whether it is asked; long ones in pieces.

A piece begins with the token that the one before it ended with, so that of a long text, too, each token
but the first is said once from what precedes it. What is known of pieces is added up per example.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from support.job.examples import Examples
from support.language import IGNORED, padded


@dataclass(frozen=True)
class Sequences(Examples):
    """Chosen rows of a split; `max_tokens` of an example are read at a time."""

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
        for _, ids, asked in self.pieces(numbers):
            ids = torch.tensor(ids)[None]
            labels = ids.where(torch.tensor(asked)[None], IGNORED)
            sequences.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        inputs = {name: part.to(device) for name, part in padded(sequences).items()}
        return inputs, inputs.pop("labels")

    def pieces(self, numbers: Sequence[int]) -> list[tuple[int, list[int], list[bool]]]:
        """Of these examples, the pieces that ask about something, one at least: its place among the numbers,
        its tokens, and which are asked."""
        found = []
        rows = self.tokens[list(numbers)]
        for place, (ids, asked) in enumerate(zip(rows["input_ids"], rows["asked"], strict=True)):
            starts = range(0, max(1, len(ids) - 1), self.max_tokens - 1)
            parts = [slice(start, start + self.max_tokens) for start in starts]
            parts = [part for part in parts if any(asked[part][1:])] or parts[:1]
            found += [(place, ids[part], asked[part]) for part in parts]
        return found

    def added_up(self, values: Tensor, numbers: Sequence[int]) -> Tensor:
        """What is known of each piece of these examples, in the last dimension: the sum for each example."""
        owners = torch.tensor([place for place, *_ in self.pieces(numbers)], device=values.device)
        return values.new_zeros(*values.shape[:-1], len(numbers)).index_add_(-1, owners, values)

    def described(self, numbers: Sequence[int]) -> Mapping:
        """The `prompt`, up to the first token that is asked, and the `text` from there, as they were read."""
        rows = self.tokens[list(numbers)]
        prompts, texts = [], []
        for ids, asked in zip(rows["input_ids"], rows["asked"], strict=True):
            first = asked.index(True) if True in asked else 0
            prompts.append(self.tokenizer.decode(ids[:first], skip_special_tokens=True))
            texts.append(self.tokenizer.decode(ids[first:], skip_special_tokens=True))
        return {"prompt": prompts, "text": texts}

    def said(self, number: int, places: Sequence[int]) -> list[str]:
        """Tokens of an example as text, each as it reads after those before it."""
        ids = self.tokens[number]["input_ids"]
        read = [self.tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
        return [read[place + 1][len(read[place]) :] for place in places]
