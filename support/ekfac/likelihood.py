"""The loss of a label, and the directions that make up the Fisher."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from support.ekfac.draws import Draws, labels_of
from support.ekfac.errors import LabelsMismatch, OutputsNotSupported


@runtime_checkable
class Likelihood(Protocol):
    """What the engine asks of a loss; write your own to bring another. Its `repr` names it with its
    settings: saved curvature is only loaded by an engine with the same one."""

    fits_on_labels: ClassVar[bool] = False
    """Whether labels say where something is asked, so that a fit wants them too."""

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """Raise `LabelsMismatch` when the labels don't fit."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """−log p(label | outputs) per example, up to a constant."""

    def asked(self, labels: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """The labels, as `loss_direction` and `fisher_directions` take them, of inputs with this mask."""
        return labels

    def unasked(self, labels: Tensor) -> Tensor:
        """Which examples nothing is asked of."""
        return torch.zeros(len(labels), dtype=torch.bool)

    def loss_direction(self, outputs: Tensor, labels: Tensor | None) -> Tensor:
        """The gradient of each example's loss with respect to its outputs. Raises as `check` does."""
        if labels is None:
            raise LabelsMismatch("There are no labels, but the gradient of a loss needs them.")
        self.check(outputs, labels)
        leaf = outputs.detach().clone().requires_grad_()
        (direction,) = torch.autograd.grad(self.loss(leaf, labels).sum(), leaf)
        return direction

    def fisher_directions(
        self, outputs: Tensor, draws: Draws, labels: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Gradients d with respect to the outputs, `(batch, classes)` each, such that, example by
        example, Σ d dᵀ is the Fisher of the outputs, E_{y∼p}[∇loss ∇lossᵀ], or an unbiased estimate
        of it from each example's own random numbers. Sent back through the model they give the Fisher
        of every layer, Σ vec G vec Gᵀ. Labels take no part in it but where they say what is asked."""

    def label_directions(self, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of a gradient d with respect to the outputs and weights `(batch, classes)`, such that
        the gradient of the loss of label c is Σ weights[:, c] · d. Raises `LabelsMismatch` when labels
        are not classes, as here."""
        raise LabelsMismatch(
            f"influences_by_label needs labels that are classes; those of a {type(self).__name__} are not."
        )


@dataclass
class Categorical(Likelihood):
    """Softmax over the classes and cross-entropy: labels `(batch,)`, integers from 0.

    The Fisher is exact up to `exact_classes` classes: with two classes from one direction,
    √(p₀p₁)·(−1, 1), with C classes from C directions √p_c·(p − e_c). Above, it is estimated from
    `samples` labels per example, drawn from the model's own prediction.
    """

    exact_classes: int = 10
    samples: int = 1

    def check(self, outputs: Float[Tensor, "batch ..."], labels: Shaped[Tensor, "..."]) -> None:
        """Raise `LabelsMismatch` unless there is one integer label below `classes` per example."""
        _refuse_unless_rows(outputs)
        examples, classes = outputs.shape
        if labels.shape != (examples,):
            raise LabelsMismatch(
                f"Labels have shape {tuple(labels.shape)}, expected ({examples},): one per example."
            )
        if labels.is_floating_point() or labels.is_complex():
            raise LabelsMismatch(f"Labels are {labels.dtype}; classes are whole numbers. Use labels.long().")
        labels = labels.long()
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise LabelsMismatch(
                f"Label {wrong[0].item()} is outside the model's classes 0 to {classes - 1}."
            )

    def loss(
        self, outputs: Float[Tensor, "batch classes"], labels: Shaped[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """−log p(label), per example."""
        return nn.functional.cross_entropy(outputs, labels.long(), reduction="none")

    def fisher_directions(
        self, outputs: Float[Tensor, "batch ..."], draws: Draws, labels: Tensor | None = None
    ) -> Iterator[Float[Tensor, "batch classes"]]:
        """√p_c·(p − e_c) for every class c; one direction that says the same when there are two;
        (p − e_y)/√samples for every sampled label y when there are more than `exact_classes`."""
        _refuse_unless_rows(outputs)
        probabilities = outputs.softmax(dim=1)
        classes = outputs.shape[1]
        if classes == 1:
            raise OutputsNotSupported(
                "The model has one output, and a softmax over one class is always 1. If it is a number, "
                "use likelihood=Gaussian(); for yes or no, likelihood=Bernoulli()."
            )
        if classes > self.exact_classes:
            sampled = [
                labels_of(row.expand(self.samples, classes), source)
                for row, source in zip(outputs, draws(), strict=True)
            ]
            for label in torch.stack(sampled, dim=1):
                yield (probabilities - _units(outputs, label)) / self.samples**0.5
        elif classes == 2:
            size = probabilities.prod(dim=1).sqrt()
            yield torch.stack([-size, size], dim=1)
        else:
            for label, probability in enumerate(probabilities.T):
                yield probability.sqrt().unsqueeze(1) * (probabilities - _units(outputs, label))

    def label_directions(
        self, outputs: Float[Tensor, "batch classes"]
    ) -> Iterator[tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]]:
        """(−1, 1) with weights (p₁, −p₀) for two classes; e_k with weights p_k − [k = c] for more."""
        probabilities = outputs.softmax(dim=1)
        if outputs.shape[1] == 2:
            opposite = _units(outputs, 1) - _units(outputs, 0)
            yield opposite, probabilities.flip(1) * -opposite
            return
        for label, probability in enumerate(probabilities.T):
            unit = _units(outputs, label)
            yield unit, probability.unsqueeze(1) - unit


@dataclass
class Gaussian(Likelihood):
    """Regression with unit variance: loss ½‖output − label‖², labels shaped like the outputs.

    Its Fisher with respect to the outputs is the identity, one direction per output.
    """

    def asked(self, labels: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """A number for each example is a label for the one output."""
        return labels.unsqueeze(1) if labels is not None and labels.ndim == 1 else labels

    def check(self, outputs: Float[Tensor, "batch outputs"], labels: Shaped[Tensor, "..."]) -> None:
        """Raise `LabelsMismatch` unless labels and outputs have the same shape."""
        if labels.shape != outputs.shape:
            raise LabelsMismatch(
                f"Labels have shape {tuple(labels.shape)}, outputs {tuple(outputs.shape)}: they must agree."
            )

    def loss(
        self, outputs: Float[Tensor, "batch outputs"], labels: Float[Tensor, "batch outputs"]
    ) -> Float[Tensor, " batch"]:
        """½‖output − label‖², per example."""
        return (outputs - labels).square().sum(dim=1) / 2

    def fisher_directions(
        self, outputs: Float[Tensor, "batch ..."], draws: Draws, labels: Tensor | None = None
    ) -> Iterator[Float[Tensor, "batch outputs"]]:
        """The unit vectors."""
        _refuse_unless_rows(outputs)
        return (_units(outputs, number) for number in range(outputs.shape[1]))


@dataclass
class Bernoulli(Likelihood):
    """Yes or no for each output by itself, several labels at once or one: the loss is Σ cross-entropy
    of sigmoids over the outputs, labels are shaped like the outputs, each from 0 to 1.

    The Fisher with respect to the outputs is diagonal, p(1 − p): exact from one direction per output
    up to `exact_outputs` of them, above from one draw of all labels at once.
    """

    exact_outputs: int = 10

    asked = Gaussian.asked

    def check(self, outputs: Float[Tensor, "batch outputs"], labels: Shaped[Tensor, "..."]) -> None:
        """Raise `LabelsMismatch` unless labels are shaped like the outputs and from 0 to 1."""
        if labels.shape != outputs.shape:
            raise LabelsMismatch(
                f"Labels have shape {tuple(labels.shape)}, outputs {tuple(outputs.shape)}: they must agree."
            )
        wrong = labels[~((labels >= 0) & (labels <= 1))]
        if len(wrong):
            raise LabelsMismatch(f"Label {wrong[0].item()} is not from 0 to 1, no to yes.")

    def loss(
        self, outputs: Float[Tensor, "batch outputs"], labels: Shaped[Tensor, "batch outputs"]
    ) -> Float[Tensor, " batch"]:
        """−log p(labels), per example."""
        labels = labels.to(outputs)
        return nn.functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none").sum(dim=1)

    def fisher_directions(
        self, outputs: Float[Tensor, "batch ..."], draws: Draws, labels: Tensor | None = None
    ) -> Iterator[Float[Tensor, "batch outputs"]]:
        """√(p_k (1 − p_k)) e_k for every output k, or p − y for sampled labels y."""
        _refuse_unless_rows(outputs)
        probabilities = outputs.sigmoid()
        if outputs.shape[1] > self.exact_outputs:
            uniform = [
                torch.rand(outputs.shape[1], generator=source, device=source.device) for source in draws()
            ]
            yield probabilities - (torch.stack(uniform).to(outputs) < probabilities).to(outputs)
            return
        size = (probabilities * (1 - probabilities)).sqrt()
        for number in range(outputs.shape[1]):
            yield size * _units(outputs, number)


def refuse_no_logits(outputs: object, examples: int, depend: bool) -> None:
    """Raise `OutputsNotSupported` unless they are a tensor with a row for each of so many examples, and, if
    they must `depend` on a tracked layer, do."""
    if not isinstance(outputs, Tensor):
        raise OutputsNotSupported(
            f"The model returned a {type(outputs).__name__}, but the engine wants a tensor of logits, "
            "(batch, classes). Wrap the model in a module that returns them."
        )
    if outputs.ndim not in (2, 3) or len(outputs) != examples:
        raise OutputsNotSupported(
            f"The model returned shape {tuple(outputs.shape)} for a batch of {examples}, but the "
            "engine wants (batch, classes): one row of logits per example; or, of a model that writes, "
            "(batch, positions, vocabulary)."
        )
    if depend and not outputs.requires_grad:
        raise OutputsNotSupported(
            "The model's outputs don't depend on any tracked layer. Is there a detach() or a "
            "torch.no_grad() in its forward pass?"
        )


def _refuse_unless_rows(outputs: Tensor) -> None:
    if outputs.ndim != 2:
        raise OutputsNotSupported(
            f"The model returned shape {tuple(outputs.shape)}, but this likelihood wants (batch, classes). "
            "For a model that writes, (batch, positions, vocabulary), use likelihood=NextToken()."
        )


def _units(outputs: Float[Tensor, "batch classes"], label: int | Tensor) -> Float[Tensor, "batch classes"]:
    """e_label for every example."""
    found = torch.zeros_like(outputs)
    found[torch.arange(len(outputs), device=outputs.device), label] = 1
    return found


Directions = Callable[[Tensor, Tensor | None, Tensor | None, Draws], Iterable[Tensor]]
"""What is sent back through the model for its outputs, their labels and the inputs' mask: gradients with
respect to the outputs, as these are shaped."""


def fisher_directions(likelihood: Likelihood) -> Directions:
    """The directions that make up the Fisher."""
    return lambda outputs, labels, mask, draws: likelihood.fisher_directions(
        outputs, draws, likelihood.asked(labels, mask)
    )


def loss_directions(likelihood: Likelihood) -> Directions:
    """One: the gradient of each example's loss. Raises `LabelsMismatch` as `check` does."""
    return lambda outputs, labels, mask, _: [
        likelihood.loss_direction(outputs, likelihood.asked(labels, mask))
    ]
