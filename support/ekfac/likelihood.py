"""The loss of a label, and the directions that make up the Fisher."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from support.ekfac.errors import LabelsMismatch, OutputsNotSupported


@runtime_checkable
class Likelihood(Protocol):
    """What the engine asks of a loss; write your own to bring another. Its `repr` names it with its
    settings: saved curvature is only loaded by an engine with the same one."""

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        """Raise `LabelsMismatch` when the labels don't fit."""

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """−log p(label | outputs) per example, up to a constant."""

    def fisher_directions(self, outputs: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        """Gradients d with respect to the outputs, `(batch, classes)` each, such that, example by
        example, Σ d dᵀ is the Fisher of the outputs, E_{y∼p}[∇loss ∇lossᵀ], or an unbiased estimate
        of it drawn from `generator`. Sent back through the model they give the Fisher of every layer,
        Σ vec G vec Gᵀ. Labels take no part in it."""

    def label_directions(self, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of a gradient d with respect to the outputs and weights `(batch, classes)`, such that
        the gradient of the loss of label c is Σ weights[:, c] · d. Raises `LabelsMismatch` when labels
        are not classes."""


@dataclass
class Categorical:
    """Softmax over the classes and cross-entropy: labels `(batch,)`, integers from 0.

    The Fisher is exact up to `exact_classes` classes: with two classes from one direction,
    √(p₀p₁)·(−1, 1), with C classes from C directions √p_c·(p − e_c). Above, it is estimated from
    `samples` labels per example, drawn from the model's own prediction.
    """

    exact_classes: int = 10
    samples: int = 1

    def check(self, outputs: Float[Tensor, "batch classes"], labels: Shaped[Tensor, "..."]) -> None:
        """Raise `LabelsMismatch` unless there is one integer label below `classes` per example."""
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
        self, outputs: Float[Tensor, "batch classes"], generator: torch.Generator
    ) -> Iterator[Float[Tensor, "batch classes"]]:
        """√p_c·(p − e_c) for every class c; one direction that says the same when there are two;
        (p − e_y)/√samples for every sampled label y when there are more than `exact_classes`."""
        probabilities = outputs.softmax(dim=1)
        classes = outputs.shape[1]
        if classes == 1:
            raise OutputsNotSupported(
                "The model has one output, and a softmax over one class is always 1. If it is a number, "
                "use likelihood=Gaussian(); for yes or no a model needs two outputs."
            )
        if classes > self.exact_classes:
            yield from self._sampled_directions(probabilities, generator)
        elif classes == 2:
            size = probabilities.prod(dim=1).sqrt()
            yield torch.stack([-size, size], dim=1)
        else:
            for probability, unit in zip(probabilities.T, _units(outputs), strict=True):
                yield probability.sqrt().unsqueeze(1) * (probabilities - unit)

    def _sampled_directions(self, probabilities: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        # Drawn where the generator lives, so that every device draws the same labels.
        drawn = torch.multinomial(
            probabilities.cpu().float(), self.samples, replacement=True, generator=generator
        ).to(probabilities.device)
        units = _units(probabilities)
        for labels in drawn.T:
            yield (probabilities - units[labels]) / self.samples**0.5

    def label_directions(
        self, outputs: Float[Tensor, "batch classes"]
    ) -> Iterator[tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]]:
        """(−1, 1) with weights (p₁, −p₀) for two classes; e_k with weights p_k − [k = c] for more."""
        probabilities = outputs.softmax(dim=1)
        units = _units(outputs)
        if outputs.shape[1] == 2:
            opposite = units[1] - units[0]
            weights = probabilities.flip(1) * -opposite
            yield opposite.expand_as(outputs), weights
            return
        for probability, unit in zip(probabilities.T, units, strict=True):
            yield unit.expand_as(outputs), probability.unsqueeze(1) - unit


@dataclass
class Gaussian:
    """Regression with unit variance: loss ½‖output − label‖², labels shaped like the outputs.

    Its Fisher with respect to the outputs is the identity, one direction per output.
    """

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
        self, outputs: Float[Tensor, "batch outputs"], generator: torch.Generator
    ) -> Iterator[Float[Tensor, "batch outputs"]]:
        """The unit vectors."""
        for unit in _units(outputs):
            yield unit.expand_as(outputs)

    def label_directions(self, outputs: Float[Tensor, "batch outputs"]) -> Iterator:
        """Raise `LabelsMismatch`: there are infinitely many labels."""
        raise LabelsMismatch("influences_by_label needs labels that are classes; a Gaussian's are numbers.")


def _units(outputs: Float[Tensor, "batch classes"]) -> Float[Tensor, "classes classes"]:
    return torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)


Directions = Callable[[Tensor, Tensor | None], Iterable[Tensor]]
"""What is sent back through the model for its outputs and their labels: gradients with respect to the
outputs, `(batch, classes)` each."""


def fisher_directions(likelihood: Likelihood, draws: torch.Generator) -> Directions:
    """The directions that make up the Fisher; `draws` gives the labels where they are sampled."""
    return lambda outputs, _: likelihood.fisher_directions(outputs, draws)


def loss_directions(likelihood: Likelihood) -> Directions:
    """One: the gradient of each example's loss. Raises `LabelsMismatch` as `check` does."""
    return lambda outputs, labels: [loss_direction(likelihood, outputs, labels)]


def loss_direction(
    likelihood: Likelihood, outputs: Float[Tensor, "batch classes"], labels: Shaped[Tensor, "..."] | None
) -> Float[Tensor, "batch classes"]:
    """The gradient of each example's loss with respect to its outputs.

    Raises `LabelsMismatch` as the likelihood's `check` does.
    """
    if labels is None:
        raise LabelsMismatch("There are no labels, but the gradient of a loss needs them.")
    likelihood.check(outputs, labels)
    leaf = outputs.detach().clone().requires_grad_()
    (direction,) = torch.autograd.grad(likelihood.loss(leaf, labels).sum(), leaf)
    return direction
