"""The damped Gauss–Newton system solved exactly, in example space: what EK-FAC approximates.

With Φ the Fisher's gradients, one row per example and direction, F = ΦᵀΦ/n, and by Woodbury

    (F + λ)⁻¹ = (1/λ) (1 − Φᵀ (nλ + ΦΦᵀ)⁻¹ Φ).

Every influence then needs inner products of gradients only: a thousand examples are a matrix of a
thousand by a thousand, however many parameters there are.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from support.ekfac.errors import BadRegularization
from support.ekfac.gauss_newton import GaussNewton, Gradients, inner_products, squared_norms
from support.ekfac.layers import tracked_layers
from support.ekfac.likelihood import Categorical, Likelihood


@dataclass(frozen=True)
class InnerProducts:
    """⟨·,·⟩ of gradients in one layer, or summed over layers, in float64.

    `fisher` (fisher, fisher) is ΦΦᵀ, `fisher_test` and `fisher_train` are Φ times the gradients of the
    losses, `test_train` and `train_squared` those gradients with each other and with themselves.
    `examples` is n.
    """

    fisher: Float[Tensor, "fisher fisher"]
    fisher_test: Float[Tensor, "fisher test"]
    fisher_train: Float[Tensor, "fisher train"]
    test_train: Float[Tensor, "test train"]
    train_squared: Float[Tensor, " train"]
    examples: int

    def __add__(self, other: "InnerProducts") -> "InnerProducts":
        return InnerProducts(
            self.fisher + other.fisher,
            self.fisher_test + other.fisher_test,
            self.fisher_train + other.fisher_train,
            self.test_train + other.test_train,
            self.train_squared + other.train_squared,
            self.examples,
        )


def exact_influences(
    products: InnerProducts, regularization: float | int
) -> tuple[Float[Tensor, "test train"], Float[Tensor, " train"]]:
    """⟨(F + λ)⁻¹ g, g'⟩ for tests and training examples, and for each training example with itself.

    Raises `BadRegularization` unless λ > 0: without it the system has no unique solution.
    """
    if not regularization > 0:
        raise BadRegularization(
            f"The exact solve needs a regularization above 0, not {regularization!r}: there are more "
            "parameters than examples."
        )
    damped = products.fisher.clone()
    damped.diagonal().add_(products.examples * regularization)
    factor = torch.linalg.cholesky(damped)
    solved = torch.cholesky_solve(products.fisher_train, factor)
    influences = products.test_train - products.fisher_test.T @ solved
    squared = products.train_squared - (products.fisher_train * solved).sum(dim=0)
    return influences / regularization, squared.clamp(min=0) / regularization


class ExactInfluence:
    """Influences with the exact Gauss–Newton matrix of the layers that require gradients.

    `joint=True` takes all layers as one system, as the theory has it; `joint=False` leaves out what
    couples layers, as EK-FAC does. Gradients are kept as activations and output gradients, so the
    memory is that of the examples read at once plus examples². Raises as `EkfacInfluence` does.
    """

    def __init__(
        self,
        model: nn.Module,
        joint: bool = True,
        progress: bool = False,
        likelihood: Likelihood | None = None,
        seed: int = 0,
    ):
        self.joint = joint
        self.progress = progress
        self.gauss_newton = GaussNewton(
            model, tracked_layers(model), likelihood or Categorical(), seed
        )

    def inner_products(
        self, fit_loader: Iterable, test_loader: Iterable, train_loader: Iterable
    ) -> list[InnerProducts]:
        """Everything that influences of these examples need, for any λ: a list of one system when
        joint, of one per layer otherwise. Loaders as `EkfacInfluence.fit` and `score` take them."""
        fisher = list(self.gauss_newton.directions(fit_loader))
        test = list(self.gauss_newton.losses(test_loader))
        train = list(self.gauss_newton.losses(train_loader))
        examples = sum(len(inputs) for inputs, *_ in fit_loader)
        systems: list[InnerProducts] = []
        names = list(self.gauss_newton.layers)
        for name in tqdm(names, "inner products", unit="layer", disable=not self.progress):
            system = InnerProducts(
                _table(fisher, fisher, name),
                _table(fisher, test, name),
                _table(fisher, train, name),
                _table(test, train, name),
                torch.cat([squared_norms(batch[name]) for batch in train]).double(),
                examples,
            )
            systems = [systems[0] + system] if self.joint and systems else [*systems, system]
        return systems

    def influences(
        self, systems: list[InnerProducts], regularization: float | int, relative: bool = False
    ) -> Float[Tensor, "test train"]:
        """Influences, or relative influences, by the exact solve. Raises `BadRegularization`."""
        parts = [exact_influences(system, regularization) for system in systems]
        influences = torch.stack([influence for influence, _ in parts]).sum(dim=0)
        if not relative:
            return influences
        norms = torch.stack([squared for _, squared in parts]).sum(dim=0).sqrt()
        return torch.where(norms > 0, influences / norms, 0)


def _table(left: list[Gradients], right: list[Gradients], name: str) -> Tensor:
    return torch.cat(
        [torch.cat([inner_products(a[name], b[name]).double() for b in right], dim=1) for a in left]
    )
