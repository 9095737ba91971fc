"""From batches to curvature: a pass for the covariances, eigenproblems, a pass for Λ."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from support.ekfac.capture import Consume, Trace, undisturbed
from support.ekfac.curvature import (
    Covariances,
    LayerCurvature,
    eigenbasis,
    kfac_eigenvalues,
    rotated_gradients,
    squared_sum,
)
from support.ekfac.errors import EmptyLoader
from support.ekfac.layers import TrackedLayer
from support.ekfac.likelihood import Likelihood

Bar = Callable[[Iterable, str, str], Iterable]
"""Wraps items in a progress bar with a description and a unit."""


@dataclass(frozen=True)
class Fitting:
    """The model whose curvature is wanted, its layers, and the loss that defines the Fisher."""

    model: nn.Module
    layers: dict[str, TrackedLayer]
    likelihood: Likelihood
    bar: Bar

    def curvature(self, loader: Iterable, update_diagonal: bool) -> dict[str, LayerCurvature]:
        """Eigenbasis and eigenvalues of every layer, from input to output.

        Raises `EmptyLoader`, `NotFinite`, `ModelInTrainingMode`, `LayerNotSupported`.
        """
        with undisturbed(self.model):
            covariances = self._covariances(loader)
            curvature = {}
            for name in self.bar(list(covariances), "eigenbases", "layer"):
                covariance = covariances.pop(name)
                basis = eigenbasis(covariance.activation, covariance.output_gradient)
                curvature[name] = LayerCurvature(basis, kfac_eigenvalues(basis))
            if update_diagonal:
                self._correct_eigenvalues(curvature, loader)
        return curvature

    def _covariances(self, loader: Iterable) -> dict[str, Covariances]:
        covariances = {
            name: Covariances(layer.d_out, layer.d_in, layer.dtype, layer.device)
            for name, layer in self.layers.items()
        }

        def add_output_gradients(name: str, _: Tensor, output_gradients: Tensor) -> None:
            covariances[name].add_output_gradients(output_gradients)

        for inputs in self._inputs(loader, "covariances"):
            trace = Trace(self.model, self.layers, inputs)
            for name, covariance in covariances.items():
                covariance.add_activations(trace.activations(name), trace.positions(name))
            self._backward_fisher(trace, add_output_gradients)
        return covariances

    def _correct_eigenvalues(self, curvature: dict[str, LayerCurvature], loader: Iterable) -> None:
        for layer in curvature.values():
            layer.eigenvalues = torch.zeros_like(layer.eigenvalues)

        def add(name: str, activations: Tensor, output_gradients: Tensor) -> None:
            rotated = rotated_gradients(activations, output_gradients, curvature[name].basis)
            curvature[name].eigenvalues += squared_sum(rotated)

        examples = 0
        for inputs in self._inputs(loader, "corrected eigenvalues"):
            trace = Trace(self.model, self.layers, inputs)
            self._backward_fisher(trace, add)
            examples += trace.examples
        for layer in curvature.values():
            layer.eigenvalues /= examples

    def _backward_fisher(self, trace: Trace, consume: Consume) -> None:
        for direction in self.likelihood.fisher_directions(trace.outputs.detach()):
            trace.backward(direction, consume, keep_graph=True)

    def _inputs(self, loader: Iterable, description: str) -> Iterator[Tensor]:
        """The inputs of every batch. Raises `EmptyLoader` when there is none."""
        batches = 0
        for inputs, *_ in self.bar(loader, description, "batch"):
            batches += 1
            yield inputs
        if not batches:
            raise EmptyLoader(
                f"The loader gave no batch while computing {description}. It must hold at least "
                "one, and give all of them again on every pass (a DataLoader or a list, no generator)."
            )
