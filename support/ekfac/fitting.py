"""From batches to curvature: a pass for the covariances, eigenproblems, a pass for Λ.

`Fitting` does it; `EkfacCurvature` is a model together with the result, to be saved, loaded, moved.
"""

import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from support.ekfac import storage
from support.ekfac.blocks import Block, first_examples
from support.ekfac.capture import undisturbed
from support.ekfac.curvature import (
    Covariances,
    LayerCurvature,
    Regularization,
    check_regularization,
    kfac_curvature,
)
from support.ekfac.errors import BadPrecision, BadShare, EmptyLoader, NotFitted
from support.ekfac.fisher import Fisher
from support.ekfac.layers import tracked_layers
from support.ekfac.likelihood import Categorical, Likelihood
from support.ekfac.memory import check_budget
from support.ekfac.passes import Bar, Passes, length_of

PRECISIONS = {"full": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Fitting:
    """A fit in one process, over a loader.

    `seed` decides which labels are drawn when the likelihood samples them. Covariances are those of
    the first `eigenbasis_share` of the examples, Λ is that of all.
    """

    fisher: Fisher
    seed: int
    eigenbasis_share: float | int

    def curvature(
        self, loader: Iterable, update_diagonal: bool
    ) -> tuple[dict[str, LayerCurvature], int]:
        """Eigenbasis and eigenvalues of every layer, from input to output; the number of examples.

        Raises `EmptyLoader`, `NotFinite`, `ModelInTrainingMode`, `LayerNotSupported`.
        """
        passes = self.fisher.passes
        with undisturbed(passes.model):
            covariances, examples = self._covariances(loader)
            curvature = {}
            for name in passes.bar(list(covariances), "eigenbases", "layer"):
                curvature[name] = kfac_curvature(covariances.pop(name), passes.precision)
            if update_diagonal:
                self._correct_eigenvalues(curvature, loader)
        return curvature, examples

    def _covariances(self, loader: Iterable) -> tuple[dict[str, Covariances], int]:
        covariances = self.fisher.no_covariances()
        first = None
        if self.eigenbasis_share < 1:
            first = math.ceil(self.eigenbasis_share * number_of_examples(loader))
        blocks = self._blocks(loader, "covariances", first)
        examples = self.fisher.add_to_covariances(covariances, blocks, generator(self.seed))
        return covariances, some(examples, "covariances")

    def _correct_eigenvalues(self, curvature: dict[str, LayerCurvature], loader: Iterable) -> None:
        for layer in curvature.values():
            layer.eigenvalues.zero_()
        blocks = self._blocks(loader, "corrected eigenvalues")
        examples = self.fisher.add_to_eigenvalues(curvature, blocks, generator(self.seed + 1))
        for layer in curvature.values():
            layer.eigenvalues /= some(examples, "corrected eigenvalues")

    def _blocks(
        self, loader: Iterable, description: str, first: int | None = None
    ) -> Iterator[Block]:
        """The examples of a loader, or the `first` of them."""
        unlabelled = ((inputs, None) for inputs, *_ in loader)
        length = length_of(loader)
        if first is not None:
            unlabelled, length = first_examples(unlabelled, first), None
        pools = self.fisher.passes.pools(unlabelled, length, description)
        return (block for pool in pools for block in pool.blocks)


def generator(seed: int) -> torch.Generator:
    """The source of sampled labels."""
    return torch.Generator().manual_seed(seed)


def some(examples: int, description: str) -> int:
    """The number of examples. Raises `EmptyLoader` when there was none."""
    if not examples:
        raise EmptyLoader(
            f"The loader gave no batch while computing {description}. It must hold at least "
            "one, and give all of them again on every pass (a DataLoader or a list, no generator)."
        )
    return examples


def number_of_examples(loader: Iterable) -> int:
    """Of the data set if the loader has one, else by going over the loader once."""
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, Sized):
        return len(dataset)
    return sum(len(inputs) for inputs, *_ in loader)


class EkfacCurvature:
    """A model with the EK-FAC curvature of its linear layers that require gradients.

    `model` maps an input tensor `(batch, …)` to outputs `(batch, classes)`. When it has a method
    `token_mask(inputs)`, `(batch, tokens)` and True at real tokens, padding takes no part in
    anything. `update_diagonal=False` gives K-FAC. `hessian_regularization` is λ ≥ 0, or "auto" for
    0.1 times each layer's mean eigenvalue; it may be changed at any time. `progress` draws bars, or
    is a function that wraps items in one of yours, given a description and a unit.
    `likelihood` is the loss, `Categorical()` by default; `seed` decides which labels it draws when
    there are too many classes for the exact Fisher. `memory_budget` is the number of bytes that the
    factors of queries may take while scoring, by default a quarter of the memory that is free.

    `eigenbasis_share` is the share of the examples that the eigenbases are computed from: the first
    ⌈share · n⌉ that the loader gives, which must therefore come in random order. Corrected
    eigenvalues are always those of all examples. With `precision="bfloat16"` the model's matrix
    products and the rotations into the eigenbases are taken in bfloat16 and summed in float32, which
    is faster where the processor has instructions for it and good to about two digits; covariances,
    eigenvalues and scores stay as they are.

    Raises `LayerNotSupported`, `LayerHalfFrozen` or `NothingToTrack` when the layers that require
    gradients are not all plain linear layers, `BadRegularization`, `BadBudget`, `BadShare`
    and `BadPrecision`.
    """

    def __init__(
        self,
        model: nn.Module,
        update_diagonal: bool = True,
        hessian_regularization: Regularization = 0.0,
        progress: bool | Bar = False,
        likelihood: Likelihood | None = None,
        seed: int = 0,
        memory_budget: int | None = None,
        eigenbasis_share: float | int = 1,
        precision: str = "full",
    ):
        check_budget(memory_budget)
        _check_share(eigenbasis_share)
        _check_precision(precision)
        self.model = model
        self.update_diagonal = update_diagonal
        self.hessian_regularization = hessian_regularization
        self.progress = progress
        self.likelihood = likelihood or Categorical()
        self.seed = seed
        self.memory_budget = memory_budget
        self.eigenbasis_share = eigenbasis_share
        self.precision = precision
        self.layers = tracked_layers(model)
        self.curvature: dict[str, LayerCurvature] = {}
        self.examples = 0

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

    def fit(self, loader: Iterable) -> "EkfacCurvature":
        """Estimate the curvature on batches `(inputs, …)`; labels, if any, are not looked at.

        Goes over the loader twice with EK-FAC, once with K-FAC. The order of the batches and their
        size don't matter. Raises `EmptyLoader`, `NotFinite`, `ModelInTrainingMode` and
        `LayerNotSupported`; the engine is then as it was before.
        """
        fitting = Fitting(self.fisher(), self.seed, self.eigenbasis_share)
        self.curvature, self.examples = fitting.curvature(loader, self.update_diagonal)
        return self

    def to(self, device: str | torch.device) -> "EkfacCurvature":
        """Move the model and the fitted curvature to a device."""
        self.model.to(device)
        self.curvature = {name: layer.to(device) for name, layer in self.curvature.items()}
        return self

    def save(self, path: str | Path) -> None:
        """Write the curvature to a safetensors file, whole or not at all. Raises `NotFitted`."""
        self._require_fit()
        storage.save(path, self.curvature, self.identity(), self.examples)

    def load_curvature(self, path: str | Path) -> "EkfacCurvature":
        """Take the curvature from a file that `save` wrote, instead of fitting.

        Raises `DamagedFile` when it can't be read and `WrongModel` when it was fitted on another
        model, other layers or with other settings; the engine is then as it was before.
        """
        device = next(iter(self.layers.values())).device
        curvature, self.examples = storage.load(path, self.identity())
        self.curvature = {name: layer.to(device) for name, layer in curvature.items()}
        for layer in self.curvature.values():
            layer.basis.precision = PRECISIONS[self.precision]
        return self

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, **settings) -> "EkfacCurvature":
        """An engine for `model` with the curvature from a file that `save` wrote.

        `settings` are those of the constructor; `update_diagonal` is as it was at the fit. Raises as
        `load_curvature` and the constructor do.
        """
        settings["update_diagonal"] = storage.identity(path)["update_diagonal"] == "True"
        return cls(model, **settings).load_curvature(path)

    def identity(self) -> dict[str, str]:
        """What a saved curvature must agree in with this engine, λ apart."""
        return {
            "model": storage.model_fingerprint(self.model),
            "layers": ", ".join(self.layer_names),
            "update_diagonal": str(self.update_diagonal),
            "likelihood": repr(self.likelihood),
            "seed": str(self.seed),
            "eigenbasis_share": str(float(self.eigenbasis_share)),
            "precision": self.precision,
        }

    def _require_fit(self) -> None:
        if not self.is_fitted:
            raise NotFitted("The curvature is not known yet. Call fit(loader) first.")

    def fisher(self) -> Fisher:
        """Sums over examples, for a fit in pieces: what `fit` adds up over a loader."""
        return Fisher(self._passes(), self.likelihood)

    def _passes(self) -> Passes:
        return Passes(self.model, self.layers, self._bar, PRECISIONS[self.precision])

    def _bar(self, items: Iterable, description: str, unit: str) -> Iterable:
        if callable(self.progress):
            return self.progress(items, description, unit)
        one_step = isinstance(items, Sized) and len(items) == 1
        return tqdm(items, desc=description, unit=unit, disable=one_step or not self.progress)


def _check_share(share: float | int) -> None:
    if not 0 < share <= 1:
        raise BadShare(f"eigenbasis_share={share!r}: use a number above 0 and at most 1.")


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise BadPrecision(f"precision={precision!r}: use one of {', '.join(PRECISIONS)}.")
