"""Training the tail of the classifier: on all reviews, on half of them, without some of them.

A run is decided by its recipe, its rows and its seed, which orders the reviews; nothing else is random.
"""

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from support.ekfac.training_path import Checkpoint
from support.fidelity.tail import ClassifierTail, Reviews, untrained_tail

State = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """AdamW with linear warm-up and decay, from the untrained head drawn from `head_seed`.

    `trained_for` epochs on all the reviews come first, so that a retraining can start from trained
    weights; 0 starts from the encoder as it comes.
    """

    epochs: int = 3
    learning_rate: float = 3e-4
    batch_size: int = 32
    warmup_share: float = 0.06
    weight_decay: float = 0.01
    head_seed: int = 0
    trained_for: int = 0

    def settings(self) -> dict[str, int | float]:
        """All of it, as plain numbers."""
        return asdict(self)


class Retraining:
    """Trains one tail again and again from the same start.

    `seed` of a run orders its reviews. Raises `ValueError` for no rows at all.
    """

    def __init__(self, reviews: Reviews, recipe: Recipe):
        self.reviews, self.recipe = reviews, recipe
        self.tail = untrained_tail(recipe.head_seed)
        self.start = copy.deepcopy(self.tail.state_dict())
        if recipe.trained_for:
            everything = torch.arange(len(reviews))
            self._train(everything, seed=0, epochs=recipe.trained_for, keep_at=())
            self.start = copy.deepcopy(self.tail.state_dict())

    def run(self, rows: Int[Tensor, " rows"], seed: int) -> ClassifierTail:
        """The tail after training on these rows; it is trained over by the next call."""
        self._train(rows, seed, self.recipe.epochs, keep_at=())
        return self.tail

    def path(
        self, rows: Int[Tensor, " rows"], seed: int, shares: Iterable[float]
    ) -> list[Checkpoint]:
        """Checkpoints of one run at these shares of its steps, weighted by the learning rate.

        A checkpoint's weight is the sum of the learning rates of the steps nearer to it than to any
        other checkpoint, as a share of the sum over the run.
        """
        steps = self.steps(len(rows))
        kept = sorted({round(share * steps) for share in shares})
        states, rates = self._train(rows, seed, self.recipe.epochs, keep_at=kept)
        weights = segment_weights(kept, rates)
        return [
            Checkpoint(f"step {step} of {steps}", self._tail_of(states[step]), weight)
            for step, weight in zip(kept, weights, strict=True)
        ]

    def steps(self, rows: int) -> int:
        """Number of steps of a run on that many rows."""
        return self.recipe.epochs * -(-rows // self.recipe.batch_size)

    def _tail_of(self, state: State):
        def tail() -> ClassifierTail:
            fresh = copy.deepcopy(self.tail)
            fresh.load_state_dict(state)
            return fresh

        return tail

    def _train(
        self, rows: Tensor, seed: int, epochs: int, keep_at: Iterable[int]
    ) -> tuple[dict[int, State], list[float]]:
        """States of the tail after the steps `keep_at`, and the learning rate of every step."""
        if not len(rows):
            raise ValueError("There are no rows to train on.")
        self.tail.load_state_dict(self.start)
        parameters = [p for p in self.tail.parameters() if p.requires_grad]
        recipe = self.recipe
        optimizer = torch.optim.AdamW(
            parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        batches = self._batches(rows, seed, epochs)
        schedule = get_linear_schedule_with_warmup(
            optimizer, max(1, round(recipe.warmup_share * len(batches))), len(batches)
        )
        states = {0: copy.deepcopy(self.start)} if 0 in keep_at else {}
        rates = []
        for step, batch in enumerate(batches, start=1):
            logits = self.tail(self.reviews.vectors[batch])
            nn.functional.cross_entropy(logits, self.reviews.labels[batch]).backward()
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step in keep_at:
                states[step] = copy.deepcopy(self.tail.state_dict())
        return states, rates

    def _batches(self, rows: Tensor, seed: int, epochs: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [
            batch
            for _ in range(epochs)
            for batch in rows[torch.randperm(len(rows), generator=generator)].split(
                self.recipe.batch_size
            )
        ]


def segment_weights(kept: list[int], rates: list[float]) -> list[float]:
    """Σ of the learning rates of the steps nearer to each kept step than to another, as shares of 1.

    Step s moves the weights from state s − 1 to state s; a step halfway between two kept states goes
    to the earlier one.
    """
    weights = [0.0] * len(kept)
    for before, rate in enumerate(rates):
        nearest = min(range(len(kept)), key=lambda number: abs(kept[number] - before))
        weights[nearest] += rate / sum(rates)
    return weights


def margins(tail: nn.Module, reviews: Reviews) -> Float[Tensor, " reviews"]:
    """Logit of each review's own label minus the logit of the other one."""
    with torch.no_grad():
        logits = tail(reviews.vectors)
    own = 2.0 * reviews.labels - 1
    return (logits[:, 1] - logits[:, 0]) * own


def losses(margins: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Cross-entropy of two classes: log(1 + e^−margin)."""
    return nn.functional.softplus(-margins)
