"""What `fit`, `score` and `self_influences` will cost, before they run: timed on a few blocks.

The shortest, a middling and the longest block of the training set go through the model and are worked on
as each job would, with sums, curvature and factors as large as theirs. Seconds per token are interpolated
between their lengths.
"""

import copy
import math
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from support.ekfac.blocks import Block, TokenMask, loader_blocks, unlabelled
from support.ekfac.curvature import Eigenbasis, LayerCurvature, kfac_eigenvalues
from support.ekfac.errors import EmptyLoader
from support.ekfac.fit import CovarianceSums, EigenvalueSums, EkfacCurvature, generator
from support.ekfac.layers import TrackedLayer
from support.ekfac.likelihood import Categorical
from support.ekfac.memory import curvature_bytes, factor_bytes, queries_at_a_time
from support.ekfac.passes import Passes

LARGEST_EIGENPROBLEM = 768
"""Larger ones are extrapolated by the cube of their size."""


@dataclass(frozen=True)
class Plan:
    """What a short calibration on this machine foretells.

    `score_seconds` is None without queries, which are scored in `query_groups`. `factor_bytes` is what
    one query takes; `peak_bytes` is the most that this process has held so far, the calibration with
    all that a job has in memory included. `str(plan)` is a table.
    """

    examples: int
    tokens: int
    queries: int
    query_groups: int
    fit_seconds: float
    self_seconds: float
    score_seconds: float | None
    curvature_bytes: int
    factor_bytes: int
    peak_bytes: int

    def __str__(self) -> str:
        lines = [f"{self.examples:,} training examples, {self.tokens:,} tokens"]
        seconds = {"fit": self.fit_seconds, "self-influences": self.self_seconds}
        if self.score_seconds is not None:
            seconds[f"score, {self.queries:,} queries"] = self.score_seconds
        lines += [f"{what:20} {value:12.1f} s" for what, value in seconds.items()]
        sizes = {
            "curvature": self.curvature_bytes,
            "factors of a query": self.factor_bytes,
            "peak of the process": self.peak_bytes,
        }
        lines += [f"{what:20} {size / 2**20:12.1f} MB" for what, size in sizes.items()]
        if self.query_groups > 1:
            lines.append(
                f"The queries are scored in {self.query_groups} groups, each with a pass of its own."
            )
        return "\n".join(lines)


def make_plan(engine: EkfacCurvature, train: Iterable, test: Iterable) -> Plan:
    """The plan for batches `(inputs, …)`, which are gone over twice and not kept.

    Raises `EmptyLoader`, and what a forward pass raises.
    """
    mask = engine.passes.token_mask
    sizes = [_Size.of(block, mask) for block in loader_blocks(unlabelled(train), mask)]
    if not sizes:
        raise EmptyLoader("The training loader gave no batch.")
    asked = [_Size.of(block, mask) for block in loader_blocks(unlabelled(test), mask)]
    queries = sum(size.examples for size in asked)
    group = min(queries, queries_at_a_time(engine.layers, engine.memory_budget))
    by_length = sorted(range(len(sizes)), key=lambda number: sizes[number].length)
    chosen = by_length[0], by_length[len(by_length) // 2], by_length[-1]
    blocks = enumerate(loader_blocks(unlabelled(train), mask))
    kept = [block for number, block in blocks if number in chosen]
    if not kept:
        raise EmptyLoader("The training loader gave its batches only once: give a DataLoader or a list.")
    trial = _Trial(engine, kept, group)
    fit = trial.seconds(trial.add_covariances, sizes) + _eigenproblem_seconds(engine.passes)
    if engine.update_diagonal:
        fit += trial.seconds(trial.add_squares, sizes)
    score = None
    if queries:
        score = queries / group * trial.seconds(trial.score, sizes)
        score += trial.seconds(trial.precondition, asked)
    return Plan(
        examples=sum(size.examples for size in sizes),
        tokens=sum(size.tokens for size in sizes),
        queries=queries,
        query_groups=math.ceil(queries / group) if queries else 0,
        fit_seconds=fit,
        self_seconds=trial.seconds(trial.take_norms, sizes),
        score_seconds=score,
        curvature_bytes=curvature_bytes(engine.layers),
        factor_bytes=factor_bytes(engine.layers),
        peak_bytes=_most_held(engine.passes.device),
    )


@dataclass(frozen=True)
class _Size:
    """Of a block: `length` is that of its longest example, `tokens` counts real ones."""

    examples: int
    length: int
    tokens: int

    @classmethod
    def of(cls, block: Block, token_mask: TokenMask) -> "_Size":
        mask, examples = token_mask(block.inputs), len(block.rows)
        if mask is not None and mask.ndim == 2:
            return cls(examples, mask.shape[1], mask.sum().item())
        by_position = isinstance(block.inputs, Tensor) and block.inputs.ndim > 2
        length = block.inputs.shape[1] if by_position else 1
        return cls(examples, length, examples * length)

    @property
    def positions(self) -> int:
        """Padding included."""
        return self.examples * self.length


class _Trial:
    """What an engine does with a block, in an eigenbasis that is as good as any for the clock."""

    def __init__(self, engine: EkfacCurvature, blocks: list[Block], queries: int):
        passes = engine.passes
        self.blocks, self.sizes = blocks, [_Size.of(block, passes.token_mask) for block in blocks]
        bases = {name: _identity(layer, passes.precision) for name, layer in engine.layers.items()}
        self.covariances = CovarianceSums(passes, engine.likelihood)
        self.squares = EigenvalueSums(passes, engine.likelihood, bases)
        self.engine = copy.copy(engine)
        self.engine.progress, self.engine.likelihood = False, _SumOfOutputs()
        self.engine.curvature = {
            name: LayerCurvature(basis, kfac_eigenvalues(basis)) for name, basis in bases.items()
        }
        self.factors = {
            name: passes.zeros(queries, layer.d_out, layer.d_in).fill_(1)
            for name, layer in engine.layers.items()
        }

    def add_covariances(self, block: Block) -> None:
        self.covariances.add([block], generator(0))

    def add_squares(self, block: Block) -> None:
        self.squares.add([block], generator(0))

    def take_norms(self, block: Block) -> None:
        self.engine.self_influences(block.inputs, torch.zeros(len(block.rows)))

    def score(self, block: Block) -> None:
        self.engine.influences_from_factors(self.factors, block.inputs, torch.zeros(len(block.rows)))

    def precondition(self, block: Block) -> None:
        self.engine.influence_factors(block.inputs, torch.zeros(len(block.rows)))

    def seconds(self, work: Callable[[Block], None], sizes: list[_Size]) -> float:
        """Of this work on blocks of these sizes, from that on the trial's blocks."""
        work(self.blocks[0])  # the first time is slower
        found = {}
        for block, size in zip(self.blocks, self.sizes, strict=True):
            start = time.perf_counter()
            work(block)
            if self.engine.passes.device.type == "cuda":
                torch.cuda.synchronize()
            found[size.length] = (time.perf_counter() - start) / size.positions
        known = sorted(found.items())
        of_a_position = np.interp([size.length for size in sizes], *zip(*known, strict=True))
        return float(of_a_position @ [size.positions for size in sizes])


class _SumOfOutputs(Categorical):
    """A loss that is told no labels and costs nothing."""

    def check(self, outputs: Tensor, labels: Tensor) -> None:
        pass

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return outputs.sum(dim=1)


def _identity(layer: TrackedLayer, precision: torch.dtype | None) -> Eigenbasis:
    like = {"dtype": layer.dtype, "device": layer.device}
    sides = layer.d_in, layer.d_out
    vectors, values = ([make(d, **like) for d in sides] for make in (torch.eye, torch.ones))
    return Eigenbasis(*vectors, *values, precision)


def _eigenproblem_seconds(passes: Passes) -> float:
    widths = [width for layer in passes.layers.values() for width in (layer.d_out, layer.d_in)]
    size = min(LARGEST_EIGENPROBLEM, max(widths))
    matrix = torch.rand(size, size, dtype=torch.float64, generator=generator(0)).to(passes.device)
    start = time.perf_counter()
    torch.linalg.eigh(matrix @ matrix.T)[0].sum().item()
    return (time.perf_counter() - start) * sum((width / size) ** 3 for width in widths)


def _most_held(device: torch.device) -> int:
    """By this process so far, where the layers live."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
