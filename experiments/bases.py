"""In which basis EK-FAC looks at a layer, and what each would cost in fidelity: all of them at once.

Λ is corrected in whatever orthonormal basis one takes, so only its fit to the gradients counts. With
G = gᵀa of an example, its rows the positions that carry gradient, the covariances compared are

- "all positions": Σ aᵀa over all real positions, Σ gᵀg (Kronfluence's, and the engine's "all");
- "gradient": the same over the positions that carry gradient;
- "weighted": aᵀ diag(‖g‖²) a and gᵀ diag(‖a‖²) g, each position by what it adds;
- "per example": E[GᵀG] and E[GGᵀ], the factors of Shampoo (Gupta et al. 2018) and the bases of SOAP
  (Vyas et al. 2024);
- "Kronecker": the factors A, S with A ⊗ S nearest to the Fisher, by alternating least squares:
  A ∝ E[GᵀSG], S ∝ E[GAGᵀ] (Van Loan & Pitsianis 1993).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from support.ekfac import EkfacInfluence
from support.ekfac.batches import unlabelled
from support.ekfac.blocks import Block, loader_blocks
from support.ekfac.curvature import (
    Eigenbasis,
    LayerCurvature,
    add_squares,
    eigenbasis,
    kfac_eigenvalues,
    rotated_in_parts,
)
from support.ekfac.likelihood import fisher_directions, loss_directions

BASES = ("all positions", "gradient", "weighted", "per example", "Kronecker")
STEPS = 2
"""Of the alternating least squares, from the factors per example on."""

Pair = tuple[Float[Tensor, "d_in d_in"], Float[Tensor, "d_out d_out"]]
"""Sums for activations and for output gradients."""


def add_example(kind: str, sums: Pair, a: Tensor, g: Tensor, factors: Pair | None = None) -> None:
    """Add what one example's rows say to the sums of a kind; `factors` are those of the step before."""
    if kind == "gradient":
        parts = a.T @ a, g.T @ g
    elif kind == "weighted":
        parts = (a * g.square().sum(1, keepdim=True)).T @ a, (g * a.square().sum(1, keepdim=True)).T @ g
    else:
        middle_a, middle_g = (g, a) if factors is None else (g @ factors[1], a @ factors[0])
        parts = a.T @ (middle_a @ g.T) @ a, g.T @ (middle_g @ a.T) @ g
    for total, part in zip(sums, parts, strict=True):
        total += part


def covariances(
    engine: EkfacInfluence, loader: list, kinds: Sequence[str] = BASES, progress: bool = False
) -> dict[str, dict[str, Pair]]:
    """Sums by kind and layer, each of trace 1. "Kronecker" goes over the loader twice more."""
    at_once = {"all positions", "gradient", *kinds} - {"Kronecker"}
    at_once |= {"per example"} if "Kronecker" in kinds else set()
    found: dict[str, dict[str, Pair]] = {kind: _zeros(engine) for kind in at_once}
    directions = fisher_directions(engine.likelihood)
    for one in engine.passes.over(_blocks(engine, loader, "covariances", progress), directions, "0"):
        for name, gradients in one.gradients():
            if one.number == 0:
                activations = one.activations(name)
                found["all positions"][name][0].addmm_(activations.T, activations)
            for _, a, g in gradients.one_by_one():
                for kind in at_once - {"all positions"}:
                    add_example(kind, found[kind][name], a, g)
    for name in engine.layers:
        found["all positions"][name][1].copy_(found["gradient"][name][1])
    if "Kronecker" in kinds:
        found["Kronecker"] = _nearest(engine, loader, _of_trace_one(found["per example"]), progress)
    return {kind: _of_trace_one(found[kind]) for kind in kinds}


def _nearest(
    engine: EkfacInfluence, loader: list, factors: dict[str, Pair], progress: bool
) -> dict[str, Pair]:
    """The factors after the steps of alternating least squares from these on."""
    directions = fisher_directions(engine.likelihood)
    for _ in range(STEPS):
        sums = _zeros(engine)
        for one in engine.passes.over(_blocks(engine, loader, "least squares", progress), directions, "0"):
            for name, gradients in one.gradients():
                for _, a, g in gradients.one_by_one():
                    add_example("Kronecker", sums[name], a, g, factors[name])
        factors = _of_trace_one(sums)
    return factors


def _zeros(engine: EkfacInfluence) -> dict[str, Pair]:
    return {
        name: (engine.passes.zeros(layer.d_in, layer.d_in), engine.passes.zeros(layer.d_out, layer.d_out))
        for name, layer in engine.layers.items()
    }


def _of_trace_one(sums: dict[str, Pair]) -> dict[str, Pair]:
    return {name: tuple(part / part.trace().clamp(min=1e-30) for part in pair) for name, pair in sums.items()}


def _blocks(engine: EkfacInfluence, loader: list, what: str, progress: bool) -> Iterator[Block]:
    blocks = loader_blocks(unlabelled(loader), *engine.passes.together)
    return iter(tqdm(blocks, what, unit="block", disable=not progress))


def curvatures(
    engine: EkfacInfluence, loader: list, kinds: Sequence[str] = BASES, progress: bool = False
) -> dict[str, dict[str, LayerCurvature]]:
    """Λ corrected in the bases of these kinds, all from the same passes: by kind and layer."""
    bases: dict[str, dict[str, Eigenbasis]] = {
        kind: {name: eigenbasis(*pair) for name, pair in sums.items()}
        for kind, sums in covariances(engine, loader, kinds, progress).items()
    }
    totals = {
        kind: {name: torch.zeros_like(kfac_eigenvalues(basis)) for name, basis in of_kind.items()}
        for kind, of_kind in bases.items()
    }
    examples, directions = 0, fisher_directions(engine.likelihood)
    for one in engine.passes.over(_blocks(engine, loader, "eigenvalues", progress), directions, "1"):
        examples += one.examples if one.number == 0 else 0
        for name, gradients in one.gradients():
            for kind in kinds:
                add_squares(totals[kind][name], gradients, bases[kind][name])
    return {
        kind: {name: LayerCurvature(basis, totals[kind][name] / examples) for name, basis in of_kind.items()}
        for kind, of_kind in bases.items()
    }


@dataclass(frozen=True)
class Share:
    """λ of a layer as so many times the mean of its Λ, or its 0.99 quantile."""

    factor: float
    of: Literal["mean", "0.99 quantile"]

    def __str__(self) -> str:
        return f"{self.factor:g} × {self.of}"


Damping = float | Share
"""One λ for all layers, or what makes a λ for each."""


def damping(eigenvalues: Float[Tensor, "d_out d_in"], value: Damping) -> float:
    """λ of a layer."""
    if not isinstance(value, Share):
        return value
    size = eigenvalues.mean() if value.of == "mean" else eigenvalues.quantile(0.99)
    return value.factor * size.item()


@dataclass(frozen=True)
class Bins:
    """A layer's pairs of axes in the order of their Λ, and cut where it has grown by a constant factor: all
    of a bin are given their mean Λ, which makes any number of λ as cheap as one."""

    order: Int[Tensor, " pairs"]
    sizes: list[int]
    eigenvalues: Float[Tensor, " bins"]


def bins_of(eigenvalues: Float[Tensor, "d_out d_in"], count: int) -> Bins:
    """At most so many bins, over ten orders of magnitude; what is below them is in the first."""
    values, order = eigenvalues.flatten().sort()
    logs = values.clamp(min=1e-10 * values[-1].item() + 1e-30).log()
    place = ((logs - logs[0]) / (logs[-1] - logs[0]).clamp(min=1e-9) * (count - 1)).long()
    sizes = [size for size in place.bincount().tolist() if size]
    return Bins(order, sizes, torch.stack([part.mean() for part in values.split(sizes)]))


@dataclass(frozen=True)
class Scores:
    """By layer, for one λ: influences, and of each training example with itself."""

    influences: Float[Tensor, "layers queries train"]
    self_influences: Float[Tensor, "layers train"]


def scored(
    engine: EkfacInfluence,
    curvature: dict[str, LayerCurvature],
    queries: list,
    train: list,
    dampings: tuple[Damping, ...],
    progress: bool = False,
    count: int = 100,
) -> dict[Damping, Scores]:
    """Influences for every λ from one pass over each side, with Λ in `count` bins."""
    bins = {name: bins_of(layer.eigenvalues, count) for name, layer in curvature.items()}
    asked = _rotated(engine, curvature, queries, progress)
    for name, rows in asked.items():
        asked[name] = rows.flatten(1)[:, bins[name].order]
    examples = sum(len(labels) for _, labels, *_ in train)
    shape = len(engine.layers), len(next(iter(asked.values()))), examples
    result = {
        value: Scores(engine.passes.zeros(*shape), engine.passes.zeros(len(engine.layers), examples))
        for value in dampings
    }
    first = 0
    for batch in train:
        rows = slice(first, first + len(batch[1]))
        first = rows.stop
        told = _rotated(engine, curvature, [batch], progress)
        for number, (name, gradients) in enumerate(told.items()):
            layer, own = bins[name], gradients.flatten(1)[:, bins[name].order]
            products, squares = _by_bin(asked[name], own, layer.sizes)
            for value, scores in result.items():
                weights = 1 / (layer.eigenvalues + damping(curvature[name].eigenvalues, value))
                scores.influences[number][:, rows] = (products * weights[:, None, None]).sum(dim=0)
                scores.self_influences[number, rows] = weights @ squares
    return result


def _by_bin(
    asked: Float[Tensor, "queries pairs"], told: Float[Tensor, "train pairs"], sizes: list[int]
) -> tuple[Float[Tensor, "bins queries train"], Float[Tensor, "bins train"]]:
    """By bin: inner products of queries and training examples, and of these with themselves."""
    sides = list(zip(asked.split(sizes, dim=1), told.split(sizes, dim=1), strict=True))
    products = torch.stack([one @ other.T for one, other in sides])
    return products, torch.stack([other.square().sum(dim=1) for _, other in sides])


def _rotated(
    engine: EkfacInfluence, curvature: dict[str, LayerCurvature], loader: list, progress: bool
) -> dict[str, Float[Tensor, "examples d_out d_in"]]:
    """The loss gradients of all examples in the eigenbases, by layer."""
    examples = sum(len(labels) for _, labels, *_ in loader)
    found = {
        name: engine.passes.zeros(examples, layer.d_out, layer.d_in) for name, layer in engine.layers.items()
    }
    blocks = loader_blocks(((x, y) for x, y, *_ in loader), *engine.passes.together)
    bar = iter(tqdm(blocks, "gradients", unit="block", disable=not progress))
    for one in engine.passes.over(bar, loss_directions(engine.likelihood)):
        for name, gradients in one.gradients():
            for examples, rotated in rotated_in_parts(gradients, curvature[name].basis):
                found[name][one.rows[examples]] = rotated
    return found
