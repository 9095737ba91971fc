"""The damped Gauss–Newton system solved by conjugate gradients, with EK-FAC as the preconditioner.

For systems too large for `exact`: a product with F is one forward and one backward pass over the
training examples, whatever the number of queries. All queries are solved at once, each with step sizes
of its own; a query that has converged is left alone.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from tqdm.auto import tqdm

from support.ekfac.curvature import damped_inverse, damping, into_basis, out_of_basis
from support.ekfac.errors import NotConverged
from support.ekfac.gauss_newton import GaussNewton
from support.ekfac.influence import EkfacInfluence
from support.ekfac.positions import LayerGradients
from support.ekfac.scoring import Factors, products

Map = Callable[[Factors], Factors]
"""A linear map of the tracked layers' parameters, for several queries at once."""


@dataclass(frozen=True)
class Solution:
    """`factors` as `EkfacInfluence.influence_factors` gives them, and how near they are.

    `residuals` is ‖(F + λ) x − g‖ / ‖g‖ of each query after `iterations` products with F.
    """

    factors: Factors
    residuals: Float[Tensor, " test"]
    iterations: int


def conjugate_gradients(
    product: Map,
    preconditioner: Map,
    right_sides: Factors,
    tolerance: float,
    max_iterations: int,
    bar: Callable[[Iterable], Iterable] = iter,
) -> Solution:
    """Solve product(x) = right_sides for a symmetric positive definite product, query by query.

    Stops when every relative residual is at most `tolerance`. Hestenes & Stiefel 1952, with a
    preconditioner.
    """
    x = {name: torch.zeros_like(side) for name, side in right_sides.items()}
    residual = {name: side.clone() for name, side in right_sides.items()}
    scale = _dot(right_sides, right_sides).sqrt()
    preconditioned = preconditioner(residual)
    direction = {name: part.clone() for name, part in preconditioned.items()}
    size = _dot(residual, preconditioned)
    iterations = 0
    for _ in bar(range(max_iterations)):
        active = _dot(residual, residual).sqrt() > tolerance * scale
        if not active.any():
            break
        moved = product(direction)
        step = _ratio(size, _dot(direction, moved), active)
        _add(x, step, direction)
        _add(residual, -step, moved)
        preconditioned = preconditioner(residual)
        size, before = _dot(residual, preconditioned), size
        turn = _ratio(size, before, active)
        for name, part in direction.items():
            part.mul_(turn[:, None, None]).add_(preconditioned[name])
        iterations += 1
    residuals = torch.where(scale > 0, _dot(residual, residual).sqrt() / scale, 0)
    return Solution(x, residuals, iterations)


class GaussNewtonInfluence:
    """Exact Gauss–Newton factors for the queries of a fitted engine, on the examples of `fit_loader`.

    `joint=True` takes all layers as one system, `joint=False` leaves out what couples them. λ is the
    engine's; with "auto" each layer keeps its own. The factors go to the engine's
    `influences_from_factors`. Raises `NotFitted` for an engine that isn't.
    """

    def __init__(
        self,
        engine: EkfacInfluence,
        fit_loader: Iterable,
        tolerance: float = 1e-3,
        max_iterations: int = 100,
        joint: bool = True,
    ):
        engine._require_fit()
        self.engine = engine
        self.fit_loader = fit_loader
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.joint = joint
        self.gauss_newton = GaussNewton(engine.model, engine.layers, engine.likelihood, engine.seed)

    def solve(self, x: Shaped[Tensor, "test ..."], y: Shaped[Tensor, "labels ..."]) -> Solution:
        """(F + λ)⁻¹ ∇loss of each example.

        Warns with `NotConverged`, naming the examples, when some are above the tolerance after the
        last iteration. Raises as `EkfacInfluence.influence_factors` does.
        """
        (sides,) = self.gauss_newton.losses([(x, y)])
        gradients = {name: part.per_example() for name, part in sides.items()}
        solution = conjugate_gradients(
            self._damped_product,
            self._ekfac,
            gradients,
            self.tolerance,
            self.max_iterations,
            self._bar,
        )
        late = (solution.residuals > self.tolerance).nonzero()[:, 0].tolist()
        if late:
            warnings.warn(
                NotConverged(
                    f"Queries {late} have relative residuals up to {solution.residuals.max():.1e} "
                    f"after {solution.iterations} iterations, above the tolerance "
                    f"{self.tolerance:.1e}. Allow more iterations or a larger λ."
                ),
                stacklevel=2,
            )
        return solution

    def _bar(self, items: Iterable) -> Iterable:
        return tqdm(
            items, "conjugate gradients", unit="iteration", disable=not self.engine.progress
        )

    def _ekfac(self, gradients: Factors) -> Factors:
        result = {}
        for name, part in gradients.items():
            layer = self.engine.curvature[name]
            inverse = damped_inverse(layer.eigenvalues, self.engine.hessian_regularization)
            rotated = into_basis(part, layer.basis).mul_(inverse)
            result[name] = out_of_basis(rotated, layer.basis)
        return result

    def _damped_product(self, vectors: Factors) -> Factors:
        """(F + λ) v = (1/n) Σ φ ⟨φ, v⟩ + λ v."""
        total = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
        for gradients in self.gauss_newton.directions(self.fit_loader):
            along = {name: products(vectors[name], part) for name, part in gradients.items()}
            if self.joint:
                along = dict.fromkeys(along, sum(along.values()))
            for name, part in gradients.items():
                _add_combinations(total[name], along[name], part)
        for name, part in total.items():
            part.div_(self.engine.examples)
            eigenvalues = self.engine.curvature[name].eigenvalues
            part.add_(vectors[name], alpha=damping(eigenvalues, self.engine.hessian_regularization))
        return total


def _add_combinations(
    total: Float[Tensor, "test d_out d_in"],
    coefficients: Float[Tensor, "test batch"],
    gradients: LayerGradients,
) -> None:
    """total += Σ_n coefficients[:, n] G_n, without forming G_n where each is one product g aᵀ."""
    if not gradients.is_rank_one:
        total.flatten(1).addmm_(coefficients, gradients.per_example().flatten(1))
        return
    for query, by_row in zip(total, coefficients[:, gradients.owners], strict=True):
        weighted = gradients.output_gradients * by_row.unsqueeze(1)
        query.addmm_(weighted.T, gradients.activations)


def _dot(left: Factors, right: Factors) -> Float[Tensor, " test"]:
    """Σ over layers and parameters, query by query."""
    return sum((part * right[name]).sum(dim=(1, 2)) for name, part in left.items())


def _add(to: Factors, steps: Float[Tensor, " test"], vectors: Factors) -> None:
    for name, part in to.items():
        part.add_(vectors[name] * steps[:, None, None])


def _ratio(above: Tensor, below: Tensor, active: Tensor) -> Float[Tensor, " test"]:
    """Their quotient where a query is active, 0 elsewhere."""
    return torch.where(active & (below > 0), above / below, 0)
