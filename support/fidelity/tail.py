"""The part of the packaged classifier that is cheap to train again: its last block and its head.

Everything up to the last block's attention is frozen, so what arrives at its feed-forward layers is the
same in every retraining and is computed once. Only the vector of [CLS] goes on to the head, so that one
vector per review is all there is to keep.
"""

import hashlib
import os
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DistilBertForSequenceClassification

from support.curvature_cache import cache_folder
from support.imdb import ImdbDataset
from support.model import ModelLogitsWrapper, packaged_encoder, require_gradients_only

READ_AT_A_TIME = 16


class ClassifierTail(nn.Module):
    """`(batch, width)` vectors of [CLS] after the last attention → logits `(batch, classes)`.

    Shares its layers with `classifier`. Layer names: `ffn.lin1`, `ffn.lin2`, `pre_classifier`,
    `classifier`; they require gradients, the layer norm does not. In `eval()` mode.
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
    """The tail of the packaged encoder as it comes, under a head drawn from `head_seed`."""
    return ClassifierTail(packaged_encoder(head_seed))


@dataclass(frozen=True)
class Reviews:
    """Reviews as the tail sees them: `vectors` (reviews, width), `labels` (reviews,), and the texts."""

    vectors: Float[Tensor, "reviews width"]
    labels: Int[Tensor, " reviews"]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def digest(self) -> str:
        """A name for exactly these texts, in this order, with these labels."""
        digest = hashlib.sha256(self.labels.numpy().tobytes())
        for text in self.texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        return digest.hexdigest()[:16]


def read_reviews(dataset: ImdbDataset, progress: bool = False) -> Reviews:
    """The frozen layers of the packaged encoder applied to every review, once: then from the cache."""
    path = cache_folder() / f"vectors-{_digest(dataset)}.safetensors"
    if not path.exists():
        vectors = _vectors(dataset, progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        save_file({"vectors": vectors}, partial)
        partial.replace(path)
    return Reviews(load_file(path)["vectors"], dataset.labels, dataset.texts)


def _vectors(dataset: ImdbDataset, progress: bool) -> Float[Tensor, "reviews width"]:
    classifier = packaged_encoder().eval()
    seen: list[Tensor] = []
    classifier.distilbert.transformer.layer[-1].ffn.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0][:, 0])
    )
    by_length = torch.tensor(dataset.lengths()).argsort(stable=True)
    model = ModelLogitsWrapper(classifier)
    with torch.inference_mode():
        for rows in tqdm(
            by_length.split(READ_AT_A_TIME), "reading reviews", unit="batch", disable=not progress
        ):
            model(dataset.batch(rows.tolist())[0])
    vectors = torch.empty(len(dataset), seen[0].shape[1])
    vectors[by_length] = torch.cat(seen)
    return vectors


def _digest(dataset: ImdbDataset) -> str:
    digest = hashlib.sha256()
    for ids in dataset.input_ids:
        digest.update(ids.numpy().tobytes() + b".")
    return digest.hexdigest()[:32]
