"""Influences of a whole training set, by all processes of a job, one chunk of the store at a time.

A chunk depends on its own examples and queries alone, so whoever computes it, whenever, computes the
same.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from support.ekfac import EkfacInfluence
from support.ekfac.blocks import EXAMPLES_AT_A_TIME
from support.ekfac.scorer import sum_over_layers
from support.ekfac.scoring import Factors
from support.job.examples import Examples
from support.job.progress import Progress
from support.job.sharding import in_blocks
from support.job.store import Store
from support.job.team import Team


@dataclass(frozen=True)
class Scoring:
    """The fitted `engine`, its training examples in blocks, and where results go."""

    engine: EkfacInfluence
    training: Examples
    block: int
    team: Team
    store: Store
    tell_seconds: float | int = 60

    def score(self, queries: Examples, query_block: int, by_layer: bool) -> None:
        """Influence of every training example on every query, into `scores`.

        Queries are preconditioned `query_block` at a time, and the training examples that are not
        scored yet pass by once for each such block. The arrays are there. Raises what the engine raises,
        and `DiskFull`.
        """
        groups = in_blocks(len(queries), query_block)
        missing = self.team.on_first(
            lambda: [
                [block for block in self._blocks() if not self._is_scored(group, block, by_layer)]
                for group in groups
            ]
        )
        to_do = [block for blocks in missing for block in blocks]
        with self._progress("score", len(groups), to_do) as progress:
            for number, (group, blocks) in enumerate(zip(groups, missing, strict=True)):
                if not blocks:
                    continue
                factors = self._factors(queries, group)
                for block in self._claimed(f"score/{number}", blocks):
                    self._score(factors, group, block, by_layer, progress)
            self.team.wait()

    def self_influences(self) -> None:
        """⟨(F + λ)⁻¹ ∇loss, ∇loss⟩ of every training example, into `self_influences`.

        Raises as `score` does.
        """
        shape, chunks = (len(self.training),), (self.block,)
        array = "self_influences", shape, chunks, self._dtype, ("training",)
        self.team.on_first(lambda: self.store.make_array(*array))
        missing = self.team.on_first(
            lambda: [
                block
                for block in self._blocks()
                if not self.store.has("self_influences", (_slice(block),))
            ]
        )
        with self._progress("self", 1, missing) as progress:
            for block in self._claimed("self", missing):
                x, y = self.training.batch(block, self._device)
                own = self._counted(progress).self_influences(x, y)
                self.store.write("self_influences", (_slice(block),), _array(own))
            self.team.wait()

    def make_arrays(self, queries: Examples, query_block: int, by_layer: bool) -> None:
        """Room for the influences on all queries. Raises `DiskFull`."""
        shape, chunks = (len(queries), len(self.training)), (query_block, self.block)
        if by_layer:
            layers = len(self.engine.layers)
            self.store.make_array(
                "layer_scores",
                (layers, *shape),
                (layers, *chunks),
                self._dtype,
                ("layer", "query", "training"),
            )
        self.store.make_array("scores", shape, chunks, self._dtype, ("query", "training"))

    def _is_scored(self, group: range, block: range, by_layer: bool) -> bool:
        place = (_slice(group), _slice(block))
        layers = (slice(0, len(self.engine.layers)), *place)
        return self.store.has("scores", place) and (
            not by_layer or self.store.has("layer_scores", layers)
        )

    def _factors(self, queries: Examples, group: range) -> Factors:
        """Each process preconditions some of the queries; then all have them all.

        They are cut into the same pieces for any number of processes, and so is the arithmetic.
        """
        factors = {
            name: torch.zeros(
                len(group), layer.d_out, layer.d_in, dtype=layer.dtype, device=self._device
            )
            for name, layer in self.engine.layers.items()
        }
        self.engine.progress = False
        pieces = in_blocks(len(group), EXAMPLES_AT_A_TIME)
        for piece in pieces[self.team.rank :: self.team.size]:
            x, y = queries.batch([group[number] for number in piece], self._device)
            for name, own in self.engine.influence_factors(x, y).items():
                factors[name][piece.start : piece.stop] = own
        for factor in factors.values():
            self.team.add_up(factor)
        return factors

    def _score(
        self, factors: Factors, group: range, block: range, by_layer: bool, progress: Progress
    ) -> None:
        x, y = self.training.batch(block, self._device)
        scores = self._counted(progress).influences_by_layer_from_factors(factors, x, y)
        place = (_slice(group), _slice(block))
        if by_layer:
            layers = np.stack([_array(one) for one in scores.values()])
            self.store.write("layer_scores", (slice(0, len(scores)), *place), layers)
        self.store.write("scores", place, _array(sum_over_layers(scores)))

    def _blocks(self) -> list[range]:
        return in_blocks(len(self.training), self.block)

    def _claimed(self, name: str, blocks: list[range]) -> Iterator[range]:
        """Blocks, each to one process: whoever is free takes the next."""
        for number in self.team.numbers(name):
            if number >= len(blocks):
                return
            yield blocks[number]

    def _progress(self, stage: str, times: int, missing: list[range]) -> Progress:
        """Counts training examples, as often as they pass by; what is not missing is done."""
        total = times * len(self.training)
        done = total - sum(map(len, missing))
        return Progress(self.team, stage, total, done, self.tell_seconds)

    def _counted(self, progress: Progress) -> EkfacInfluence:
        self.engine.progress = progress.blocks
        return self.engine

    @property
    def _device(self) -> torch.device:
        return next(iter(self.engine.layers.values())).device

    @property
    def _dtype(self) -> str:
        layer = next(iter(self.engine.layers.values()))
        return str(torch.empty(0, dtype=layer.dtype).numpy().dtype)


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


def _array(scores: Tensor) -> np.ndarray:
    return scores.cpu().numpy()
