"""The curvature from many examples, by all processes of a job, in pieces that survive a kill.

The examples are cut into blocks, the blocks dealt by tokens into shards, one for each process that
begins the fit. A shard's sums are written to disk now and then with the number of blocks in them. A
run that goes on takes up each shard where it was. With as many processes as before, what comes out is
what would have come out, to the bit; with another number, to rounding.
"""

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from support.ekfac import EkfacInfluence
from support.ekfac.blocks import Block
from support.ekfac.curvature import (
    Covariances,
    Eigenbasis,
    LayerCurvature,
    kfac_curvature,
    kfac_eigenvalues,
)
from support.ekfac.fisher import Fisher
from support.ekfac.fitting import generator
from support.ekfac.storage import BASIS_PARTS
from support.job.examples import Examples
from support.job.partial import blocks_in, load_sums, load_tensors, save_sums
from support.job.progress import Progress
from support.job.sharding import deal, in_blocks
from support.job.store import Store, disk_full_is_told
from support.job.team import Team

Sums = TypeVar("Sums")


@dataclass(frozen=True)
class Stage(Generic[Sums]):
    """One pass over the examples: the sums it begins with, their tensors, and how a block is added.

    `name` is that of its files, `title` what people read.
    """

    name: str
    title: str
    begin: Callable[[], Sums]
    tensors: Callable[[Sums], dict[str, Tensor]]
    add: Callable[[Fisher, Sums, Iterable[Block], torch.Generator], int]


@dataclass(frozen=True)
class JobFit:
    """A fit of `engine` on `examples`, `block` of them at a time.

    The sums are saved every `save_seconds`, and a line is written every `tell_seconds`.
    """

    engine: EkfacInfluence
    examples: Examples
    block: int
    team: Team
    store: Store
    save_seconds: float | int = 60
    tell_seconds: float | int = 60

    def run(self) -> None:
        """Fit the engine, and leave the curvature in the store. Raises what `engine.fit` raises,
        `DiskFull` and `StoreDamaged`."""
        shards = self.team.on_first(self._shards)
        curvature = self._eigenbases(shards)
        self._correct_eigenvalues(curvature, shards)
        self.engine.curvature, self.engine.examples = curvature, len(self.examples)
        self.team.on_first(self._save)

    def _save(self) -> None:
        with disk_full_is_told(self.store.folder):
            self.engine.save(self.store.curvature)
        self.store.forget_partial_fit()

    def _shards(self) -> list[list[range]]:
        """The blocks, dealt over as many processes as began the fit, however many go on with it."""
        blocks = in_blocks(len(self.examples), self.block)
        if self.store.get("shards") is None:
            self.store.settle("shards", min(self.team.size, len(blocks)))
        with disk_full_is_told(self.store.folder):
            self.store.partial_fit.mkdir(exist_ok=True)
        lengths = self.examples.lengths
        tokens = [int(lengths[block.start : block.stop].sum()) for block in blocks]
        hands = deal(tokens, self.store.get("shards"))
        return [[blocks[number] for number in hand] for hand in hands]

    def _eigenbases(self, shards: list[list[range]]) -> dict[str, LayerCurvature]:
        """Every layer with its eigenbasis and Λ = 0: computed by one process, handed to the others."""
        names = self.engine.layer_names
        missing = self.team.on_first(self._missing_bases)
        covariances = self._sum(self._covariance_stage(), shards) if missing else {}
        costs = [layer.d_in**3 + layer.d_out**3 for layer in self.engine.layers.values()]
        owners = {
            names[number]: rank
            for rank, hand in enumerate(deal(costs, self.team.size))
            for number in hand
        }
        for name in missing:
            if owners[name] == self.team.rank:
                basis = kfac_curvature(covariances.pop(name)).basis
                parts = {part: getattr(basis, part) for part in BASIS_PARTS}
                save_sums(self._basis_file(name), parts, 0)
        covariances.clear()
        self.team.wait()
        return {name: self._handed_out(name, owner) for name, owner in owners.items()}

    def _missing_bases(self) -> list[str]:
        """Layers without a basis on the disk. Sums of squares in another basis are worth nothing."""
        missing = [name for name in self.engine.layer_names if not self._basis_file(name).exists()]
        if missing:
            for path in self.store.partial_fit.glob("eigenvalues-*"):
                path.unlink()
        return missing

    def _handed_out(self, name: str, owner: int) -> LayerCurvature:
        """A layer's basis, in every process, from the owner's disk."""
        layer = self.engine.layers[name]
        d_in, d_out = layer.d_in, layer.d_out
        shapes = [(d_in, d_in), (d_out, d_out), (d_in,), (d_out,)]
        if owner == self.team.rank:
            found = load_tensors(self._basis_file(name))
            tensors = [found[part].to(layer.device).contiguous() for part in BASIS_PARTS]
        else:
            tensors = [
                torch.empty(shape, dtype=layer.dtype, device=layer.device) for shape in shapes
            ]
        for tensor in tensors:
            self.team.hand_out(tensor, owner)
        basis = Eigenbasis(*tensors, precision=self.engine.fisher().passes.precision)
        return LayerCurvature(basis, torch.zeros_like(kfac_eigenvalues(basis)))

    def _correct_eigenvalues(
        self, curvature: dict[str, LayerCurvature], shards: list[list[range]]
    ) -> None:
        summed = self._sum(self._eigenvalue_stage(curvature), shards)
        for name, layer in curvature.items():
            layer.eigenvalues = summed[name].eigenvalues / len(self.examples)

    def _covariance_stage(self) -> Stage[dict[str, Covariances]]:
        def tensors(sums: dict[str, Covariances]) -> dict[str, Tensor]:
            return {
                f"{name}/{part}": tensor
                for name, covariances in sums.items()
                for part, tensor in covariances.sums().items()
            }

        begin = self.engine.fisher().no_covariances
        return Stage(
            "covariances", "fit 1/2, covariances", begin, tensors, Fisher.add_to_covariances
        )

    def _eigenvalue_stage(
        self, curvature: dict[str, LayerCurvature]
    ) -> Stage[dict[str, LayerCurvature]]:
        def begin() -> dict[str, LayerCurvature]:
            return {
                name: LayerCurvature(layer.basis, torch.zeros_like(layer.eigenvalues))
                for name, layer in curvature.items()
            }

        def tensors(sums: dict[str, LayerCurvature]) -> dict[str, Tensor]:
            return {name: layer.eigenvalues for name, layer in sums.items()}

        return Stage(
            "eigenvalues", "fit 2/2, eigenvalues", begin, tensors, Fisher.add_to_eigenvalues
        )

    def _sum(self, stage: Stage[Sums], shards: list[list[range]]) -> Sums:
        """The stage's sums over all shards, in every process."""
        own = range(self.team.rank, len(shards), self.team.size)
        total = stage.begin()
        with self._progress(stage, shards) as progress:
            for number in own:
                sums = total if len(own) == 1 else stage.begin()
                self._add_shard(stage, sums, number, shards[number], progress)
                if sums is not total:
                    for key, tensor in stage.tensors(total).items():
                        tensor += stage.tensors(sums)[key]
            for tensor in stage.tensors(total).values():
                self.team.add_up(tensor)
        return total

    def _add_shard(
        self,
        stage: Stage[Sums],
        sums: Sums,
        number: int,
        shard: list[range],
        progress: Progress,
    ) -> None:
        path = self._shard_file(stage, number)
        done = load_sums(path, stage.tensors(sums))
        fisher = self.engine.fisher()
        saved = time.monotonic()
        for block in shard[done:]:
            inputs, _ = self.examples.batch(block, self._device)
            blocks = progress.blocks(fisher.passes.blocks(inputs, None, stage.title), "", "")
            stage.add(fisher, sums, blocks, self._draws(stage, block))
            done += 1
            if done == len(shard) or time.monotonic() - saved >= self.save_seconds:
                save_sums(path, stage.tensors(sums), done)
                saved = time.monotonic()

    def _progress(self, stage: Stage, shards: list[list[range]]) -> Progress:
        def before() -> int:
            return sum(
                len(block)
                for number, shard in enumerate(shards)
                for block in shard[: blocks_in(self._shard_file(stage, number))]
            )

        done = self.team.on_first(before)
        return Progress(self.team, stage.title, len(self.examples), done, self.tell_seconds)

    def _draws(self, stage: Stage, block: range) -> torch.Generator:
        """Sampled labels of a block: the same, whoever draws them, and in whatever order."""
        text = f"{self.engine.seed} {stage.name} {block.start}"
        return generator(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]))

    def _shard_file(self, stage: Stage, number: int) -> Path:
        return self.store.partial_fit / f"{stage.name}-{number}.safetensors"

    def _basis_file(self, name: str) -> Path:
        return self.store.partial_fit / f"basis-{self.engine.layer_names.index(name)}.safetensors"

    @property
    def _device(self) -> torch.device:
        return next(iter(self.engine.layers.values())).device
