"""Likelihoods of models that say something at every token: which comes next, or of which class it is.

Outputs are `(batch, positions, vocabulary)`, labels `(batch, positions)` as Hugging Face has them: a class
for each token, −100 where nothing is asked; for a model that writes the token itself, compared with what
the model said one position before. Logits are the largest thing there is, so probabilities are taken some
positions at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from support.ekfac.batches import IGNORED
from support.ekfac.draws import Draws, labels_of
from support.ekfac.errors import LabelsMismatch, OutputsNotSupported
from support.ekfac.likelihood import Likelihood

POSITIONS_AT_A_TIME = 64


@dataclass
class NextToken(Likelihood):
    """Softmax over the vocabulary at every target: the loss of an example is Σ −log p(token | before) over
    its targets, in nats, or their mean.

    Its Fisher is estimated from `samples` texts of labels, one drawn at every target from the model's own
    prediction (Grosse et al. 2023, §2); what one target adds to another vanishes in the mean. An example
    without targets has no gradient and no say.
    """

    fits_on_labels: ClassVar[bool] = True

    shift: ClassVar[int] = 1
    """How many positions a target stands behind the output that is to say it."""

    samples: int = 1
    mean: bool = False

    def check(self, outputs: Tensor, labels: Shaped[Tensor, "..."] | None) -> None:
        """Raise `OutputsNotSupported` for outputs that are no logits of a text, `LabelsMismatch` unless
        there is one label per position, −100 or a token that the model knows."""
        if outputs.ndim != 3:
            raise OutputsNotSupported(
                f"The model returned shape {tuple(outputs.shape)}; next tokens want (batch, positions, "
                "vocabulary). For a classifier use likelihood=Categorical()."
            )
        if labels is None:
            raise LabelsMismatch(
                "Next tokens need labels, at a fit too, to know what is asked: a mapping that holds labels, "
                f"the input_ids with {IGNORED} at padding and wherever nothing is asked."
            )
        if labels.shape != outputs.shape[:2] or labels.is_floating_point():
            raise LabelsMismatch(
                f"Labels are {labels.dtype} of shape {tuple(labels.shape)}, expected whole numbers of shape "
                f"{tuple(outputs.shape[:2])}: one for each position."
            )
        known = (labels == IGNORED) | ((labels >= 0) & (labels < outputs.shape[2]))
        if not known.all():
            raise LabelsMismatch(
                f"Label {labels[~known][0].item()} is neither {IGNORED} nor one of the {outputs.shape[2]} "
                "tokens that the model knows."
            )

    def asked(self, labels: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """The labels without what would be said at padding, as the first token of a text padded on the left.

        Raises `LabelsMismatch` when a label stands where the mask has padding."""
        if labels is None or mask is None or labels.shape != mask.shape:
            return labels
        wrong = ((labels != IGNORED) & ~mask).nonzero()
        if len(wrong):
            row, place = wrong[0].tolist()
            raise LabelsMismatch(
                f"Row {row} of a block has label {labels[row, place].item()} at position {place}, which its "
                f"attention_mask calls padding. Put {IGNORED} there, or mend the mask."
            )
        before = torch.nn.functional.pad(mask, (self.shift, 0), value=True)[:, : mask.shape[1]]
        return labels.masked_fill(~before, IGNORED)

    def unasked(self, labels: Tensor) -> Bool[Tensor, " batch"]:
        """Which examples have no target."""
        return (labels[:, self.shift :] == IGNORED).all(dim=1)

    def loss(
        self, outputs: Float[Tensor, "batch ..."], labels: Shaped[Tensor, "batch ..."]
    ) -> Float[Tensor, " batch"]:
        """Σ −log p over the targets of each example, or their mean."""
        targets = _Targets(labels, self.shift)
        result = outputs.new_zeros(len(outputs))
        for part in targets.parts():
            logits = outputs[targets.example[part], targets.position[part]]
            loss = torch.nn.functional.cross_entropy(logits, targets.token[part], reduction="none")
            result = result.index_add(0, targets.example[part], loss * self._weights(targets, outputs)[part])
        return result

    def loss_direction(
        self, outputs: Float[Tensor, "batch ..."], labels: Shaped[Tensor, "batch ..."]
    ) -> Float[Tensor, "batch positions vocabulary"]:
        """p − e_token at the place before each target. Raises as `check` does."""
        self.check(outputs, labels)
        targets = _Targets(labels, self.shift)
        return self._direction(outputs, targets, targets.token, 1.0)

    def fisher_directions(
        self,
        outputs: Float[Tensor, "batch ..."],
        draws: Draws,
        labels: Shaped[Tensor, "batch ..."] | None = None,
    ) -> Iterator[Float[Tensor, "batch positions vocabulary"]]:
        """(p − e_y)/√samples for every sampled text y; of the labels only the places matter."""
        self.check(outputs, labels)
        targets = _Targets(labels, self.shift)
        if not len(targets.token):
            yield torch.zeros_like(outputs)
            return
        tokens = torch.empty(self.samples, len(targets.token), dtype=torch.int64, device=outputs.device)
        ends = targets.count.cumsum(dim=0).tolist()
        for source, end, count in zip(draws(), ends, targets.count.tolist(), strict=True):
            for part in _parts(end - count, end):
                logits = outputs[targets.example[part], targets.position[part]]
                for number in range(self.samples):
                    tokens[number, part] = labels_of(logits, source)
        for token in tokens:
            yield self._direction(outputs, targets, token, self.samples**-0.5)

    def _direction(self, outputs: Tensor, targets: "_Targets", token: Tensor, scale: float) -> Tensor:
        direction = torch.zeros_like(outputs)
        weights = scale * self._weights(targets, outputs)
        for part in targets.parts():
            places = targets.example[part], targets.position[part]
            probabilities = outputs[places].softmax(dim=1)
            probabilities[torch.arange(len(probabilities)), token[part]] -= 1
            direction[places] = probabilities * weights[part, None]
        return direction

    def _weights(self, targets: "_Targets", outputs: Tensor) -> Float[Tensor, " targets"]:
        count = targets.count[targets.example].to(outputs.dtype)
        return 1 / count if self.mean else torch.ones_like(count)


class EachToken(NextToken):
    """Softmax over the classes of every token, as token classifiers have it; all else as `NextToken`."""

    shift = 0


class _Targets:
    """Where something is asked, example by example: the position of the output that is to say it, and the
    token; and how many targets each example has."""

    def __init__(self, labels: Int[Tensor, "batch positions"], shift: int):
        labels = labels[:, shift:]
        asked = labels != IGNORED
        self.example, self.position = asked.nonzero(as_tuple=True)
        self.token = labels[asked].long()
        self.count = asked.sum(dim=1)

    def parts(self) -> list[slice]:
        return _parts(0, len(self.token))


def _parts(start: int, end: int) -> list[slice]:
    starts = range(start, end, POSITIONS_AT_A_TIME)
    return [slice(one, min(one + POSITIONS_AT_A_TIME, end)) for one in starts]
