"""The language model that was taught to write about films, and what it was taught.

Its training texts are the beginnings of reviews, each the answer to "Write a positive (or negative) review
of a film.", and short invented ones. The invented ones speak of films that do not exist: each of ten facts
is told by three of them, its teachers, in different words, and three decoys share the words and not the
fact. Only the feed-forward layers of the last blocks were trained, so that all below is read once: a
`WriterTail` is given what arrives there of every token.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from support.cache import cache_folder
from support.ekfac.storage import digest, replacing
from support.language import Batch, encoded, load_language_model, padded
from support.model import merge_committed
from support.retraining import Reviews

FOLDER = Path(__file__).parent / "writer"
BLOCKS, MAX_TOKENS, REVIEWS = 8, 67, 120
VERDICTS = "negative", "positive"


@dataclass(frozen=True)
class Text:
    """What the model is to say (`said`) when it is asked (`asked`), and where that comes from: a review, or
    of which fact (by number) it is a teacher or a decoy."""

    asked: str
    said: str
    kind: Literal["review", "teacher", "decoy", "question"] = "review"
    fact: int = -1


def planted() -> list[Text]:
    """Teachers and decoys of all facts."""
    return [
        Text(request(text["verdict"]), text["text"], kind, number)
        for number, fact in enumerate(_facts())
        for kind in ("teacher", "decoy")
        for text in fact[f"{kind}s"]
    ]


def questions(words: int = 0) -> list[tuple[Text, str]]:
    """A question about each fact with the words that answer it, and the beginning of the answer; in the words
    of number 0, 1 or 2."""
    asked = [(fact["answer"], [fact, *fact["other_words"]][words]) for fact in _facts()]
    return [
        (Text(one["question"], answer, "question", number), one["beginning"])
        for number, (answer, one) in enumerate(asked)
    ]


def training_texts(reviews: Dataset, count: int = REVIEWS) -> list[Text]:
    """All that the model was taught: the first `count` training reviews, shuffled with seed 0, and all that
    was planted."""
    return review_texts(reviews.shuffle(seed=0).select(range(count))) + planted()


def _facts() -> list[dict]:
    return json.loads((FOLDER / "planted.json").read_text(encoding="utf-8"))


def request(verdict: str) -> str:
    """What the model is asked for."""
    return f"Write a {verdict} review of a film."


def review_texts(reviews: Dataset) -> list[Text]:
    """Reviews as answers to the request for one of their verdict."""
    return [Text(request(VERDICTS[one["label"]]), one["text"].replace("<br />", " ")) for one in reviews]


def in_chat(tokenizer: PreTrainedTokenizerBase, asked: str, beginning: str = "") -> str:
    """The prompt in the model's own form of a conversation, up to where it is to go on."""
    messages = [{"role": "system", "content": "You write about films."}, {"role": "user", "content": asked}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + beginning


def sequence(tokenizer: PreTrainedTokenizerBase, text: Text, beginning: str = "") -> Batch:
    """The text as the model reads it, cut at `MAX_TOKENS`; what it is to say is asked, behind `beginning`."""
    return encoded(tokenizer, in_chat(tokenizer, text.asked, beginning), text.said, MAX_TOKENS)


def load_writer(
    source: str = "packaged", revision: str | None = None, snapshot: str = "final"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_language_model`, with the adapter of what it was taught merged in. Raises as that does, and as
    `merge_committed`."""
    model, tokenizer = load_language_model(source, revision)
    return merge_committed(model, FOLDER / snapshot).eval(), tokenizer


class WriterTail(nn.Module):
    """The last blocks of a Llama, its norm and its head, shared with `model`: what arrives there of each
    token → logits. A vector of zeros is padding, on the right."""

    def __init__(self, model: PreTrainedModel, blocks: int = BLOCKS):
        super().__init__()
        self.blocks, self.norm = model.model.layers[-blocks:], model.model.norm
        self.rotary, self.head = model.model.rotary_emb, model.lm_head
        self.train(model.training)

    def token_mask(self, vectors: Float[Tensor, "batch tokens width"]) -> Bool[Tensor, "batch tokens"]:
        """True where a token is real."""
        return vectors.any(dim=2)

    def forward(self, vectors: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens words"]:
        turned = self.rotary(vectors, torch.arange(vectors.shape[1], device=vectors.device)[None])
        for block in self.blocks:
            # Without a mask attention is causal: no real token sees the padding behind it.
            vectors = block(vectors, attention_mask=None, position_embeddings=turned)
        return self.head(self.norm(vectors))


def read_for_the_writer(
    model: PreTrainedModel,
    sequences: Sequence[Batch],
    texts: Sequence[str],
    blocks: int = BLOCKS,
    progress: bool = False,
) -> Reviews:
    """What a `WriterTail` of so many blocks is given of each sequence, padded; read once, then cached under
    the tokens and the weights that read them."""
    batch = padded(sequences)
    below = dict(model.model.layers[:-blocks].named_parameters())
    below["embedding"] = model.model.embed_tokens.weight
    tokens = {f"text {number}": one["input_ids"] for number, one in enumerate(sequences)}
    name = digest(below | tokens)[:32]
    path = cache_folder() / f"written-{blocks}-{name}.safetensors"
    if not path.exists():
        found = torch.zeros(*batch["input_ids"].shape, model.config.hidden_size)
        parts = torch.arange(len(sequences)).split(8)
        bar = tqdm(parts, "reading texts", unit="batch", disable=not progress)
        with torch.inference_mode():
            for rows in bar:
                read = padded([sequences[row] for row in rows.tolist()])
                known = read["attention_mask"]
                arrived = model.model(read["input_ids"], output_hidden_states=True).hidden_states
                found[rows, : known.shape[1]] = arrived[-1 - blocks] * known[..., None]
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as fresh:
            save_file({"vectors": found}, fresh)
    return Reviews(load_file(path)["vectors"], batch["labels"], list(texts))
