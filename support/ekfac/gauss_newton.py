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
from support.ekfac.layers import TrackedLayer
from support.ekfac.likelihood import Likelihood, loss_direction
from support.ekfac.passes import with_more_to_come
from support.ekfac.positions import LayerGradients

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
                directions = self.likelihood.fisher_directions(outputs, generator)
                for direction, more in with_more_to_come(directions):
                    yield _sent_back(trace, direction, keep_graph=more)
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


def _sent_back(trace: Trace, direction: Tensor, keep_graph: bool = False) -> Gradients:
    seen: Gradients = {}
    trace.backward(direction, seen.__setitem__, keep_graph)
    return {name: seen[name] for name in trace.layers}


def inner_products(
    left: LayerGradients, right: LayerGradients
) -> Float[Tensor, "left_examples right_examples"]:
    """⟨G_n, G_m⟩ of every pair: Σ_ts (a_nt·a_ms)(g_nt·g_ms), or from the dense gradients.

    Row by row it costs rows² (d_in + d_out) multiplications, by dense gradients examples² d_in·d_out
    once they are formed: the cheaper of the two is taken.
    """
    d_in, d_out = left.activations.shape[1], left.output_gradients.shape[1]
    rows = len(left.places) * len(right.places)
    if rows * (d_in + d_out) > left.examples * right.examples * d_in * d_out:
        return left.per_example().flatten(1) @ right.per_example().flatten(1).T
    by_row = left.activations @ right.activations.T
    by_row *= left.output_gradients @ right.output_gradients.T
    by_example = by_row.new_zeros(left.examples, len(right.places))
    by_example.index_add_(0, left.owners, by_row)
    result = by_row.new_zeros(left.examples, right.examples)
    return result.index_add_(1, right.owners, by_example)


def squared_norms(gradients: LayerGradients) -> Float[Tensor, " examples"]:
    """⟨G_n, G_n⟩ of each."""
    if gradients.is_rank_one:
        by_row = gradients.activations.square().sum(1) * gradients.output_gradients.square().sum(1)
        return by_row.new_zeros(gradients.examples).index_add_(0, gradients.owners, by_row)
    return torch.stack([(g.T @ a).square().sum() for _, a, g in gradients.one_by_one()])
