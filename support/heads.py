"""A classification head trained on what the frozen layers below it make of each review.

One training takes a second, so that it can be done over and over, with other labels and other reviews.
"""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from support.fidelity.retraining import Recipe, Retraining, margins
from support.fidelity.tail import Reviews
from support.imdb import ImdbDataset
from support.model import ModelLogitsWrapper

READ_AT_A_TIME = 16
LEARNING_RATE = 1e-3


def read_with(model: ModelLogitsWrapper, dataset: ImdbDataset, progress: bool = False) -> Reviews:
    """What the layers below the head of `model` make of each review: its vector of [CLS]."""
    seen: list[Tensor] = []
    hook = model.model.pre_classifier.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0])
    )
    by_length = torch.tensor(dataset.lengths()).argsort(stable=True)
    batches = by_length.split(READ_AT_A_TIME)
    try:
        with torch.inference_mode():
            for rows in tqdm(batches, "reading reviews", unit="batch", disable=not progress):
                model(dataset.batch(rows.tolist())[0])
    finally:
        hook.remove()
    vectors = torch.empty(len(dataset), seen[0].shape[1])
    vectors[by_length] = torch.cat(seen).float()
    return Reviews(vectors, dataset.labels, dataset.texts)


def select(reviews: Reviews, rows: Shaped[Tensor, " rows"]) -> Reviews:
    """These reviews: rows in this order, or a mask."""
    rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
    texts = [reviews.texts[row] for row in rows.tolist()]
    return Reviews(reviews.vectors[rows], reviews.labels[rows], texts)


def joined(one: Reviews, other: Reviews) -> Reviews:
    """The reviews of both, one after the other."""
    return Reviews(
        torch.cat([one.vectors, other.vectors]),
        torch.cat([one.labels, other.labels]),
        [*one.texts, *other.texts],
    )


def in_parts(reviews: Reviews, sizes: Sequence[int]) -> list[Reviews]:
    """The reviews cut, in their order, into parts of these sizes."""
    return [select(reviews, rows) for rows in torch.arange(len(reviews)).split(list(sizes))]


class Head(nn.Module):
    """A classification head as DistilBERT has it, untrained: `(batch, width)` → `(batch, 2)`."""

    def __init__(self, width: int, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.pre_classifier = nn.Linear(width, width)
            self.classifier = nn.Linear(width, 2)
        for layer in (self.pre_classifier, self.classifier):  # as transformers starts a new head
            nn.init.normal_(layer.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
            nn.init.zeros_(layer.bias)
        self.eval()

    def forward(self, vectors: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        return self.classifier(self.pre_classifier(vectors).relu())


class HeadTraining(Retraining):
    """Trains a classification head alone for so many epochs, again and again from the same start.

    `seed` of a run orders its reviews. Raises `ValueError` for no rows at all.
    """

    def __init__(self, reviews: Reviews, epochs: int):
        # Not the parent's: it would load the encoder, whose vectors are in `reviews` already.
        self.reviews = reviews
        self.recipe = Recipe(epochs, LEARNING_RATE)
        self.tail = Head(reviews.vectors.shape[1], self.recipe.head_seed)
        self.start = copy.deepcopy(self.tail.state_dict())

    def run(self, rows: Int[Tensor, " rows"], seed: int) -> Head:
        """The head after training on these rows; it is trained over by the next call."""
        self._train(rows, seed, self.recipe.epochs, keep_at=())
        return self.tail

    def run_on_all(self, seed: int) -> Head:
        """`run` on all reviews."""
        return self.run(torch.arange(len(self.reviews)), seed)


def accuracy(head: nn.Module, reviews: Reviews) -> float:
    """Share of the reviews whose own label gets the larger logit."""
    return (margins(head, reviews) > 0).float().mean().item()


def batches(reviews: Reviews) -> DataLoader:
    """All reviews as the engine takes them."""
    return DataLoader(TensorDataset(reviews.vectors, reviews.labels), batch_size=250)
