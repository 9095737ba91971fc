"""Influences of a whole training set, by all processes of a job, one chunk of the store at a time.

A chunk depends on its own examples and queries alone, so whoever computes it, whenever, computes the
same.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from support.ekfac import EkfacInfluence
from support.ekfac.blocks import EXAMPLES_AT_A_TIME
from support.job.examples import Examples, in_blocks
from support.job.progress import progress
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

    def make_arrays(self, queries: Examples, query_group: int, by_layer: bool) -> None:
        """Room for the influences on all queries. Raises `DiskFull`."""
        shape, chunks = (len(queries), len(self.training)), (query_group, self.block)
        names = ("query", "training")
        if by_layer:
            layers = len(self.engine.layers)
            self.store.make_array(
                "layer_scores", (layers, *shape), (layers, *chunks), self._dtype, ("layer", *names)
            )
        self.store.make_array("scores", shape, chunks, self._dtype, names)

    def score(self, queries: Examples, query_group: int, by_layer: bool) -> None:
        """Influence of every training example on every query, into arrays that are there.

        Queries are preconditioned `query_group` at a time, and the training examples that are not
        scored yet pass by once for each such group. Raises what the engine raises, and `DiskFull`.
        """
        names = ["scores", "layer_scores"] if by_layer else ["scores"]
        groups = in_blocks(len(queries), query_group)
        missing = self.team.on_first(lambda: [self._missing(names, group) for group in groups])
        with self._progress("score", missing) as count:
            for number, (group, blocks) in enumerate(zip(groups, missing, strict=True)):
                if not blocks:
                    continue
                factors = self._factors(queries, group)
                for block in self._claimed(f"score/{number}", blocks):
                    x, y = self.training.batch(block, self._device)
                    by_name = self.engine.influences_by_layer_from_factors(factors, x, y)
                    layers = torch.stack(list(by_name.values()))
                    place = _place(group, block)
                    if by_layer:
                        self.store.write("layer_scores", place, _array(layers))
                    self.store.write("scores", place, _array(layers.sum(dim=0)))
                    count(len(block))
            self.team.wait()

    def self_influences(self) -> None:
        """⟨(F + λ)⁻¹ ∇loss, ∇loss⟩ of every training example, into `self_influences`.

        Raises as `score` does.
        """
        name, shape, chunks = "self_influences", (len(self.training),), (self.block,)
        self.team.on_first(
            lambda: self.store.make_array(name, shape, chunks, self._dtype, ("training",))
        )
        missing = self.team.on_first(lambda: self._missing([name]))
        with self._progress("self", [missing]) as count:
            for block in self._claimed("self", missing):
                own = self.engine.self_influences(*self.training.batch(block, self._device))
                self.store.write(name, _place(block), _array(own))
                count(len(block))
            self.team.wait()

    def _missing(self, names: list[str], *group: range) -> list[range]:
        """The blocks of training examples that one of these arrays lacks for a group of queries."""
        return [
            block
            for block in in_blocks(len(self.training), self.block)
            if not all(self.store.has(name, _place(*group, block)) for name in names)
        ]

    def _factors(self, queries: Examples, group: range) -> dict[str, Tensor]:
        """Each process preconditions some of the queries; then all have them all.

        They are cut into the same pieces for any number of processes, and so is the arithmetic.
        """
        factors = {
            name: torch.zeros(
                len(group), layer.d_out, layer.d_in, dtype=layer.dtype, device=layer.device
            )
            for name, layer in self.engine.layers.items()
        }
        pieces = in_blocks(len(group), EXAMPLES_AT_A_TIME)
        for piece in pieces[self.team.rank :: self.team.size]:
            x, y = queries.batch([group[number] for number in piece], self._device)
            for name, own in self.engine.influence_factors(x, y).items():
                factors[name][piece.start : piece.stop] = own
        for factor in factors.values():
            self.team.add_up(factor)
        return factors

    def _claimed(self, name: str, blocks: list[range]) -> Iterator[range]:
        """Blocks, each to one process: whoever is free takes the next."""
        for number in self.team.numbers(name):
            if number >= len(blocks):
                return
            yield blocks[number]

    def _progress(self, stage: str, missing: list[list[range]]) -> AbstractContextManager:
        """Counts training examples, as often as they pass by; what is not missing is done."""
        total = len(missing) * len(self.training)
        to_do = sum(len(block) for blocks in missing for block in blocks)
        return progress(self.team, stage, total, total - to_do, self.tell_seconds)

    @property
    def _device(self) -> torch.device:
        return self.engine.passes.device

    @property
    def _dtype(self) -> str:
        layer = next(iter(self.engine.layers.values()))
        return str(torch.empty(0, dtype=layer.dtype).numpy().dtype)


def _place(*numbers: range) -> tuple[slice, ...]:
    return tuple(slice(part.start, part.stop) for part in numbers)


def _array(scores: Tensor) -> np.ndarray:
    return scores.cpu().numpy()
