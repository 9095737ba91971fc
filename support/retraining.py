"""The small part of a model that is trained again and again, above one frozen vector per review: what
everything below the part makes of [CLS]. Recipe, rows and seed, which orders them, decide a training.
"""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Reviews:
    """Reviews as the part sees them: `vectors` (reviews, width), `labels` (reviews,), and the texts. Of a
    model that writes, a vector and a label for each token: (reviews, tokens, width), (reviews, tokens)."""

    vectors: Float[Tensor, "reviews ..."]
    labels: Int[Tensor, "reviews ..."]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)


def read_vectors(
    model: ModelLogitsWrapper, dataset: ImdbDataset, place: nn.Module, progress: bool = False
) -> Reviews:
    """What arrives at `place`, a module of `model`, of every review: its vector of [CLS]."""
    seen: list[Tensor] = []
    by_length = torch.tensor(dataset.lengths()).argsort(stable=True)
    bar = tqdm(by_length.split(16), "reading reviews", unit="batch", disable=not progress)
    hook = place.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode(), hook:
        for rows in bar:
            model(dataset.batch(rows.tolist())[0])
    vectors = torch.cat([arrived[:, 0] if arrived.ndim == 3 else arrived for arrived in seen])
    return Reviews(vectors.float()[by_length.argsort()], dataset.labels, dataset.texts)


def read_for_the_tail(dataset: ImdbDataset, progress: bool = False) -> Reviews:
    """What a `ClassifierTail` of the packaged encoder is given of every review; read once, then cached."""
    tokens = b"".join(ids.numpy().tobytes() + b"." for ids in dataset.input_ids)
    path = cache_folder() / f"vectors-{hashlib.sha256(tokens).hexdigest()[:32]}.safetensors"
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


def in_parts(reviews: Reviews, sizes: Sequence[int]) -> list[Reviews]:
    """The reviews cut, in their order, into parts of these sizes."""
    return [select(reviews, rows) for rows in torch.arange(len(reviews)).split(list(sizes))]


def batches(reviews: Reviews) -> DataLoader:
    """All reviews as the engine takes them."""
    return DataLoader(TensorDataset(reviews.vectors, reviews.labels), batch_size=250)


class ClassifierTail(nn.Module):
    """The last feed-forward layers and the head, shared with `classifier`: vectors of [CLS] after the last
    attention → logits. Linear layers require gradients, the layer norm does not; in `eval()` mode."""

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
    return nn.Sequential(OrderedDict(pre_classifier=first, relu=nn.ReLU(), classifier=last)).eval()


@dataclass(frozen=True)
class Recipe:
    """AdamW with linear warm-up and decay. The last two tell of the part: its head was drawn from
    `head_seed`, and it was first trained on all the reviews for `trained_for` epochs."""

    epochs: int = 3
    learning_rate: float = 3e-4
    batch_size: int = 32
    warmup_share: float = 0.06
    weight_decay: float = 0.01
    head_seed: int = 0
    trained_for: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """The part on the way through training, after so many steps."""

    name: str
    step: int
    part: nn.Module

    def model(self) -> nn.Module:
        """A copy, free to be changed."""
        return copy.deepcopy(self.part)


class Retraining:
    """Trains one part, in place, on these reviews again and again from the same start. `rates` are the
    learning rates of the last run, step by step. Raises `ValueError` for no rows at all."""

    def __init__(self, part: nn.Module, reviews: Reviews, recipe: Recipe):
        self.part, self.reviews, self.recipe = part, reviews, recipe
        self.rates: list[float] = []
        self.start = copy.deepcopy(part.state_dict())

    def run(self, rows: Int[Tensor, " rows"], seed: int, without: int = -1) -> nn.Module:
        """The part after training on these rows; it is trained over by the next call. Row `without` is left
        out of the batches it would be in: all others keep their places. No row is −1."""
        *_, trained = self._steps(rows, seed, without)
        return trained

    def run_on_all(self, seed: int) -> nn.Module:
        """`run` on all reviews."""
        return self.run(torch.arange(len(self.reviews)), seed)

    def path(self, rows: Int[Tensor, " rows"], seed: int, shares: Iterable[float]) -> list[Checkpoint]:
        """Checkpoints of one run at these shares of its steps."""
        steps = self.recipe.epochs * -(-len(rows) // self.recipe.batch_size)
        wanted = {round(share * steps) for share in shares}
        return [
            Checkpoint(f"step {step} of {steps}", step, copy.deepcopy(part))
            for step, part in enumerate(self._steps(rows, seed))
            if step in wanted
        ]

    def loss(self, rows: Int[Tensor, " rows"]) -> Float[Tensor, ""]:
        """What a step on these rows makes smaller: their mean cross-entropy."""
        return nn.functional.cross_entropy(self.part(self.reviews.vectors[rows]), self.reviews.labels[rows])

    def margins(self, reviews: Reviews) -> Float[Tensor, " reviews"]:
        """`margins` of the part as it stands."""
        return margins(self.part, reviews)

    def _steps(self, rows: Tensor, seed: int, without: int = -1) -> Iterator[nn.Module]:
        """One training: the part before its first step, and after each."""
        if not len(rows):
            raise ValueError("There are no rows to train on.")
        self.part.load_state_dict(self.start)
        recipe, generator = self.recipe, torch.Generator().manual_seed(seed)
        trained = [p for p in self.part.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        shuffled = (rows[torch.randperm(len(rows), generator=generator)] for _ in range(recipe.epochs))
        whole = (batch for epoch in shuffled for batch in epoch.split(recipe.batch_size))
        batches = [left for batch in whole if len(left := batch[batch != without])]
        warmup = max(1, round(recipe.warmup_share * len(batches)))
        schedule = get_linear_schedule_with_warmup(optimizer, warmup, len(batches))
        self.rates = []
        yield self.part
        for batch in batches:
            self.loss(batch).backward()
            self.rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            yield self.part


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
