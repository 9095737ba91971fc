"""`EkfacInfluence`: fit the curvature once, then ask which training examples a prediction rests on."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from tqdm.auto import tqdm

from support.ekfac import storage
from support.ekfac.capture import Consume, Trace, ordinary, undisturbed
from support.ekfac.curvature import LayerCurvature, rotated_gradients
from support.ekfac.errors import FactorsMismatch, LabelsMismatch, NotFitted
from support.ekfac.fitting import Fitting
from support.ekfac.layers import (
    TrackedLayer,
    per_example_gradients,
    tracked_layers,
    without_silent_positions,
)
from support.ekfac.likelihood import Categorical, Likelihood, loss_direction
from support.ekfac.solve import Regularization, check_regularization, precondition, squared_norm

Factors = dict[str, Float[Tensor, "test d_out d_in"]]
"""Preconditioned gradients, layer by layer, from input to output."""

EXAMPLES_AT_A_TIME = 8


class EkfacInfluence:
    """Influence functions with EK-FAC curvature for the linear layers that require gradients.

    The influence of a training example on a test example is ⟨(F + λ)⁻¹ ∇loss(test), ∇loss(train)⟩,
    summed over layers, with F the Fisher of each layer in its Kronecker-factored eigenbasis. Positive
    means: giving the training example more weight lowers the test loss. It is not divided by the
    number of training examples.

    `model` maps an input tensor `(batch, …)` to outputs `(batch, classes)`. When it has a method
    `token_mask(inputs)`, `(batch, tokens)` and True at real tokens, padding takes no part in
    anything. `update_diagonal=False` gives K-FAC. `hessian_regularization` is λ ≥ 0, or "auto" for
    0.1 times each layer's mean eigenvalue; it may be changed at any time. `progress` draws bars.

    Raises `LayerNotSupported`, `LayerHalfFrozen` or `NothingToTrack` when the layers that require
    gradients are not all plain linear layers, and `BadRegularization`.
    """

    def __init__(
        self,
        model: nn.Module,
        update_diagonal: bool = True,
        hessian_regularization: Regularization = 0.0,
        progress: bool = False,
        likelihood: Likelihood | None = None,
    ):
        self.model = model
        self.update_diagonal = update_diagonal
        self.hessian_regularization = hessian_regularization
        self.progress = progress
        self.likelihood = likelihood or Categorical()
        self.layers = tracked_layers(model)
        self.curvature: dict[str, LayerCurvature] = {}

    @property
    def hessian_regularization(self) -> Regularization:
        return self._hessian_regularization

    @hessian_regularization.setter
    def hessian_regularization(self, regularization: Regularization) -> None:
        check_regularization(regularization)
        self._hessian_regularization = regularization

    @property
    def layer_names(self) -> list[str]:
        """The tracked layers, from input to output."""
        return list(self.layers)

    @property
    def is_fitted(self) -> bool:
        return bool(self.curvature)

    def fit(self, loader: Iterable) -> "EkfacInfluence":
        """Estimate the curvature on batches `(inputs, …)`; labels, if any, are not looked at.

        Goes over the loader twice with EK-FAC, once with K-FAC. The order of the batches and their
        size don't matter. Raises `EmptyLoader`, `NotFinite`, `ModelInTrainingMode` and
        `LayerNotSupported`; the engine is then as it was before.
        """
        fitting = Fitting(self.model, self.layers, self.likelihood, self._bar)
        self.curvature = fitting.curvature(loader, self.update_diagonal)
        return self

    def influence_factors(
        self, x: Shaped[Tensor, "test ..."], y: Shaped[Tensor, "labels ..."]
    ) -> Factors:
        """(F + λ)⁻¹ ∇loss of each example, layer by layer: precondition once, score many.

        Raises `NotFitted`, `LabelsMismatch`, `NotFinite`, `ModelInTrainingMode`.
        """
        factors = {
            name: _zeros(layer, len(x), layer.d_out, layer.d_in)
            for name, layer in self.layers.items()
        }

        def into(start: int) -> Consume:
            def keep(name: str, activations: Tensor, output_gradients: Tensor) -> None:
                curvature = self.curvature[name]
                rotated = rotated_gradients(activations, output_gradients, curvature.basis)
                solved = precondition(rotated, curvature, self.hessian_regularization)
                factors[name][start : start + len(solved)] = solved

            return keep

        self._for_each_loss_gradient(x, y, "influence factors", into)
        return factors

    def influences_by_layer(
        self,
        x_test: Shaped[Tensor, "test ..."],
        y_test: Shaped[Tensor, "test_labels ..."],
        x: Shaped[Tensor, "train ..."] | None = None,
        y: Shaped[Tensor, "labels ..."] | None = None,
    ) -> dict[str, Float[Tensor, "test train"]]:
        """Each layer's part of `influences`, from input to output; they add up to it.

        Without `x` and `y`, the influences of the test examples on each other. Raises as
        `influence_factors` does.
        """
        factors = self.influence_factors(x_test, y_test)
        if x is None or y is None:
            x, y = x_test, y_test
        return self._influences_by_layer(factors, x, y)

    def influences(
        self,
        x_test: Shaped[Tensor, "test ..."],
        y_test: Shaped[Tensor, "test_labels ..."],
        x: Shaped[Tensor, "train ..."] | None = None,
        y: Shaped[Tensor, "labels ..."] | None = None,
    ) -> Float[Tensor, "test train"]:
        """Influence of every training example (column) on every test example (row).

        Without `x` and `y`, the influences of the test examples on each other, a symmetric matrix.
        Raises as `influence_factors` does.
        """
        return sum_over_layers(self.influences_by_layer(x_test, y_test, x, y))

    def influences_from_factors(
        self,
        factors: Factors,
        x: Shaped[Tensor, "train ..."],
        y: Shaped[Tensor, "labels ..."],
    ) -> Float[Tensor, "test train"]:
        """`influences` of the examples `factors` were made of, from training examples `x`, `y`.

        Raises `FactorsMismatch` for factors of other layers, and as `influence_factors` does.
        """
        return sum_over_layers(self._influences_by_layer(factors, x, y))

    def self_influences(
        self, x: Shaped[Tensor, "batch ..."], y: Shaped[Tensor, "labels ..."]
    ) -> Float[Tensor, " batch"]:
        """⟨(F + λ)⁻¹ ∇loss, ∇loss⟩ of each example with itself, never negative.

        Raises as `influence_factors` does.
        """
        result = _zeros(next(iter(self.layers.values())), len(x))

        def into(start: int) -> Consume:
            def add(name: str, activations: Tensor, output_gradients: Tensor) -> None:
                curvature = self.curvature[name]
                rotated = rotated_gradients(activations, output_gradients, curvature.basis)
                share = squared_norm(rotated, curvature, self.hessian_regularization)
                result[start : start + len(share)] += share

            return add

        self._for_each_loss_gradient(x, y, "self-influences", into)
        return result

    def relative_influences(
        self,
        x_test: Shaped[Tensor, "test ..."],
        y_test: Shaped[Tensor, "test_labels ..."],
        x: Shaped[Tensor, "train ..."],
        y: Shaped[Tensor, "labels ..."],
    ) -> Float[Tensor, "test train"]:
        """Influences divided by √(self-influence of the training example).

        How much a training example says about this test example, among all it says: an outlier that
        pulls on everything no longer wins every row (θ-RelatIF, Barshan et al. 2020). Zero where the
        self-influence is zero. Raises as `influence_factors` does.
        """
        influences = self.influences(x_test, y_test, x, y)
        norms = self.self_influences(x, y).sqrt()
        return torch.where(norms > 0, influences / norms, 0)

    def _influences_by_layer(
        self, factors: Factors, x: Tensor, y: Tensor
    ) -> dict[str, Float[Tensor, "test train"]]:
        self._require_fit()
        self._check_factors(factors)
        tests = len(next(iter(factors.values())))
        result = {name: _zeros(layer, tests, len(x)) for name, layer in self.layers.items()}

        def into(start: int) -> Consume:
            def score(name: str, activations: Tensor, output_gradients: Tensor) -> None:
                heard = without_silent_positions(activations, output_gradients)
                gradients = per_example_gradients(*heard).flatten(1)
                columns = slice(start, start + len(gradients))
                result[name][:, columns] = factors[name].flatten(1) @ gradients.T

            return score

        self._for_each_loss_gradient(x, y, "influences", into)
        return result

    def _for_each_loss_gradient(
        self, x: Tensor, y: Tensor, description: str, into: Callable[[int], Consume]
    ) -> None:
        """Send the loss gradient of every example back, a few examples at a time.

        `into(start)` gives the consumer for the examples from row `start` on.
        """
        self._require_fit()
        if len(x) != len(y):
            raise LabelsMismatch(f"{len(x)} examples come with {len(y)} labels: one label each.")
        with undisturbed(self.model):
            starts = range(0, len(x), EXAMPLES_AT_A_TIME)
            for start in self._bar(starts, description, "batch"):
                rows = slice(start, start + EXAMPLES_AT_A_TIME)
                trace = Trace(self.model, self.layers, x[rows])
                direction = loss_direction(self.likelihood, trace.outputs, ordinary(y[rows]))
                trace.backward(direction, into(start))

    def _check_factors(self, factors: Factors) -> None:
        if list(factors) != self.layer_names:
            raise FactorsMismatch(
                f"The factors belong to layers {list(factors)}, this engine tracks "
                f"{self.layer_names}. Make them with this engine's influence_factors."
            )
        for name, layer in self.layers.items():
            if factors[name].shape[1:] != (layer.d_out, layer.d_in):
                raise FactorsMismatch(
                    f"The factors of {name!r} have shape {tuple(factors[name].shape)}, expected "
                    f"(test, {layer.d_out}, {layer.d_in})."
                )

    def save(self, path: str | Path) -> None:
        """Write the curvature to a safetensors file, whole or not at all. Raises `NotFitted`."""
        self._require_fit()
        storage.save(path, self.curvature, self.identity())

    def load_curvature(self, path: str | Path) -> "EkfacInfluence":
        """Take the curvature from a file that `save` wrote, instead of fitting.

        Raises `DamagedFile` when it can't be read and `WrongModel` when it was fitted on another
        model, other layers or with another `update_diagonal`.
        """
        self.curvature = storage.load(path, self.identity())
        return self

    def identity(self) -> dict[str, str]:
        """What a saved curvature must agree in with this engine, λ apart."""
        return {
            "model": storage.model_fingerprint(self.model),
            "layers": ", ".join(self.layer_names),
            "update_diagonal": str(self.update_diagonal),
            "likelihood": type(self.likelihood).__name__,
        }

    def _require_fit(self) -> None:
        if not self.is_fitted:
            raise NotFitted("The curvature is not known yet. Call fit(loader) first.")

    def _bar(self, items: Iterable, description: str, unit: str) -> Iterable:
        return tqdm(items, desc=description, unit=unit, disable=not self.progress)


def _zeros(layer: TrackedLayer, *shape: int) -> Tensor:
    """Room for a result about a layer, filled outside inference mode even when called inside."""
    with torch.inference_mode(False):
        return torch.zeros(*shape, dtype=layer.dtype, device=layer.device)


def sum_over_layers(
    by_layer: dict[str, Float[Tensor, "test train"]],
) -> Float[Tensor, "test train"]:
    """Σ over layers of by-layer influences."""
    return torch.stack(list(by_layer.values())).sum(dim=0)
