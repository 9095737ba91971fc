"""The loss of a label, and the directions that make up the Fisher.

A likelihood is one small object with three methods; write your own to bring another loss:

`check(outputs, labels)`
    raises `LabelsMismatch` when the labels don't fit.
`loss(outputs, labels)`
    −log p(label | outputs) per example, up to a constant.
`fisher_directions(outputs)`
    yields gradients d with respect to the outputs, `(batch, classes)` each, such that, example by
    example, Σ d dᵀ is the Fisher of the outputs, E_{y∼p}[∇loss ∇lossᵀ]. Sent back through the model
    they give Σ vec G vec Gᵀ = E_{y∼p}[vec G vec Gᵀ] for every layer. Labels take no part in it.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from support.ekfac.errors import LabelsMismatch


@runtime_checkable
class Likelihood(Protocol):
    """What the engine asks of a loss; see the module's docstring."""

    def check(self, outputs: Tensor, labels: Tensor) -> None: ...

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor: ...

    def fisher_directions(self, outputs: Tensor) -> Iterator[Tensor]: ...


class Categorical:
    """Softmax over the classes and cross-entropy: labels `(batch,)`, integers from 0.

    The Fisher is exact: with two classes from one direction, √(p₀p₁)·(−1, 1), with C classes from C
    directions √p_c·(p − e_c).
    """

    def check(self, outputs: Float[Tensor, "batch classes"], labels: Shaped[Tensor, "..."]) -> None:
        """Raise `LabelsMismatch` unless there is one integer label below `classes` per example."""
        examples, classes = outputs.shape
        if labels.shape != (examples,):
            raise LabelsMismatch(
                f"Labels have shape {tuple(labels.shape)}, expected ({examples},): one per example."
            )
        if labels.is_floating_point() or labels.is_complex():
            raise LabelsMismatch(
                f"Labels are {labels.dtype}; classes are whole numbers. Use labels.long()."
            )
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
        self, outputs: Float[Tensor, "batch classes"]
    ) -> Iterator[Float[Tensor, "batch classes"]]:
        """√p_c·(p − e_c) for every class c; one direction that says the same when there are two."""
        probabilities = outputs.softmax(dim=1)
        if outputs.shape[1] == 2:
            size = probabilities.prod(dim=1).sqrt()
            yield torch.stack([-size, size], dim=1)
            return
        identity = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
        for probability, unit in zip(probabilities.T, identity, strict=True):
            yield probability.sqrt().unsqueeze(1) * (probabilities - unit)


class Gaussian:
    """Regression with unit variance: loss ½‖output − label‖², labels shaped like the outputs.

    Its Fisher with respect to the outputs is the identity, one direction per output.
    """

    def check(self, outputs: Float[Tensor, "batch outputs"], labels: Shaped[Tensor, "..."]) -> None:
        """Raise `LabelsMismatch` unless labels and outputs have the same shape."""
        if labels.shape != outputs.shape:
            raise LabelsMismatch(
                f"Labels have shape {tuple(labels.shape)}, outputs {tuple(outputs.shape)}: "
                "they must agree."
            )

    def loss(
        self, outputs: Float[Tensor, "batch outputs"], labels: Float[Tensor, "batch outputs"]
    ) -> Float[Tensor, " batch"]:
        """½‖output − label‖², per example."""
        return (outputs - labels).square().sum(dim=1) / 2

    def fisher_directions(
        self, outputs: Float[Tensor, "batch outputs"]
    ) -> Iterator[Float[Tensor, "batch outputs"]]:
        """The unit vectors."""
        for unit in torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device):
            yield unit.expand_as(outputs)


def loss_direction(
    likelihood: Likelihood, outputs: Float[Tensor, "batch classes"], labels: Shaped[Tensor, "..."]
) -> Float[Tensor, "batch classes"]:
    """The gradient of each example's loss with respect to its outputs.

    Raises `LabelsMismatch` as the likelihood's `check` does.
    """
    likelihood.check(outputs, labels)
    leaf = outputs.detach().clone().requires_grad_()
    (direction,) = torch.autograd.grad(likelihood.loss(leaf, labels).sum(), leaf)
    return direction
