"""Training examples as short vectors, made once, from which a new question is answered at once.

In the eigenbasis and divided by √(Λ + λ), gradients are vectors whose inner products are EK-FAC's
influences. Entry k has the second moment s_k = Λ_k / (Λ_k + λ) over the training examples, so it adds s_k²
to the mean square of influences: the entries with the largest s_k keep most of it, and of the layers'
products Q_gᵀ G Q_a nothing but those entries is computed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from support.ekfac.batches import Batch, InOrder, Inputs, Labels, number_of_examples
from support.ekfac.blocks import loader_blocks
from support.ekfac.curvature import damped_inverse
from support.ekfac.errors import BadSetting, EmptyLoader, NotFitted, refuse_unknown
from support.ekfac.gradients import LayerGradients
from support.ekfac.influence import EkfacInfluence
from support.ekfac.scores import NORMALISATIONS, divided_by_root, refuse_not_finite
from support.ekfac.storage import digest, read, write

FORMAT, SKETCHES, SCALES = "ekfac-index-2", "sketches", "scales"


@dataclass(frozen=True)
class Entries:
    """Some entries of Q_gᵀ G Q_a / √(Λ + λ) of a layer, at these places of the flat matrix: the eigenvectors
    that any of them needs, and for each its place among those and its 1/√(Λ + λ)."""

    places: Int[Tensor, " entries"]
    output_gradient: Float[Tensor, "d_out some"]
    activation: Float[Tensor, "d_in others"]
    row: Int[Tensor, " entries"]
    column: Int[Tensor, " entries"]
    scale: Float[Tensor, " entries"]

    def of(self, gradients: LayerGradients) -> Float[Tensor, "batch entries"]:
        """Those of every example."""
        seen = replace(
            gradients,
            activations=gradients.activations @ self.activation,
            output_gradients=gradients.output_gradients @ self.output_gradient,
        )
        found = self.scale.new_empty(gradients.examples, len(self.scale))
        for examples, products in seen.in_parts():
            found[examples] = products[:, self.row, self.column] * self.scale
        return found


def in_bytes(
    sketches: Float[Tensor, "examples numbers"],
) -> tuple[Int[Tensor, "examples numbers"], Float[Tensor, " examples"]]:
    """Every number as a whole one from −127 to 127, and of each example by how much to multiply them."""
    scales = sketches.abs().amax(dim=1).float() / 127
    return (sketches / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().to(
        torch.int8
    ), scales


class EkfacIndex:
    """The training examples of a fitted engine, each as so many `numbers` of a byte, and their scale.

    `share` is the part of the mean squared influence, as Λ foretells it, that the numbers keep; it is small
    where λ is far below most of Λ, for then no few entries stand out. λ is the engine's when the index is
    made. Raises `NotFitted`, and `BadSetting` for less than one number.
    """

    def __init__(self, engine: EkfacInfluence, numbers: int = 2048):
        if numbers < 1:
            raise BadSetting(f"numbers={numbers!r}: use a whole number from 1.")
        engine._require_fit()
        self.engine, self.regularization = engine, engine.hessian_regularization
        expected = {name: self._expected(name).flatten() for name in engine.layers}
        best = {name: one.topk(min(numbers, len(one))) for name, one in expected.items()}
        values, order = torch.cat([one.values for one in best.values()]).sort(descending=True, stable=True)
        chosen = torch.zeros(len(values), dtype=torch.bool).index_fill_(0, order[:numbers].cpu(), True)
        per_layer = chosen.split([len(one.values) for one in best.values()])
        self.entries = {
            name: self._entries(name, one.indices[: int(kept.sum())])
            for (name, one), kept in zip(best.items(), per_layer, strict=True)
            if kept.any()
        }
        whole = sum(one.square().sum() for one in expected.values())
        self.share = float(values[:numbers].square().sum() / whole)
        self.sketches, self.scales = in_bytes(torch.zeros(0, len(values[:numbers])))

    def _expected(self, name: str) -> Float[Tensor, "d_out d_in"]:
        """Λ / (Λ + λ) of a layer."""
        eigenvalues = self.engine.curvature_of(name).eigenvalues
        return eigenvalues * damped_inverse(eigenvalues, self.regularization)

    def _entries(self, name: str, places: Int[Tensor, " entries"]) -> Entries:
        layer = self.engine.curvature_of(name)
        inverse = damped_inverse(layer.eigenvalues, self.regularization)
        rows, columns = places // inverse.shape[1], places % inverse.shape[1]
        some, row = rows.unique(return_inverse=True)
        others, column = columns.unique(return_inverse=True)
        vectors = layer.basis.output_gradient[:, some], layer.basis.activation[:, others]
        return Entries(places, *vectors, row, column, inverse[rows, columns].sqrt())

    def __len__(self) -> int:
        return len(self.sketches)

    def build(self, train_loader: Iterable) -> "EkfacIndex":
        """Take the examples of a loader's batches `(inputs, labels, …)`, in order, in one pass. Raises
        `EmptyLoader`, `LoaderShuffles`, and as `score`."""
        sketches = refuse_not_finite(self.sketched(train_loader, "index"), self.regularization)
        self.sketches, self.scales = in_bytes(sketches)
        return self

    def sketched(self, loader: Iterable, what: str = "sketches") -> Float[Tensor, "examples numbers"]:
        """The entries of each example of a loader, whose inner products are influences. Raises as `build`."""
        engine, rows, found = self.engine, [], []
        loader = engine.batches(loader)
        blocks = loader_blocks(InOrder(loader), *engine.passes.together)
        for one in engine._losses(engine._counted(blocks, number_of_examples(loader), what)):
            own = {
                name: self.entries[name].of(part) for name, part in one.gradients() if name in self.entries
            }
            found.append(torch.cat([own[name] for name in self.entries], dim=1).cpu())
            rows += one.rows
        if not rows:
            raise EmptyLoader("The loader gave no batch.")
        return torch.cat(found)[torch.tensor(rows).argsort()]

    def ask(self, x: Inputs, y: Labels, normalisation: str = "plain") -> Float[Tensor, "test train"]:
        """The influences of all training examples on these, "plain" or "relative", as far as the numbers
        keep them. Raises as `influences` does, and `NotFitted` before `build`."""
        refuse_unknown("normalisation", normalisation, NORMALISATIONS)
        if not len(self):
            raise NotFitted("The index holds no training example yet. Call build(loader) first.")
        training = self.sketches.float()
        scores = (self.sketched([(x, y)]).float() @ training.T) * self.scales
        if normalisation == "relative":
            scores = divided_by_root(scores, training.square().sum(dim=1) * self.scales.square())
        return refuse_not_finite(scores, self.regularization)

    def errors(self, x: Inputs, y: Labels, rows: Int[Tensor, " some"], some: Batch) -> Float[Tensor, " test"]:
        """How far plain answers are off: the root mean square of their differences from the influences of
        these training examples, which `some` holds and `rows` names. A hundred drawn at random tell that of
        all, if a little too small. Raises as `ask` and `influences` do."""
        off = self.engine.influences(x, y, *some[:2]).cpu() - self.ask(x, y)[:, rows]
        return off.square().mean(dim=1).sqrt()

    def _identity(self) -> dict[str, str]:
        eigenvalues = {name: self.engine.curvature_of(name).eigenvalues for name in self.engine.layers}
        told = {"curvature": digest(eigenvalues), "hessian_regularization": str(self.regularization)}
        return {"format": FORMAT} | self.engine.identity() | told

    def save(self, path: str | Path) -> None:
        """Write the training examples' numbers to a safetensors file, whole or not at all."""
        write(path, {SKETCHES: self.sketches, SCALES: self.scales}, self._identity())

    @classmethod
    def load(cls, path: str | Path, engine: EkfacInfluence) -> "EkfacIndex":
        """The index that `save` wrote, of this fitted engine. Raises `DamagedFile` when it can't be read or
        was altered, and `WrongModel` when it is of another model, curvature or λ."""
        cure = "Build the index again."
        saved = read(path, FORMAT, cure)
        found = cls(engine, saved.tensors[SKETCHES].shape[1])
        saved.refuse_others(found._identity(), cure)
        found.sketches, found.scales = saved.tensors[SKETCHES], saved.tensors[SCALES]
        return found
