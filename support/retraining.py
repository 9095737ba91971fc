"""Frozen vectors, and the small part of a model above them that is trained again and again.

What everything below the part makes of a review is computed once: one vector, that of [CLS]. A training
is then decided by its recipe, its rows and its seed, which orders the reviews; nothing else is random.
"""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int, Shaped
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm
from transformers import DistilBertForSequenceClassification, get_linear_schedule_with_warmup

from support.cache import cache_folder
from support.ekfac.storage import replacing
from support.imdb import ImdbDataset
from support.model import ModelLogitsWrapper, packaged_encoder, require_gradients_only

State = dict[str, Tensor]


@dataclass(frozen=True)
class Reviews:
    """Reviews as the part sees them: `vectors` (reviews, width), `labels` (reviews,), and the texts."""

    vectors: Float[Tensor, "reviews width"]
    labels: Int[Tensor, " reviews"]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)


def read_vectors(
    model: ModelLogitsWrapper, dataset: ImdbDataset, place: nn.Module, progress: bool = False
) -> Reviews:
    """What arrives at `place`, a module of `model`, of every review: its vector of [CLS]."""
    seen: list[Tensor] = []
    hook = place.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0][:, 0] if inputs[0].ndim == 3 else inputs[0])
    )
    by_length = torch.tensor(dataset.lengths()).argsort(stable=True)
    bar = tqdm(by_length.split(16), "reading reviews", unit="batch", disable=not progress)
    try:
        with torch.inference_mode():
            for rows in bar:
                model(dataset.batch(rows.tolist())[0])
    finally:
        hook.remove()
    vectors = torch.empty(len(dataset), seen[0].shape[1])
    vectors[by_length] = torch.cat(seen).float()
    return Reviews(vectors, dataset.labels, dataset.texts)


def read_for_the_tail(dataset: ImdbDataset, progress: bool = False) -> Reviews:
    """What a `ClassifierTail` of the packaged encoder is given of every review; read once, then cached."""
    digest = hashlib.sha256()
    for ids in dataset.input_ids:
        digest.update(ids.numpy().tobytes() + b".")
    path = cache_folder() / f"vectors-{digest.hexdigest()[:32]}.safetensors"
    if not path.exists():
        encoder = packaged_encoder().eval()
        place = encoder.distilbert.transformer.layer[-1].ffn
        read = read_vectors(ModelLogitsWrapper(encoder), dataset, place, progress)
        with replacing(path) as fresh:
            save_file({"vectors": read.vectors}, fresh)
    return Reviews(load_file(path)["vectors"], dataset.labels, dataset.texts)


def select(reviews: Reviews, rows: Shaped[Tensor, " rows"]) -> Reviews:
    """These reviews: rows in this order, or a mask."""
    rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
    texts = [reviews.texts[row] for row in rows.tolist()]
    return Reviews(reviews.vectors[rows], reviews.labels[rows], texts)


def joined(one: Reviews, other: Reviews) -> Reviews:
    """The reviews of both, one after the other."""
    vectors = torch.cat([one.vectors, other.vectors])
    return Reviews(vectors, torch.cat([one.labels, other.labels]), [*one.texts, *other.texts])


def in_parts(reviews: Reviews, sizes: Sequence[int]) -> list[Reviews]:
    """The reviews cut, in their order, into parts of these sizes."""
    return [select(reviews, rows) for rows in torch.arange(len(reviews)).split(list(sizes))]


def batches(reviews: Reviews) -> DataLoader:
    """All reviews as the engine takes them."""
    return DataLoader(TensorDataset(reviews.vectors, reviews.labels), batch_size=250)


class ClassifierTail(nn.Module):
    """The last feed-forward layers and the head: vectors of [CLS] after the last attention → logits.

    Shares its layers with `classifier`; the linear ones require gradients, the layer norm does not.
    In `eval()` mode.
    """

    def __init__(self, classifier: DistilBertForSequenceClassification):
        super().__init__()
        last = classifier.distilbert.transformer.layer[-1]
        self.ffn, self.norm = last.ffn, last.output_layer_norm
        self.pre_classifier, self.classifier = classifier.pre_classifier, classifier.classifier
        require_gradients_only(self)
        self.eval()

    def forward(self, vectors: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        mixed = self.norm(self.ffn(vectors) + vectors)
        return self.classifier(self.pre_classifier(mixed).relu())


def untrained_tail(head_seed: int = 0) -> ClassifierTail:
    """The tail of the packaged encoder under a head drawn from `head_seed`."""
    return ClassifierTail(packaged_encoder(head_seed))


def untrained_head(width: int, seed: int = 0) -> nn.Sequential:
    """A classification head as DistilBERT has it, drawn from `seed`: `(batch, width)` → `(batch, 2)`."""
    first, last = (nn.utils.skip_init(nn.Linear, width, size) for size in (width, 2))
    for layer in (first, last):  # as transformers starts a new head
        nn.init.normal_(layer.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(layer.bias)
    layers = OrderedDict(pre_classifier=first, relu=nn.ReLU(), classifier=last)
    return nn.Sequential(layers).eval()


@dataclass(frozen=True)
class Recipe:
    """AdamW with linear warm-up and decay, from a part whose head was drawn from `head_seed` and that was
    first trained on all the reviews for `trained_for` epochs."""

    epochs: int = 3
    learning_rate: float = 3e-4
    batch_size: int = 32
    warmup_share: float = 0.06
    weight_decay: float = 0.01
    head_seed: int = 0
    trained_for: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A state on the way through training, after so many steps; `model` makes it."""

    name: str
    model: Callable[[], nn.Module]
    step: int


class Retraining:
    """Trains one part, in place, on these reviews again and again from the same start. `rates` are the
    learning rates of the last run, step by step. Raises `ValueError` for no rows at all."""

    def __init__(self, part: nn.Module, reviews: Reviews, recipe: Recipe):
        self.part, self.reviews, self.recipe = part, reviews, recipe
        self.rates: list[float] = []
        self.start = copy.deepcopy(part.state_dict())
        if recipe.trained_for:
            self._train(torch.arange(len(reviews)), seed=0, epochs=recipe.trained_for)
            self.start = copy.deepcopy(part.state_dict())

    def run(self, rows: Int[Tensor, " rows"], seed: int, without: int = -1) -> nn.Module:
        """The part after training on these rows; it is trained over by the next call.

        Row `without` is left out of the batches it would be in: all others keep their places. No row is −1.
        """
        self._train(rows, seed, self.recipe.epochs, without=without)
        return self.part

    def run_on_all(self, seed: int) -> nn.Module:
        """`run` on all reviews."""
        return self.run(torch.arange(len(self.reviews)), seed)

    def path(self, rows: Int[Tensor, " rows"], seed: int, shares: Iterable[float]) -> list[Checkpoint]:
        """Checkpoints of one run at these shares of its steps."""
        steps = self.recipe.epochs * -(-len(rows) // self.recipe.batch_size)
        kept = sorted({round(share * steps) for share in shares})
        states = self._train(rows, seed, self.recipe.epochs, keep_at=kept)
        return [
            Checkpoint(f"step {step} of {steps}", partial(self._part_in, states[step]), step) for step in kept
        ]

    def _part_in(self, state: State) -> nn.Module:
        fresh = copy.deepcopy(self.part)
        fresh.load_state_dict(state)
        return fresh

    def _train(
        self, rows: Tensor, seed: int, epochs: int, keep_at: Sequence[int] = (), without: int = -1
    ) -> dict[int, State]:
        """States of the part after the steps `keep_at`."""
        if not len(rows):
            raise ValueError("There are no rows to train on.")
        self.part.load_state_dict(self.start)
        recipe, generator = self.recipe, torch.Generator().manual_seed(seed)
        trained = [p for p in self.part.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, recipe.learning_rate, weight_decay=recipe.weight_decay)
        shuffled = (rows[torch.randperm(len(rows), generator=generator)] for _ in range(epochs))
        whole = (batch for epoch in shuffled for batch in epoch.split(recipe.batch_size))
        batches = [left for batch in whole if len(left := batch[batch != without])]
        warmup = max(1, round(recipe.warmup_share * len(batches)))
        schedule = get_linear_schedule_with_warmup(optimizer, warmup, len(batches))
        states = {0: copy.deepcopy(self.start)} if 0 in keep_at else {}
        self.rates = []
        for step, batch in enumerate(batches, start=1):
            logits = self.part(self.reviews.vectors[batch])
            nn.functional.cross_entropy(logits, self.reviews.labels[batch]).backward()
            self.rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step in keep_at:
                states[step] = copy.deepcopy(self.part.state_dict())
        return states


def margins(part: nn.Module, reviews: Reviews) -> Float[Tensor, " reviews"]:
    """Logit of each review's own label minus the logit of the other one."""
    with torch.no_grad():
        logits = part(reviews.vectors)
    return (logits[:, 1] - logits[:, 0]) * (2.0 * reviews.labels - 1)


def losses(margins: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Cross-entropy of two classes: log(1 + e^−margin)."""
    return nn.functional.softplus(-margins)


def accuracy(part: nn.Module, reviews: Reviews) -> float:
    """Share of the reviews whose own label gets the larger logit."""
    return (margins(part, reviews) > 0).float().mean().item()
