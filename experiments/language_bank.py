"""`python -m experiments.language_bank`: a bank of retrainings of a model that writes.

The feed-forward layers of SmolLM2's last three blocks are trained in full, above what the blocks below make
of each token, on random halves of 160 reviews, and of every query the loss is kept. The queries stand next
to training reviews in the file and so are often about the same film. All are cut at 48 tokens, and read
without a prompt. Products are taken in bfloat16.

About 26 s a training on one thread that nothing disturbs. A run that was killed goes on where it was.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.bank_making import BANKS, digest, fill
from support.ekfac import NextToken
from support.imdb import load_imdb
from support.judge import Design
from support.language import FEED_FORWARD, encoded, load_language_model
from support.model import require_gradients_only
from support.retraining import Recipe, Retraining, Reviews
from support.writing import WriterTail, read_for_the_writer

BLOCKS, TOKENS = 3, 48
TRAIN_REVIEWS, QUERIES = 160, 40
RECIPE = Recipe(epochs=3, learning_rate=3e-4, batch_size=8)
DESIGN = Design(subsets=60, seeds=2)
BANK = BANKS / "language.safetensors"


class WriterRetraining(Retraining):
    """`Retraining` of a part that says the next token at each."""

    def loss(self, rows: Int[Tensor, " rows"]) -> Float[Tensor, ""]:
        """−log p of a token, mean over all of these texts."""
        labels = self.reviews.labels[rows]
        with torch.autocast(labels.device.type, dtype=torch.bfloat16):
            logits = self.part(self.reviews.vectors[rows])
        return NextToken(mean=True).loss(logits.float(), labels).mean()

    def margins(self, reviews: Reviews) -> Float[Tensor, " reviews"]:
        """`log_odds` of the part as it stands."""
        return log_odds(self.part, reviews)


@torch.no_grad()
def log_odds(part: nn.Module, reviews: Reviews) -> Float[Tensor, " reviews"]:
    """log p/(1 − p) of each text as a whole, so that `support.judge` finds its loss in it:
    log(1 + e^−margin) = −log p."""
    parts = zip(reviews.vectors.split(8), reviews.labels.split(8), strict=True)
    losses = torch.cat([NextToken().loss(part(vectors), labels) for vectors, labels in parts])
    return -(losses + torch.log1p(-torch.exp(-losses)))


def chosen_rows(reviews: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Rows of training reviews, drawn at random, and of queries, each next to a training review; none of
    them shorter than what is read."""
    drawn = torch.randperm(len(reviews), generator=torch.Generator().manual_seed(0)).tolist()
    long = (row for row in drawn if len(tokenizer(reviews[row]["text"])["input_ids"]) >= TOKENS)
    train = [next(long) for _ in range(TRAIN_REVIEWS)]
    neighbours = (row + 1 for row in train if row + 1 < len(reviews) and row + 1 not in train)
    long = (row for row in neighbours if len(tokenizer(reviews[row]["text"])["input_ids"]) >= TOKENS)
    return train, [next(long) for _ in range(QUERIES)]


def reviews_and_queries(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Reviews, Reviews]:
    """As a `WriterTail` is given them."""
    imdb, found = load_imdb()["train"], []
    for rows in chosen_rows(imdb, tokenizer):
        sequences = [encoded(tokenizer, text, max_tokens=TOKENS) for text in imdb[rows]["text"]]
        read = [tokenizer.decode(one["input_ids"][0]) for one in sequences]
        found.append(read_for_the_writer(model, sequences, read, BLOCKS))
    return found[0], found[1]


def retraining(model: PreTrainedModel, train: Reviews) -> WriterRetraining:
    """What trains the model's tail on these reviews."""
    tail = WriterTail(model, BLOCKS)
    require_gradients_only(tail, FEED_FORWARD)
    return WriterRetraining(tail, train, RECIPE)


def make(path: Path = BANK) -> None:
    """The bank, from `path` as far as it was made before. Raises as `fill`."""
    model, tokenizer = load_language_model()
    train, queries = reviews_and_queries(model, tokenizer)
    run = retraining(model, train)
    told = {"recipe": asdict(RECIPE), "design": asdict(DESIGN), "blocks": BLOCKS}
    told |= {"train_reviews": digest(train), "queries": digest(queries)}
    margins = torch.full((DESIGN.subsets, DESIGN.seeds, len(queries)), torch.nan)
    fill(
        path,
        told,
        DESIGN.membership(torch.zeros(len(train), dtype=torch.int64)),
        margins,
        lambda rows, seed: log_odds(run.run(rows, seed), queries),
    )


if __name__ == "__main__":
    make()
