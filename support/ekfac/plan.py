"""What `fit`, `score` and `self_influences` will cost, before they run: timed on a few blocks.

The shortest, a middling and the longest block of the training set go through the model and are worked on
as each job would, with sums, curvature and factors as large as theirs. Seconds per token are interpolated
between their lengths.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from support.ekfac.batches import labelled
from support.ekfac.blocks import Block, loader_blocks
from support.ekfac.curvature import Eigenbasis, LayerCurvature, kfac_eigenvalues
from support.ekfac.errors import EmptyLoader
from support.ekfac.fit import CovarianceSums, EigenvalueSums, EkfacCurvature, Kept, eigenproblems_at_once
from support.ekfac.layers import TrackedLayer, widest_outputs
from support.ekfac.low_rank import no_factors, tensors_of
from support.ekfac.matrix_products import on_one_thread
from support.ekfac.memory import (
    SHARE_FOR_A_FIT,
    curvature_bytes,
    factor_bytes,
    most_held,
    parts_that_fit,
    queries_at_a_time,
)
from support.ekfac.passes import Passes

Work = Callable[[Block], object]

LARGEST_EIGENPROBLEM = 768
"""Larger ones are extrapolated by the cube of their size."""


@dataclass(frozen=True, repr=False)
class Plan:
    """What a short calibration on this machine foretells.

    `score_seconds` is None without queries. The training examples pass by once for each of `score_groups`,
    of queries or layers, and at a fit for each of `fit_groups`, of layers; `self_seconds` counts the latter,
    too, and is too high by the forward passes that one group would save. `factor_bytes` is what
    one query takes; `kept_bytes` what a fit keeps of its first pass, to spare itself the second;
    `output_bytes` what the widest layer gives for a block, of a model that writes its
    logits, which a pass holds three times over. `peak_bytes` is the most that this process has held so
    far, the calibration with all that a job has in memory included, and what is kept. It is shown as a
    table.
    """

    examples: int
    tokens: int
    queries: int
    fit_groups: int
    score_groups: int
    fit_seconds: float
    self_seconds: float
    score_seconds: float | None
    curvature_bytes: int
    factor_bytes: int
    output_bytes: int
    kept_bytes: int
    peak_bytes: int

    def __repr__(self) -> str:
        lines = [f"{self.examples:,} training examples, {self.tokens:,} tokens"]
        seconds = {"fit": self.fit_seconds, "self-influences": self.self_seconds}
        if self.score_seconds is not None:
            seconds[f"score, {self.queries:,} queries"] = self.score_seconds
        lines += [f"{what:20} {value:12.1f} s" for what, value in seconds.items()]
        sizes = {
            "curvature": self.curvature_bytes,
            "factors of a query": self.factor_bytes,
            "outputs of a block": self.output_bytes,
            "kept between passes": self.kept_bytes,
            "peak of the process": self.peak_bytes,
        }
        lines += [f"{what:20} {size / 1e6:12.1f} MB" for what, size in sizes.items()]
        for what, groups in {
            "fit takes layers": self.fit_groups,
            "scores are taken": self.score_groups,
        }.items():
            if groups > 1:
                lines.append(f"The {what} in {groups} groups, each with a pass of its own.")
        return "\n".join(lines)


def make_plan(
    engine: EkfacCurvature, train: Iterable, test: Iterable, query_group: int | None = None
) -> Plan:
    """The plan for batches `(inputs, labels, …)`, which are gone over twice and not kept. With `query_group`,
    for so many queries at a time and all layers together, whatever the memory.

    Raises `EmptyLoader`, and what a forward pass raises.
    """
    sizes, asked = (
        [_size(block, engine) for block in loader_blocks(labelled(loader), *engine.passes.together)]
        for loader in (train, test)
    )
    if not sizes:
        raise EmptyLoader("The training loader gave no batch.")
    by_length = sorted(range(len(sizes)), key=lambda number: sizes[number].length)
    chosen = by_length[0], by_length[len(by_length) // 2], by_length[-1]
    blocks = enumerate(loader_blocks(labelled(train), *engine.passes.together))
    timed = [(block, sizes[number]) for number, block in blocks if number in chosen]
    if not timed:
        raise EmptyLoader("The training loader gave its batches only once: give a DataLoader or a list.")
    queries = sum(size.examples for size in asked)
    fit_parts = score_parts = [engine]
    if query_group is None:
        fit_parts = engine.parts(curvature_bytes, SHARE_FOR_A_FIT)
        score_parts = engine.parts(partial(factor_bytes, rank=engine.query_rank))
    fit, own, score, score_groups, kept = _eigenproblem_seconds(engine.passes), 0.0, 0.0, 0, 0
    for part in fit_parts:
        room = max(part.room_to_keep(), 0) if query_group is None else 0
        seconds, own_seconds, found = _fit_costs(part, timed, sizes, room)
        fit, own, kept = fit + seconds, own + own_seconds, max(kept, found)
    for part in score_parts if queries else []:
        fits = queries_at_a_time(part.layers, engine.memory_budget, engine.query_rank)
        group = min(queries, query_group or fits)
        works = _score_works(part, group)
        score += queries / group * _seconds(works["score"], timed, sizes)
        score += _seconds(works["factors"], timed, asked)
        score_groups += math.ceil(queries / group)
    return Plan(
        examples=sum(size.examples for size in sizes),
        tokens=sum(size.tokens for size in sizes),
        queries=queries,
        fit_groups=len(fit_parts),
        score_groups=score_groups,
        fit_seconds=fit,
        self_seconds=own,
        score_seconds=score if queries else None,
        curvature_bytes=curvature_bytes(engine.layers),
        factor_bytes=factor_bytes(engine.layers, engine.query_rank),
        output_bytes=max(_outputs(size, engine) for size in sizes) * engine.passes.dtype.itemsize,
        kept_bytes=kept,
        peak_bytes=most_held(engine.passes.device) + kept,
    )


class _Size(NamedTuple):
    """Of a block: `length` is that of its longest example, `tokens` counts real ones."""

    examples: int
    length: int
    tokens: int

    @property
    def positions(self) -> int:
        """Padding included."""
        return self.examples * self.length


def _size(block: Block, engine: EkfacCurvature) -> _Size:
    mask = engine.passes.token_mask(block.inputs)
    length = block.tokens(engine.passes.token_mask)
    whole = mask is None or mask.ndim != 2
    return _Size(len(block.rows), length, len(block.rows) * length if whole else mask.sum().item())


def _outputs(size: _Size, engine: EkfacCurvature) -> int:
    """How many numbers the widest layer gives for a block, or for the largest part that it goes in."""
    widest = widest_outputs(engine.model)
    parts = parts_that_fit(size.examples, size.length, widest)
    return math.ceil(size.examples / parts) * size.length * widest


def _trial(engine: EkfacCurvature) -> EkfacCurvature:
    """The engine as if it were fitted, in an eigenbasis that is as good as any for the clock."""
    trial = copy.copy(engine)
    trial.progress = False
    products = engine.passes.precision.products
    bases = {name: _identity(layer, products) for name, layer in engine.layers.items()}
    trial.curvature = {name: LayerCurvature(basis, kfac_eigenvalues(basis)) for name, basis in bases.items()}
    return trial


def _fit_costs(
    engine: EkfacCurvature, timed: list[tuple[Block, _Size]], sizes: list[_Size], room: int | float
) -> tuple[float, float, int]:
    """Seconds of a fit and of self-influences; bytes that the fit keeps of its first pass, with so much
    room."""
    trial, covariances = _trial(engine), CovarianceSums(engine)
    fit = _seconds(lambda block: covariances.add([block]), timed, sizes)
    own = _seconds(lambda block: trial.self_influences(block.inputs, block.labels), timed, sizes)
    if not engine.update_diagonal:
        return fit, own, 0
    squares = EigenvalueSums(engine, {name: layer.basis for name, layer in trial.curvature.items()})
    seen = {id(block): Kept(math.inf) for block, _ in timed}
    for block, _ in timed:
        covariances.add([block], seen[id(block)])
        seen[id(block)].close()
    per_position = sum(kept.nbytes for kept in seen.values()) / sum(size.positions for _, size in timed)
    whole = math.ceil(per_position * sum(size.positions for size in sizes))
    share = min(1.0, room / whole) if whole else 0.0
    fit += (1 - share) * _seconds(lambda block: squares.add([block]), timed, sizes)
    fit += share * _seconds(lambda block: squares.add_kept(seen[id(block)]), timed, sizes)
    return fit, own, int(share * whole)


def _score_works(engine: EkfacCurvature, queries: int) -> dict[str, Work]:
    """What scores do with a block of training examples, and with one of queries."""
    trial = _trial(engine)
    factors = {
        name: no_factors(engine.passes.zeros, (queries, layer.d_out, layer.d_in), engine.query_rank)
        for name, layer in engine.layers.items()
    }
    for tensor in chain.from_iterable(map(tensors_of, factors.values())):
        tensor.fill_(1)  # with zeros it would be quicker than others are
    return {
        "score": lambda block: trial.influences_from_factors(factors, block.inputs, block.labels),
        "factors": lambda block: trial.influence_factors(block.inputs, block.labels),
    }


def _seconds(work: Work, timed: list[tuple[Block, _Size]], sizes: list[_Size]) -> float:
    """Of this work on blocks of these sizes, from that on some blocks."""
    work(timed[0][0])  # the first time is slower
    found = {}
    for block, size in timed:
        start = time.perf_counter()
        work(block)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found[size.length] = (time.perf_counter() - start) / size.positions
    known = sorted(found.items())
    of_a_position = np.interp([size.length for size in sizes], *zip(*known, strict=True))
    return float(of_a_position @ [size.positions for size in sizes])


def _identity(layer: TrackedLayer, products: torch.dtype | None) -> Eigenbasis:
    like = {"dtype": layer.dtype, "device": layer.device}
    sides = layer.d_in, layer.d_out
    vectors, values = ([make(d, **like) for d in sides] for make in (torch.eye, torch.ones))
    return Eigenbasis(*vectors, *values, products)


def _eigenproblem_seconds(passes: Passes) -> float:
    widths = [width for layer in passes.layers.values() for width in (layer.d_out, layer.d_in)]
    size = min(LARGEST_EIGENPROBLEM, max(widths))
    generator, dtype = torch.Generator().manual_seed(0), passes.precision.eigenproblems
    matrix = torch.rand(size, size, dtype=dtype, generator=generator).to(passes.device)
    gram = matrix @ matrix.T
    with on_one_thread() as threads:
        start = time.perf_counter()
        torch.linalg.eigh(gram)[0].sum().item()
        seconds = time.perf_counter() - start
    at_once = min(eigenproblems_at_once(passes.device, threads), len(passes.layers))
    return seconds * sum((width / size) ** 3 for width in widths) / at_once
