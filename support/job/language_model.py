"""A model that writes, as a job takes it: texts, prompts with completions, conversations.

What an example asks is the loss of its targets: all tokens of a text, the completion alone of a prompt, what
the assistant says in a conversation. A query that is a prompt alone is completed by the model; one with a
contrast asks for the loss of its completion less that of the contrast.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from jinja2 import TemplateError
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from support.ekfac import NextToken
from support.ekfac.storage import model_fingerprint
from support.job.errors import DatasetNotUsable
from support.job.examples import Examples, Sequences, kept_tokens, rules_of
from support.job.models import Task, loaded
from support.job.settings import Question, Subject
from support.job.sources import with_columns
from support.language import IGNORED, load_language_model
from support.transformer import WRITERS

Part = tuple[str, bool]
"""A piece of text, and whether its tokens are targets."""


class LanguageModel(Task):
    """A model that says each token from those before it."""

    called = "causal language model"
    architectures = WRITERS
    likelihood = NextToken
    own_settings = ("prompt_column", "completion_column", "conversation_column", "pieces")
    least = 2

    @staticmethod
    def load(subject: Subject) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        model, tokenizer = loaded(subject, load_language_model, AutoModelForCausalLM, LanguageModel)
        model.config.use_cache = False
        # Of how the model is used to write only when it ends: a job asks for the likeliest tokens.
        ends = getattr(model.generation_config, "eos_token_id", None)
        model.generation_config = GenerationConfig(eos_token_id=ends)
        return model, tokenizer

    def texts(self, found: Dataset, name: str, asked: bool) -> Dataset:
        subject, there = self.subject, found.column_names
        prompts = {
            "prompt": subject.prompt_column or "prompt",
            "completion": subject.completion_column or "completion",
        }
        conversation = {"messages": subject.conversation_column or "messages"}
        columns = {"text": subject.text_column}
        if subject.prompt_column or subject.completion_column:
            columns = prompts
        elif subject.conversation_column:
            columns = conversation
        if asked:  # a file of queries says itself what it holds
            given = (one for one in (prompts, conversation) if next(iter(one.values())) in there)
            columns = next(given, columns)
        if asked and columns is prompts and prompts["completion"] not in there:
            columns = {"prompt": prompts["prompt"]}
        if asked and "prompt" in columns and "contrast" in there:
            columns = columns | {"contrast": "contrast"}
        cure = (
            "Say which with --text-column, --prompt-column and --completion-column, or --conversation-column"
        )
        return with_columns(found, columns, name, cure)

    def examples(self, texts: Dataset, rows: np.ndarray, folder: Path, question: Question | None) -> Examples:
        new_tokens = question.new_tokens if question else 0
        pieces = self.subject.pieces and not question
        rules = {"cut": None if pieces else self.max_tokens, "template": self.tokenizer.chat_template}
        may_complete = question is not None and not {"text", "completion"} & set(texts.column_names)
        if may_complete:
            rules |= {"new tokens": new_tokens, "model": model_fingerprint(self.model)}

        def encode(batch: Mapping, places: list[int]) -> dict[str, list]:
            found = []
            for number, place in enumerate(places):
                row = {name: column[number] for name, column in batch.items()}
                contrast = row.pop("contrast", None)
                try:
                    one, other = self.encoded(row, new_tokens, pieces), ([0], [False])
                    if contrast:
                        other = self.encoded(row | {"completion": contrast}, new_tokens, pieces)
                    found.append((*one, *other))
                except (ValueError, TemplateError) as error:
                    raise DatasetNotUsable(f"Row {rows[place]} {error}") from error
            ids, targets, *contrast = map(list, zip(*found, strict=True))
            counts = [sum(one[1:]) for one in targets]
            own = {"input_ids": ids, "asked": targets, "length": list(map(len, ids)), "targets": counts}
            against = zip(("contrast", "contrast_asked"), contrast, strict=True)
            return own | (dict(against) if "contrast" in batch else {})

        rules = f"{json.dumps(rules)} {rules_of(self.tokenizer)}"
        chosen, tokens, digest = kept_tokens(texts, rows, rules, encode, folder)
        if may_complete:
            digest = hashlib.sha256(f"{digest} {tokens['input_ids'][:]}".encode()).hexdigest()
        return Sequences(rows, chosen, tokens, digest, 0, self.max_tokens, self.tokenizer)

    def asked(self, texts: Sequence[str], folder: Path, question: Question) -> Examples:
        prompts = Dataset.from_dict({"prompt": list(texts)})
        return self.examples(prompts, np.arange(len(texts)), folder, question)

    def said(self, examples: Sequences, numbers: Sequence[int], device: torch.device) -> Mapping:
        """The mean loss of what is asked, a contrast apart, in nats a token; NaN where nothing is."""
        inputs, labels = examples.batch(numbers, device)
        contrasts = torch.tensor([sign < 0 for *_, sign in examples.pieces(numbers)], device=device)
        labels[contrasts] = IGNORED
        logits = self.model(**inputs).logits[:, :-1].transpose(1, 2)
        losses = nn.functional.cross_entropy(logits, labels[:, 1:], reduction="none", ignore_index=IGNORED)
        both = losses.sum(dim=1), (labels[:, 1:] != IGNORED).sum(dim=1)
        total, asked = (examples.added_up(one.double(), numbers) for one in both)
        return {"nats": (total / asked).tolist()}

    def encoded(self, row: Mapping, new_tokens: int, pieces: bool) -> tuple[list[int], list[bool]]:
        """As `examples` keeps them. Raises `ValueError`, in words that follow the row's number."""
        ids: list[int] = []
        asked: list[bool] = []
        special = "messages" not in row and not isinstance(row.get("prompt"), list)
        for place, (text, wanted) in enumerate(self.parts(row, new_tokens > 0)):
            own = self.tokenizer(text, add_special_tokens=special and not place, verbose=False)["input_ids"]
            ids, asked = ids + own, asked + [wanted] * len(own)
        ids, asked = (ids, asked) if ids else ([self.tokenizer.eos_token_id or 0], [False])
        before = asked.index(True) if True in asked else len(asked)
        if new_tokens and before >= self.max_tokens:
            raise ValueError(
                f"asks after a prompt of {before} tokens, and {self.max_tokens} are read at most. Shorten "
                "it, or, if the model reads more, say so with --max-tokens."
            )
        if new_tokens and True not in asked:
            said = self.completed(ids, min(new_tokens, self.max_tokens - len(ids)))
            ids, asked = ids + said, asked + [True] * len(said)
        end = None if pieces else self.max_tokens
        ids, asked = ids[:end], asked[:end]
        if new_tokens and True not in asked[1:]:
            raise ValueError("asks about no token: what is asked has to follow something. Leave it out.")
        return ids, asked

    def parts(self, row: Mapping, is_query: bool) -> list[Part]:
        """The text of an example, cut where what is asked begins or ends. Raises as `encoded` does."""
        for name, value in row.items():
            talk = name == "messages" or (isinstance(value, list) and name != "text")
            if not (_is_conversation(value) if talk else isinstance(value, str)):
                expected = "a list of turns with role and content" if talk else "text"
                raise ValueError(
                    f"has {value!r} for {name}, which is to be {expected}. Leave it out, or see "
                    f"--{'conversation' if name == 'messages' else name}-column."
                )
        if "text" in row:
            return [(row["text"], True)]
        if "messages" in row:
            return self._conversation(row["messages"], is_query)
        prompt, completion = row["prompt"], row.get("completion", "")
        if isinstance(completion, str):
            before = prompt if isinstance(prompt, str) else self._rendered(prompt, True)
            return [(before, False), (completion, True)]
        if isinstance(prompt, str):
            raise ValueError("has a text for a prompt and a conversation for its completion: use one form.")
        return self._conversation(prompt + completion, is_query, len(prompt))

    def _conversation(self, messages: list[Mapping], is_query: bool, first: int = 0) -> list[Part]:
        """What the assistant says from message `first` on is asked; of a query that it hasn't answered,
        nothing is yet."""
        if is_query and messages[-1]["role"] != "assistant":
            return [(self._rendered(messages, True), False)]
        said, parts = "", []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number < first:
                continue
            before = self._rendered(messages[:number], True)
            after = self._rendered(messages[: number + 1], False)
            if not (before.startswith(said) and after.startswith(before)):
                raise ValueError(
                    "is a conversation of which the chat template writes the beginning anew with each turn. "
                    "Give each answer as a completion, what precedes it as its prompt, both as plain text."
                )
            parts += [(before[len(said) :], False), (after[len(before) :], True)]
            said = after
        return parts or [(self._rendered(messages, False), False)]

    def _rendered(self, messages: list[Mapping], to_be_answered: bool) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"is a conversation, and the tokenizer of --model {self.subject.model} has no chat template. "
                "Name a model that has one, or write prompts and completions as plain text."
            )
        how = {"tokenize": False, "add_generation_prompt": to_be_answered}
        return self.tokenizer.apply_chat_template(messages, **how)

    def completed(self, ids: list[int], new_tokens: int) -> list[int]:
        """What the model says next: each time the likeliest token, until it ends or has said so many."""
        ends = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        how = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=sorted(ends) or None, pad_token_id=0)
        read = torch.tensor([ids], device=self.model.device)
        said = self.model.generate(read, attention_mask=torch.ones_like(read), generation_config=how)
        return said[0, len(ids) :].tolist()


def _is_conversation(value: object) -> bool:
    """Whether it is a list of turns, one at least, each with a role and what it says."""
    turns = value if isinstance(value, list) else []
    told = [isinstance(one, Mapping) and (one.get("role"), one.get("content")) for one in turns]
    return bool(told) and all(pair and all(isinstance(part, str) for part in pair) for pair in told)
