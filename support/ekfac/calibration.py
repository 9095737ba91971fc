"""How fast this machine is at the engine's work: a few blocks of real examples, each kernel once."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from support.ekfac.arithmetic import Arithmetic
from support.ekfac.blocks import Block
from support.ekfac.capture import Trace, undisturbed
from support.ekfac.counting import LayerWork
from support.ekfac.curvature import (
    Covariances,
    Eigenbasis,
    LayerCurvature,
    add_squares,
    take_out_of_basis,
)
from support.ekfac.passes import Passes
from support.ekfac.positions import LayerGradients
from support.ekfac.scoring import keep_solved, products

LARGEST_EIGENPROBLEM = 768
"""Larger ones are extrapolated by the cube of their size."""


@dataclass(frozen=True)
class BlockCost:
    """A bare forward and backward pass: seconds, multiply-adds, bytes that its graph holds."""

    examples: int
    tokens: int
    seconds: float
    multiply_adds: int
    graph_bytes: int


@dataclass(frozen=True)
class Speeds:
    """Multiply-adds per second by kind of work, and bare passes of a few blocks."""

    covariances: float
    eigenbases: float
    squares: float
    factors: float
    scores: float
    blocks: list[BlockCost]


def calibrated(
    passes: Passes, chosen: list[Block], queries: int
) -> tuple[dict[str, LayerWork], Speeds]:
    """What each layer works on, and the speeds, from blocks of the training set.

    The middle one of the blocks is where the kernels are timed.
    """
    with undisturbed(passes.model):
        arithmetic = passes.arithmetic()
        costs = [_bare(passes, block, arithmetic) for block in chosen]
        middle = chosen[len(chosen) // 2]
        trace = Trace(passes.model, passes.layers, middle.inputs, arithmetic)
        seen = {name: len(trace.activations(name)) for name in passes.layers}
        gradients: dict[str, LayerGradients] = {}
        trace.backward(torch.ones_like(trace.outputs), gradients.__setitem__)
        del trace
    examples = len(middle.rows)
    work = {
        name: LayerWork(
            layer.d_out,
            layer.d_in,
            seen[name] > examples,
            name in gradients and len(gradients[name].places) > examples,
        )
        for name, layer in passes.layers.items()
    }
    return work, Speeds(**_kernels(passes, work, gradients, queries), blocks=costs)


def _bare(passes: Passes, block: Block, arithmetic: Arithmetic) -> BlockCost:
    held: dict[int, int] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def run(arithmetic: Arithmetic = arithmetic) -> int:
        trace = Trace(passes.model, passes.layers, block.inputs, arithmetic)
        trace.backward(torch.ones_like(trace.outputs), lambda name, gradients: None)
        return trace.tokens

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        tokens = run(nullcontext) * len(block.rows)  # the products that the counter knows
    seconds = _seconds(run, times=1)
    total = counter.get_total_flops() // 2
    return BlockCost(len(block.rows), tokens, seconds, total, sum(held.values()))


def _kernels(
    passes: Passes, work: dict[str, LayerWork], gradients: dict[str, LayerGradients], queries: int
) -> dict[str, float]:
    """Multiply-adds per second of each kind, over all layers that the gradient reached.

    Layers of one shape that work on the same positions are timed once.
    """
    totals = {kind: [0.0, 0.0] for kind in ("covariances", "squares", "factors", "scores")}
    once: dict[LayerWork, dict[str, float]] = {}
    for name, layer_gradients in gradients.items():
        counts = layer_gradients.counts
        layer = work[name]
        adds = {
            "covariances": layer.covariances(counts),
            "squares": layer.squares(counts),
            "factors": layer.factors(counts[:1]),
            "scores": layer.scores(counts, queries),
        }
        if layer not in once:
            once[layer] = _layer_seconds(passes, name, layer_gradients, queries)
        for kind, seconds in once[layer].items():
            totals[kind][0] += adds[kind]
            totals[kind][1] += seconds
    speeds = {kind: adds / seconds for kind, (adds, seconds) in totals.items()}
    return {**speeds, "eigenbases": _eigen_speed(passes)}


def _layer_seconds(
    passes: Passes, name: str, gradients: LayerGradients, queries: int
) -> dict[str, float]:
    layer = passes.layers[name]
    covariances = Covariances(layer.d_out, layer.d_in, layer.dtype, layer.device)
    like = gradients.activations
    basis = Eigenbasis(
        like.new_zeros(layer.d_in, layer.d_in).fill_diagonal_(1),
        like.new_zeros(layer.d_out, layer.d_out).fill_diagonal_(1),
        like.new_ones(layer.d_in),
        like.new_ones(layer.d_out),
        passes.precision,
    )
    total = like.new_ones(layer.d_out, layer.d_in)
    factors = {name: like.new_ones(queries, layer.d_out, layer.d_in)}
    curvature = {name: LayerCurvature(basis, total.clone())}
    first = _first_example(gradients)
    consume = keep_solved(factors, [0], curvature, 1.0)

    def covariance() -> None:
        covariances.add_activations(gradients.activations, gradients.examples)
        covariances.add_output_gradients(gradients.output_gradients)

    def factor() -> None:
        consume(name, first)
        take_out_of_basis(factors[name][:1], basis)

    return {
        "covariances": _seconds(covariance),
        "squares": _seconds(lambda: add_squares(total, gradients, basis)),
        "factors": _seconds(factor),
        "scores": _seconds(lambda: products(factors[name], gradients)),
    }


def _first_example(gradients: LayerGradients) -> LayerGradients:
    count = gradients.counts[0]
    return LayerGradients(
        gradients.activations[:count],
        gradients.output_gradients[:count],
        gradients.places[:count],
        1,
        gradients.tokens,
    )


def _eigen_speed(passes: Passes) -> float:
    widths = [width for layer in passes.layers.values() for width in (layer.d_out, layer.d_in)]
    size = min(LARGEST_EIGENPROBLEM, max(widths))
    device = next(iter(passes.layers.values())).device
    matrix = torch.rand(size, size, dtype=torch.float64, device=device)
    matrix = matrix @ matrix.T
    return size**3 * 9 // 2 / _seconds(lambda: torch.linalg.eigh(matrix))


def _seconds(work: Callable[[], object], warm_ups: int = 1, times: int = 2) -> float:
    """The quickest of a few runs after the first: the others were disturbed."""
    for _ in range(warm_ups):
        work()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        _wait_for_devices()
        found.append(time.perf_counter() - start)
    return max(min(found), 1e-9)


def _wait_for_devices() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
