"""The curvature from many examples, by all processes of a job, in pieces that survive a kill.

The examples are cut into blocks, the blocks dealt by tokens into shards, one for each process that
begins the fit. A shard's sums are written to disk now and then with the number of blocks in them. A
run that goes on takes up each shard where it was. With as many processes as before, what comes out is
what would have come out, to the bit; with another number, to rounding.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from support.ekfac import EkfacInfluence
from support.ekfac.blocks import blocks_of
from support.ekfac.curvature import Eigenbasis, LayerCurvature
from support.ekfac.fit import CovarianceSums, EigenvalueSums, generator
from support.ekfac.storage import BASIS_PARTS
from support.job.examples import Examples, in_blocks
from support.job.progress import progress
from support.job.store import Store, blocks_in, disk_full_is_told, load_sums, save_sums
from support.job.team import Team

Sums = CovarianceSums | EigenvalueSums


@dataclass(frozen=True)
class Stage:
    """One pass over the examples, and the sums it begins with. `name` is that of its files, `title`
    what people read."""

    name: str
    title: str
    begin: Callable[[], Sums]


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
        passes, likelihood = self.engine.passes, self.engine.likelihood
        covariances = Stage(
            "covariances", "fit 1/2, covariances", partial(CovarianceSums, passes, likelihood)
        )
        bases = self._bases(covariances, shards)
        eigenvalues = Stage(
            "eigenvalues",
            "fit 2/2, eigenvalues",
            partial(EigenvalueSums, passes, likelihood, bases),
        )
        sums = self._sums(eigenvalues, shards)
        self.engine.curvature = {
            name: LayerCurvature(basis, sums.tensors[name] / len(self.examples))
            for name, basis in bases.items()
        }
        self.engine.examples = len(self.examples)
        self.team.on_first(self._save)

    def _save(self) -> None:
        with disk_full_is_told(self.store.folder):
            self.engine.save(self.store.curvature)
        self.store.forget_partial_fit()

    def _shards(self) -> list[list[range]]:
        """The blocks, dealt over as many processes as began the fit, however many go on with it."""
        blocks = in_blocks(len(self.examples), self.block)
        if "shards" not in self.store.facts():
            self.store.settle("shards", min(self.team.size, len(blocks)))
        with disk_full_is_told(self.store.folder):
            self.store.partial_fit.mkdir(exist_ok=True)
        lengths = self.examples.lengths
        tokens = [int(lengths[block.start : block.stop].sum()) for block in blocks]
        hands = deal(tokens, self.store.facts()["shards"])
        return [[blocks[number] for number in hand] for hand in hands]

    def _bases(self, stage: Stage, shards: list[list[range]]) -> dict[str, Eigenbasis]:
        """Every layer's eigenbasis: computed by one process, handed to the others from its disk."""
        missing = self.team.on_first(self._missing_bases)
        layers = self.engine.layers
        hands = deal([one.d_in**3 + one.d_out**3 for one in layers.values()], self.team.size)
        names = list(layers)
        owners = {names[number]: rank for rank, hand in enumerate(hands) for number in hand}
        if missing:
            sums = self._sums(stage, shards)
            for name in missing:
                if owners[name] == self.team.rank:
                    basis = sums.basis(name)
                    parts = {part: getattr(basis, part) for part in BASIS_PARTS}
                    save_sums(self._basis_file(name), parts, 0)
            del sums
        self.team.wait()
        return {name: self._handed_out(name, owners[name]) for name in names}

    def _missing_bases(self) -> list[str]:
        """Layers without a basis on the disk. Sums of squares in another basis are worth nothing."""
        missing = [name for name in self.engine.layers if not self._basis_file(name).exists()]
        if missing:
            for path in self.store.partial_fit.glob("eigenvalues-*"):
                path.unlink()
        return missing

    def _handed_out(self, name: str, owner: int) -> Eigenbasis:
        layer = self.engine.layers[name]
        d_in, d_out = layer.d_in, layer.d_out
        shapes = [(d_in, d_in), (d_out, d_out), (d_in,), (d_out,)]
        tensors = [torch.empty(shape, dtype=layer.dtype, device=layer.device) for shape in shapes]
        if owner == self.team.rank:
            load_sums(self._basis_file(name), dict(zip(BASIS_PARTS, tensors, strict=True)))
        for tensor in tensors:
            self.team.hand_out(tensor, owner)
        return Eigenbasis(*tensors, precision=self.engine.passes.precision)

    def _sums(self, stage: Stage, shards: list[list[range]]) -> Sums:
        """The stage's sums over all shards, in every process."""
        own = range(self.team.rank, len(shards), self.team.size)
        total = stage.begin()
        with self._progress(stage, shards) as count:
            for number in own:
                sums = total if len(own) == 1 else stage.begin()
                self._add_shard(stage, sums, number, shards[number], count)
                if sums is not total:
                    for key, tensor in total.tensors.items():
                        tensor += sums.tensors[key]
            for tensor in total.tensors.values():
                self.team.add_up(tensor)
        return total

    def _add_shard(
        self,
        stage: Stage,
        sums: Sums,
        number: int,
        shard: list[range],
        count: Callable[[int], None],
    ) -> None:
        path = self._shard_file(stage, number)
        done = load_sums(path, sums.tensors)
        passes, saved = self.engine.passes, time.monotonic()
        for block in shard[done:]:
            inputs, _ = self.examples.batch(block, passes.device)
            blocks = blocks_of(inputs, None, passes.token_mask)
            count(sums.add(blocks, self._draws(stage, block)))
            done += 1
            if done == len(shard) or time.monotonic() - saved >= self.save_seconds:
                save_sums(path, sums.tensors, done)
                saved = time.monotonic()

    def _progress(self, stage: Stage, shards: list[list[range]]):
        def before() -> int:
            done = [blocks_in(self._shard_file(stage, number)) for number in range(len(shards))]
            return sum(
                len(block)
                for shard, blocks in zip(shards, done, strict=True)
                for block in shard[:blocks]
            )

        done = self.team.on_first(before)
        return progress(self.team, stage.title, len(self.examples), done, self.tell_seconds)

    def _draws(self, stage: Stage, block: range) -> torch.Generator:
        """Sampled labels of a block: the same, whoever draws them, and in whatever order."""
        text = f"{self.engine.seed} {stage.name} {block.start}"
        return generator(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]))

    def _shard_file(self, stage: Stage, number: int) -> Path:
        return self.store.partial_fit / f"{stage.name}-{number}.safetensors"

    def _basis_file(self, name: str) -> Path:
        return self.store.partial_fit / f"basis-{list(self.engine.layers).index(name)}.safetensors"


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Numbers of the pieces for each hand, ascending: the largest piece first, to the lightest hand.

    No hand gets more than 4/3 of the best possible (Graham 1969), usually it is a few percent.
    """
    dealt: list[list[int]] = [[] for _ in range(hands)]
    weights = [0] * hands
    for piece in sorted(range(len(sizes)), key=lambda piece: (-sizes[piece], piece)):
        lightest = weights.index(min(weights))
        dealt[lightest].append(piece)
        weights[lightest] += sizes[piece]
    return [sorted(hand) for hand in dealt]
