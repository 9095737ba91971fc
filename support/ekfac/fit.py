"""From examples to curvature: a pass for the covariances, eigenproblems, a pass for Λ.

`CovarianceSums` and `EigenvalueSums` are the two passes in pieces: their sums over parts of the examples
add up to those over all of them, in any order, so that a fit may take its examples at once, a piece at
a time, or spread over processes. `EkfacCurvature` is a model with the result, to be saved, loaded, moved.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from support.ekfac import storage
from support.ekfac.batches import Batch, as_found, number_of_examples, unlabelled
from support.ekfac.blocks import Block, loader_blocks
from support.ekfac.curvature import (
    Eigenbasis,
    LayerCurvature,
    add_gram,
    add_squares,
    eigenbasis,
    kfac_eigenvalues,
)
from support.ekfac.engine import Engine
from support.ekfac.errors import EmptyLoader
from support.ekfac.gradients import LayerGradients
from support.ekfac.likelihood import fisher_directions
from support.ekfac.matrix_products import on_one_thread
from support.ekfac.memory import SHARE_FOR_A_FIT, curvature_bytes, room_for
from support.ekfac.passes import Pass
from support.ekfac.storage import put_aside
from support.ekfac.verification import refuse_another_model, verify


class Sums:
    """Sums over examples, `tensors` by name, to be added up in place; what they are of, subclasses say."""

    def __init__(self, engine: Engine):
        self.passes, self.likelihood = engine.passes, engine.likelihood
        # Drawn anew for Λ: the eigenbasis has fitted itself to the draw that it comes from.
        self.seed = f"{engine.seed} {type(self).__name__}"
        self.tensors: dict[str, Tensor] = {}

    def add(self, blocks: Iterable[Block], kept: "Kept | None" = None) -> int:
        """Add the examples of some blocks; how many they were. `kept` keeps what it has room for. Labels are
        sampled, where the likelihood samples, by seed and example. Raises `NotFinite`,
        `ModelInTrainingMode`, `LayerNotSupported`."""
        examples = 0
        for one in self.passes.over(blocks, fisher_directions(self.likelihood), self.seed):
            for name, gradients in one.gradients() if kept is None else kept.taken(one):
                self._add(one, name, gradients)
            examples += one.examples if one.number == 0 else 0
        return examples

    def _add(self, one: Pass, name: str, gradients: LayerGradients) -> None:
        raise NotImplementedError


class CovarianceSums(Sums):
    """Σ a aᵀ over positions and Σ g gᵀ over positions and the Fisher's directions, of every layer, and what
    they are over."""

    def __init__(self, engine: Engine):
        super().__init__(engine)
        self.positions, self._met = engine.covariance_positions, {}
        self.tensors = {"examples": torch.zeros(1, dtype=torch.int64)}
        for name, layer in engine.layers.items():
            for side, width in (("activations", layer.d_in), ("output gradients", layer.d_out)):
                self.tensors[f"{name}/{side}"] = self.passes.zeros(width, width)
            self.tensors[f"{name}/positions"] = torch.zeros(1, dtype=torch.int64)

    def add(self, blocks: Iterable[Block], kept: "Kept | None" = None) -> int:
        examples = super().add(blocks, kept)
        self.tensors["examples"] += examples
        return examples

    def _add(self, one: Pass, name: str, gradients: LayerGradients) -> None:
        activations, output_gradients = gradients.activations, gradients.output_gradients
        if self.positions == "weighted":
            sizes = [rows.norm(dim=1, keepdim=True) for rows in (activations, output_gradients)]
            activations, output_gradients = activations * sizes[1], output_gradients * sizes[0]
        add_gram(self.tensors[f"{name}/output gradients"], output_gradients)
        if self.positions == "gradient":
            activations = self._where_gradient_is_new(one, name, gradients)
        elif self.positions == "all":
            if one.number:
                return
            activations = one.activations(name)
        add_gram(self.tensors[f"{name}/activations"], activations)
        self.tensors[f"{name}/positions"] += len(activations)

    def _where_gradient_is_new(self, one: Pass, name: str, gradients: LayerGradients) -> Tensor:
        """Activations at positions where no direction before, of this block, brought gradient."""
        places = gradients.example * 2**32 + gradients.token
        if one.number == 0:
            self._met[name] = places
            return gradients.activations
        new = ~torch.isin(places, self._met[name])
        self._met[name] = torch.cat([self._met[name], places[new]])
        return gradients.activations[new]

    def basis(self, name: str) -> Eigenbasis:
        """A layer's eigenbasis: of the mean of a aᵀ over its positions or their weights, and of Σ g gᵀ, mean
        over examples. Its sums are given up: ask once, at the end."""
        activation = self.tensors.pop(f"{name}/activations")
        weighted = self.positions == "weighted"
        weight = activation.trace() if weighted else self.tensors[f"{name}/positions"]
        activation = activation / (weight.item() or 1)
        output_gradient = self.tensors.pop(f"{name}/output gradients") / self.tensors["examples"].item()
        return eigenbasis(activation, output_gradient, self.passes.precision)

    def bases(self, names: list[str]) -> Iterator[tuple[str, Eigenbasis]]:
        """`basis` of one layer after the other, on a CPU several at once, with a thread each."""
        with on_one_thread() as threads:
            at_once = eigenproblems_at_once(self.passes.device, threads)
            with ThreadPoolExecutor(at_once) as pool:
                yield from zip(names, pool.map(self.basis, names), strict=True)


class EigenvalueSums(Sums):
    """Σ (Q_gᵀ G Q_a)² of every layer, in its eigenbasis: `tensors` by the layer's name."""

    def __init__(self, engine: Engine, bases: dict[str, Eigenbasis]):
        super().__init__(engine)
        self.bases = bases
        self.tensors = {name: torch.zeros_like(kfac_eigenvalues(basis)) for name, basis in bases.items()}

    def _add(self, one: Pass, name: str, gradients: LayerGradients) -> None:
        add_squares(self.tensors[name], gradients, self.bases[name])

    def add_kept(self, kept: "Kept", progress: bool = False) -> int:
        """Add the examples that were kept of a pass before; how many they are."""
        hidden = not (progress and kept.passes)
        for one in tqdm(kept.passes, "corrected eigenvalues", unit="block", disable=hidden):
            for name, gradients in one.items():
                add_squares(self.tensors[name], gradients, self.bases[name])
        return kept.examples


class Kept:
    """What the first examples of a pass said of every layer, one after the other, in every direction of the
    Fisher: as many examples as there is `room` for, in bytes. Nothing of directions that were drawn."""

    def __init__(self, room: int | float):
        self.room, self.examples, self.nbytes = room, 0, 0
        self.passes: list[dict[str, LayerGradients]] = []
        self._begun: list[dict[str, LayerGradients]] = []
        self._rows = 0

    def taken(self, one: Pass) -> Iterable[tuple[str, LayerGradients]]:
        """The gradients of a pass, which are kept if it is the next one and there is room."""
        if one.number == 0:
            self.close()
        self.room = 0 if one.drawn else self.room
        if self.room <= 0:
            return one.gradients()
        found = dict(one.gradients())
        self._begun.append(found)
        self._rows = one.examples
        self.nbytes += sum(gradients.nbytes for gradients in found.values())
        if self.nbytes >= self.room:
            self._begun, self.room = [], 0  # not all directions of these examples have room
        return found.items()

    def close(self) -> None:
        """No other direction of the examples that came last is to come."""
        if self._begun:
            self.passes += self._begun
            self.examples += self._rows
        self._begun = []

    def others(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The examples of the same blocks that were not kept."""
        skipped = self.examples
        for block in blocks:
            left = block.part(slice(skipped, None)) if skipped else block
            skipped = max(skipped - len(block.rows), 0)
            if left.rows:
                yield left


class EkfacCurvature(Engine):
    """A model with the EK-FAC curvature of its linear layers that require gradients, to be fitted, saved,
    loaded and moved. Settings and what they raise are those of `Engine`."""

    @torch.inference_mode(False)
    def fit(self, loader: Iterable) -> "EkfacCurvature":
        """Estimate the curvature on batches `(inputs, …)`; of labels only what they say is asked.

        Goes over the loader twice with EK-FAC, once with K-FAC or where the Fisher is exact and the memory
        budget keeps all that the first pass saw, and as often for each group of layers where not all fit into
        memory; the order of the batches and their size don't matter. Two examples are compared with autograd
        first. Raises `EmptyLoader`, `NotFinite`, `ModelInTrainingMode`, `LayerNotSupported` and
        `OutputsNotSupported`; the engine is then as it was before.
        """
        loader = self.batches(loader)
        batches = self.asked(loader)
        first = list(islice(batches, 2))
        probe = verify(self.passes, first)
        parts, curvature = self.parts(curvature_bytes, SHARE_FOR_A_FIT), {}
        for part in parts:
            begun = chain(first, batches) if part is parts[0] else self.asked(loader)
            found, examples = part._fitted(begun, loader)
            curvature |= found if len(parts) == 1 else {name: put_aside(one) for name, one in found.items()}
        self.curvature, self.examples, self.probe = curvature, examples, probe
        return self

    def _fitted(self, batches: Iterable[Batch], loader: Iterable) -> tuple[dict[str, LayerCurvature], int]:
        """The curvature of the layers and the number of examples; the first pass is over `batches`."""
        covariances, kept = CovarianceSums(self), Kept(self.room_to_keep() if self.update_diagonal else 0)
        blocks = self._in_blocks(batches, loader, "covariances")
        examples = _some(covariances.add(blocks, kept), "covariances")
        kept.close()
        found, layers = covariances.bases(self.layer_names), len(self.layer_names)
        bases = dict(tqdm(found, "eigenbases", layers, unit="layer", disable=not self.progress))
        if self.update_diagonal:
            squares = EigenvalueSums(self, bases)
            if squares.add_kept(kept, self.progress) < examples:
                blocks = self._in_blocks(self.asked(loader), loader, "corrected eigenvalues")
                seen = _some(squares.add(kept.others(blocks)), "corrected eigenvalues")
                examples = kept.examples + seen
            eigenvalues = {name: total.div_(examples) for name, total in squares.tensors.items()}
        else:
            eigenvalues = {name: kfac_eigenvalues(basis) for name, basis in bases.items()}
        return {name: LayerCurvature(basis, eigenvalues[name]) for name, basis in bases.items()}, examples

    def room_to_keep(self) -> int | float:
        """Bytes of the memory budget that the curvature leaves for what the first pass of a fit saw."""
        return room_for(self.layers, self.memory_budget) - curvature_bytes(self.layers)

    def asked(self, loader: Iterable) -> Iterator[Batch]:
        """Batches as a fit takes them: labels only where they say what is asked."""
        return as_found(loader) if self.likelihood.fits_on_labels else unlabelled(loader)

    def _in_blocks(self, batches: Iterable[Batch], loader: Iterable, what: str) -> Iterator[Block]:
        blocks = loader_blocks(batches, *self.passes.together)
        return self._counted(blocks, number_of_examples(loader), what)

    def to(self, device: str | torch.device) -> "EkfacCurvature":
        """Move the model and the fitted curvature to a device."""
        self.model.to(device)
        self.curvature = {name: layer.to(device) for name, layer in self.curvature.items()}
        return self

    def save(self, path: str | Path) -> None:
        """Write the curvature to a safetensors file, whole or not at all, with the first tokens of two
        examples by which its model is known again. Raises `NotFitted`."""
        self._require_fit()
        storage.save(path, self.curvature, self.identity(), self.examples, self.probe)

    def load_curvature(self, path: str | Path) -> "EkfacCurvature":
        """Take the curvature from a file that `save` wrote, instead of fitting.

        Raises `DamagedFile` when it can't be read and `WrongModel` when it was fitted on another
        model, other layers or with other settings; the engine is then as it was before.
        """
        return self._take(storage.read(path))

    def _take(self, saved: storage.Saved) -> "EkfacCurvature":
        curvature, probe = saved.curvature(self.identity()), saved.probe()
        if probe is not None:
            refuse_another_model(self.passes, *probe)
        self.curvature = {name: layer.to(self.passes.device) for name, layer in curvature.items()}
        self.examples, self.probe = saved.examples, probe
        for layer in self.curvature.values():
            layer.basis.products = self.passes.precision.products
        return self

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, **settings) -> "EkfacCurvature":
        """An engine for `model` with the curvature from a file that `save` wrote.

        `settings` are those of the constructor; `update_diagonal` is as it was at the fit. Raises as
        `load_curvature` and the constructor do.
        """
        saved = storage.read(path)
        settings["update_diagonal"] = saved.metadata["update_diagonal"] == "True"
        return cls(model, **settings)._take(saved)


def eigenproblems_at_once(device: torch.device, threads: int) -> int:
    """As many as there are threads on a CPU: one gains little from a second thread, two take both."""
    return threads if device.type == "cpu" else 1


def _some(examples: int, description: str) -> int:
    """The number of examples. Raises `EmptyLoader` when there was none."""
    if not examples:
        raise EmptyLoader(
            f"The loader gave no batch while computing {description}. It must hold at least "
            "one, and give all of them again on every pass (a DataLoader or a list, no generator)."
        )
    return examples
