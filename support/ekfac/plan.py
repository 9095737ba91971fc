"""What `fit`, `score` and `self_influences` will cost, before they run: timed on a few blocks.

The shortest, a middling and the longest block of the training set go through the model and are worked on
as each job would. Seconds per token are interpolated between their lengths; bytes come from shapes.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor

from support.ekfac.blocks import Block, loader_blocks
from support.ekfac.curvature import (
    Eigenbasis,
    LayerCurvature,
    kfac_eigenvalues,
    rotated_one_by_one,
    take_out_of_basis,
)
from support.ekfac.errors import EmptyLoader
from support.ekfac.fit import CovarianceSums, EigenvalueSums, EkfacCurvature, generator
from support.ekfac.gradients import LayerGradients
from support.ekfac.layers import TrackedLayer
from support.ekfac.likelihood import Likelihood
from support.ekfac.memory import curvature_bytes, factor_bytes, queries_at_a_time
from support.ekfac.passes import Passes
from support.ekfac.scores import products, squared_norms

LARGEST_EIGENPROBLEM = 768
"""Larger ones are extrapolated by the cube of their size."""


@dataclass(frozen=True)
class Plan:
    """Seconds by a short calibration on this machine, bytes by shapes: estimates.

    `score_seconds` is None without queries, which are scored in `query_groups`. `factor_bytes` is what
    one query takes, `peak_bytes` what the process holds at most: what it holds now, and what the engine
    adds. `str(plan)` is a table.
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
    passes = engine.passes
    sizes = [_Size.of(block, passes) for block in _blocks(train, passes)]
    if not sizes:
        raise EmptyLoader("The training loader gave no batch.")
    asked = [_Size.of(block, passes) for block in _blocks(test, passes)]
    queries = sum(size.examples for size in asked)
    group = min(queries, queries_at_a_time(engine.layers, engine.memory_budget))
    by_length = sorted(range(len(sizes)), key=lambda number: sizes[number].length)
    chosen = by_length[0], by_length[len(by_length) // 2], by_length[-1]
    found = {n: block for n, block in enumerate(_blocks(train, passes)) if n in chosen}
    trial = _Trial(passes, engine.likelihood, [found[n] for n in dict.fromkeys(chosen)], group)
    fit = engine.eigenbasis_share * trial.seconds(trial.add_covariances, sizes)
    fit += _eigenproblem_seconds(passes)
    if engine.update_diagonal:
        fit += trial.seconds(trial.add_squares, sizes)
    score = None
    if queries:
        score = queries / group * trial.seconds(trial.score, sizes)
        score += trial.seconds(trial.precondition, asked)
    curvature, one_query = curvature_bytes(engine.layers), factor_bytes(engine.layers)
    return Plan(
        examples=sum(size.examples for size in sizes),
        tokens=sum(size.tokens for size in sizes),
        queries=queries,
        query_groups=math.ceil(queries / group) if queries else 0,
        fit_seconds=fit,
        self_seconds=trial.seconds(trial.take_norms, sizes),
        score_seconds=score,
        curvature_bytes=curvature,
        factor_bytes=one_query,
        peak_bytes=_held_now(passes.device)
        + curvature
        + max(group * one_query + trial.block_bytes(), _largest_eigenproblem_bytes(passes)),
    )


@dataclass(frozen=True)
class _Size:
    """Of a block: `length` is that of its longest example, `tokens` counts real ones."""

    examples: int
    length: int
    tokens: int

    @classmethod
    def of(cls, block: Block, passes: Passes) -> "_Size":
        inputs, examples = block.inputs, len(block.rows)
        by_token = passes.token_mask is not None and inputs.ndim == 2
        length = inputs.shape[1] if by_token or inputs.ndim > 2 else 1
        tokens = passes.token_mask(inputs).sum().item() if by_token else examples * length
        return cls(examples, length, tokens)


class _Trial:
    """What the engine does with a block, in an eigenbasis that is as good as any for the clock."""

    def __init__(self, passes: Passes, likelihood: Likelihood, blocks: list[Block], queries: int):
        self.passes, self.blocks = passes, blocks
        self.sizes = [_Size.of(block, passes) for block in blocks]
        self.covariances = CovarianceSums(passes, likelihood)
        bases = {name: _identity(layer, passes.precision) for name, layer in passes.layers.items()}
        self.squares = EigenvalueSums(passes, likelihood, bases)
        self.curvature = {
            name: LayerCurvature(basis, kfac_eigenvalues(basis)) for name, basis in bases.items()
        }
        self.factors = {
            name: passes.zeros(queries, layer.d_out, layer.d_in).fill_(1)
            for name, layer in passes.layers.items()
        }

    def add_covariances(self, block: Block) -> None:
        self.covariances.add([block], generator(0))

    def add_squares(self, block: Block) -> None:
        self.squares.add([block], generator(0))

    def take_norms(self, block: Block) -> None:
        for name, gradients in self._gradients(block):
            squared_norms(gradients, self.curvature[name], 1.0)

    def score(self, block: Block) -> None:
        for name, gradients in self._gradients(block):
            products(self.factors[name], gradients)

    def precondition(self, block: Block) -> None:
        for name, gradients in self._gradients(block):
            solved = torch.stack(
                [one for _, one in rotated_one_by_one(gradients, self.curvature[name].basis)]
            )
            take_out_of_basis(solved, self.curvature[name].basis)

    def _gradients(self, block: Block) -> Iterator[tuple[str, LayerGradients]]:
        for one in self.passes.over([block], lambda outputs, _: [torch.ones_like(outputs)]):
            yield from one.gradients()

    def seconds(self, work: Callable[[Block], None], sizes: list[_Size]) -> float:
        """Of this work on blocks of these sizes, from that on the trial's blocks."""
        work(self.blocks[0])  # the first time is slower
        found = {}
        for block, size in zip(self.blocks, self.sizes, strict=True):
            start = time.perf_counter()
            work(block)
            if self.passes.device.type == "cuda":
                torch.cuda.synchronize()
            found[size.length] = (time.perf_counter() - start) / (size.examples * size.length)
        lengths = sorted(found)
        of_a_token = np.interp(
            [size.length for size in sizes], lengths, [found[length] for length in lengths]
        )
        return float(of_a_token @ [size.examples * size.length for size in sizes])

    def block_bytes(self) -> int:
        """What a pass of the longest block holds: its graph, what came back to the layers, the rows of
        the widest one as they are and rotated, and a gradient for each example of it."""
        held: dict[int, int] = {}

        def hold(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            for _ in self._gradients(self.blocks[-1]):
                pass
        size, layers = self.sizes[-1], self.passes.layers.values()
        positions = size.examples * size.length
        received = positions * sum(layer.d_out for layer in layers)
        rows = 2 * positions * max(layer.d_in + layer.d_out for layer in layers)
        dense = size.examples * max(layer.d_in * layer.d_out for layer in layers)
        return sum(held.values()) + self.passes.dtype.itemsize * (received + rows + dense)


def _blocks(loader: Iterable, passes: Passes) -> Iterator[Block]:
    return loader_blocks(((inputs, None) for inputs, *_ in loader), passes.token_mask)


def _identity(layer: TrackedLayer, precision: torch.dtype | None) -> Eigenbasis:
    like = {"dtype": layer.dtype, "device": layer.device}
    sides = layer.d_in, layer.d_out
    vectors, values = ([make(d, **like) for d in sides] for make in (torch.eye, torch.ones))
    return Eigenbasis(*vectors, *values, precision)


def _eigenproblem_seconds(passes: Passes) -> float:
    widths = [width for layer in passes.layers.values() for width in (layer.d_out, layer.d_in)]
    size = min(LARGEST_EIGENPROBLEM, max(widths))
    matrix = torch.rand(size, size, dtype=torch.float64, device=passes.device)
    start = time.perf_counter()
    torch.linalg.eigh(matrix @ matrix.T)[0].sum().item()
    return (time.perf_counter() - start) * sum((width / size) ** 3 for width in widths)


def _largest_eigenproblem_bytes(passes: Passes) -> int:
    widest = max(max(layer.d_in, layer.d_out) for layer in passes.layers.values())
    return 4 * widest**2 * torch.float64.itemsize


def _held_now(device: torch.device) -> int:
    """By this process, where the layers live."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return psutil.Process().memory_info().rss
