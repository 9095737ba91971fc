"""The Gauss–Newton matrix of the tracked layers without approximation, by its factors: the gradients
φ of the Fisher's directions, example by example, and the gradients of losses beside them.

F = (1/n) Σ φ φᵀ over n examples and the directions of each. It is never formed: what is asked of it are
inner products of gradients, and for them the activations and output gradients are enough.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from support.ekfac.capture import Trace, ordinary, undisturbed
from support.ekfac.errors import EmptyLoader
from support.ekfac.layers import TrackedLayer, per_example_gradients, without_silent_positions
from support.ekfac.likelihood import Likelihood, loss_direction


@dataclass(frozen=True)
class LayerGradients:
    """Gradients Σ_t g_t a_tᵀ of some examples in one layer, as the rows they are sums of."""

    activations: Float[Tensor, "examples positions d_in"]
    output_gradients: Float[Tensor, "examples positions d_out"]

    def __len__(self) -> int:
        return len(self.activations)

    def of(self, examples: slice) -> "LayerGradients":
        """Some of the examples."""
        return LayerGradients(self.activations[examples], self.output_gradients[examples])

    def dense(self) -> Float[Tensor, "examples parameters"]:
        """The gradients themselves, flattened."""
        return per_example_gradients(self.activations, self.output_gradients).flatten(1)


Gradients = dict[str, LayerGradients]
"""Layer by layer, from input to output."""


@dataclass(frozen=True)
class GaussNewton:
    """The model, its tracked layers and the loss; a seed for the labels of a sampled Fisher.

    Both methods raise `EmptyLoader`, `NotFinite`, `ModelInTrainingMode` and `LayerNotSupported`.
    """

    model: nn.Module
    layers: dict[str, TrackedLayer]
    likelihood: Likelihood
    seed: int = 0

    def directions(self, loader: Iterable) -> Iterator[Gradients]:
        """φ, for every batch `(inputs, …)` and every direction of the Fisher."""
        generator = torch.Generator().manual_seed(self.seed)
        with undisturbed(self.model):
            for inputs, *_ in _at_least_one(loader):
                trace = Trace(self.model, self.layers, inputs)
                outputs = trace.outputs.detach()
                for direction in self.likelihood.fisher_directions(outputs, generator):
                    yield _sent_back(trace, direction)
                del trace

    def losses(self, loader: Iterable) -> Iterator[Gradients]:
        """The gradients of the losses, for every batch `(inputs, labels, …)`."""
        with undisturbed(self.model):
            for inputs, labels, *_ in _at_least_one(loader):
                trace = Trace(self.model, self.layers, inputs)
                direction = loss_direction(self.likelihood, trace.outputs, ordinary(labels))
                yield _sent_back(trace, direction)
                del trace


def _at_least_one(loader: Iterable) -> Iterator:
    empty = True
    for batch in loader:
        empty = False
        yield batch
    if empty:
        raise EmptyLoader(
            "The loader gave no batch. It must hold at least one, and give all of them again on "
            "every pass (a DataLoader or a list, no generator)."
        )


def _sent_back(trace: Trace, direction: Tensor) -> Gradients:
    seen: Gradients = {}

    def consume(name: str, activations: Tensor, output_gradients: Tensor) -> None:
        seen[name] = LayerGradients(*without_silent_positions(activations, output_gradients))

    trace.backward(direction, consume, keep_graph=True)
    return {name: seen[name] for name in trace.layers}


def inner_products(
    left: LayerGradients, right: LayerGradients
) -> Float[Tensor, "left_examples right_examples"]:
    """⟨G_n, G_m⟩ of every pair: Σ_ts (a_nt·a_ms)(g_nt·g_ms), or from the dense gradients.

    By positions a pair costs positions² (d_in + d_out) multiplications, by dense gradients d_in·d_out
    once they are formed: the cheaper of the two is taken.
    """
    positions = left.activations.shape[1] * right.activations.shape[1]
    d_in, d_out = left.activations.shape[2], left.output_gradients.shape[2]
    if positions * (d_in + d_out) < d_in * d_out:
        return _by_positions(left, right)
    return left.dense() @ right.dense().T


def _by_positions(left: LayerGradients, right: LayerGradients) -> Tensor:
    a = torch.einsum("nti,msi->ntms", left.activations, right.activations)
    return (a * torch.einsum("nto,mso->ntms", left.output_gradients, right.output_gradients)).sum(
        dim=(1, 3)
    )
