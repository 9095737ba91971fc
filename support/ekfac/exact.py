"""The damped Gauss–Newton system solved exactly, in example space: what EK-FAC approximates.

With Φ the gradients φ of the Fisher's directions, one row per example and direction, F = ΦᵀΦ/n, and by
Woodbury

    (F + λ)⁻¹ = (1/λ) (1 − Φᵀ (nλ + ΦΦᵀ)⁻¹ Φ).

Every influence then needs inner products of gradients only: a thousand examples are a matrix of a
thousand by a thousand, however many parameters there are, and of the gradients the activations and
output gradients are enough.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from support.ekfac.batches import Batch, InOrder, as_found, count_of, unlabelled
from support.ekfac.blocks import Block
from support.ekfac.errors import BadSetting, EmptyLoader
from support.ekfac.gradients import LayerGradients
from support.ekfac.layers import tracked_layers
from support.ekfac.likelihood import Categorical, Directions, Likelihood, fisher_directions, loss_directions
from support.ekfac.passes import Passes
from support.ekfac.scores import divided_by_root
from support.ekfac.verification import verify

Gradients = dict[str, LayerGradients]
"""Of one batch and direction, layer by layer."""


def inner_products(
    left: LayerGradients, right: LayerGradients
) -> Float[Tensor, "left_examples right_examples"]:
    """⟨G_n, G_m⟩ of every pair: Σ_ts (a_nt·a_ms)(g_nt·g_ms), or from the dense gradients.

    Row by row it costs rows² (d_in + d_out) multiplications, by dense gradients examples² d_in·d_out
    once they are formed: the cheaper of the two is taken.
    """
    d_in, d_out = left.activations.shape[1], left.output_gradients.shape[1]
    rows = len(left.example) * len(right.example)
    if rows * (d_in + d_out) > left.examples * right.examples * d_in * d_out:
        return left.per_example().flatten(1) @ right.per_example().flatten(1).T
    by_row = left.activations @ right.activations.T
    by_row *= left.output_gradients @ right.output_gradients.T
    by_example = by_row.new_zeros(left.examples, len(right.example))
    by_example.index_add_(0, left.example, by_row)
    result = by_row.new_zeros(left.examples, right.examples)
    return result.index_add_(1, right.example, by_example)


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
        summed = {name: part + vars(other)[name] for name, part in vars(self).items()}
        return InnerProducts(**(summed | {"examples": self.examples}))


def exact_influences(
    products: InnerProducts, regularization: float | int
) -> tuple[Float[Tensor, "test train"], Float[Tensor, " train"]]:
    """⟨(F + λ)⁻¹ g, g'⟩ for tests and training examples, and for each training example with itself.

    Raises `BadSetting` unless λ > 0: without it the system has no unique solution.
    """
    if not regularization > 0:
        raise BadSetting(
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
        self.joint, self.progress, self.seed = joint, progress, seed
        self.passes = Passes(model, tracked_layers(model))
        self.likelihood = likelihood or Categorical()

    def inner_products(
        self, fit_loader: Iterable, test_loader: Iterable, train_loader: Iterable
    ) -> list[InnerProducts]:
        """Everything that influences of these examples need, for any λ: a list of one system when
        joint, of one per layer otherwise. Loaders as `EkfacInfluence.fit` and `score` take them.
        Raises as those do."""
        verify(self.passes, list(islice(unlabelled(fit_loader), 2)))
        asked = as_found(fit_loader) if self.likelihood.fits_on_labels else unlabelled(fit_loader)
        fisher = self._gradients(asked, fisher_directions(self.likelihood))
        test, train = (
            self._gradients(InOrder(loader), loss_directions(self.likelihood))
            for loader in (test_loader, train_loader)
        )
        examples = sum(count_of(inputs) for inputs, _ in unlabelled(fit_loader))
        systems: list[InnerProducts] = []
        names = list(self.passes.layers)
        for name in tqdm(names, "inner products", unit="layer", disable=not self.progress):
            system = InnerProducts(
                _table(fisher, fisher, name),
                _table(fisher, test, name),
                _table(fisher, train, name),
                _table(test, train, name),
                torch.cat([inner_products(batch[name], batch[name]).diagonal() for batch in train]).double(),
                examples,
            )
            systems = [systems[0] + system] if self.joint and systems else [*systems, system]
        return systems

    def _gradients(self, batches: Iterable[Batch], directions: Directions) -> list[Gradients]:
        blocks = (Block(list(range(count_of(x))), x, y) for x, y in batches)
        found = [dict(one.gradients()) for one in self.passes.over(blocks, directions, str(self.seed))]
        if not found:
            raise EmptyLoader("A loader gave no batch. It must give all of them again on every pass.")
        return found

    def influences(
        self, systems: list[InnerProducts], regularization: float | int, relative: bool = False
    ) -> Float[Tensor, "test train"]:
        """Influences, or relative influences, by the exact solve. Raises `BadSetting`."""
        parts = [exact_influences(system, regularization) for system in systems]
        influences = torch.stack([influence for influence, _ in parts]).sum(dim=0)
        if not relative:
            return influences
        return divided_by_root(influences, torch.stack([squared for _, squared in parts]).sum(dim=0))


def _table(left: list[Gradients], right: list[Gradients], name: str) -> Tensor:
    return torch.cat(
        [torch.cat([inner_products(a[name], b[name]).double() for b in right], dim=1) for a in left]
    )
