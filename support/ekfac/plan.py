"""What `fit`, `score` and `self_influences` will cost, before they run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from support.ekfac.blocks import Batch, Block, pools_of
from support.ekfac.calibration import BlockCost, calibrated
from support.ekfac.counting import LayerWork, curvature_entries
from support.ekfac.errors import EmptyLoader
from support.ekfac.memory import factor_bytes, queries_at_a_time
from support.ekfac.passes import Passes

Lengths = list[list[int]]
"""Real positions of every example, block by block."""


@dataclass(frozen=True)
class Cost:
    """Multiply-adds, and the seconds that they are expected to take on this machine."""

    multiply_adds: int
    seconds: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.multiply_adds + other.multiply_adds, self.seconds + other.seconds)


@dataclass(frozen=True)
class Plan:
    """Counts are exact for the layers and lengths at hand; seconds come from a short calibration.

    `score` is None without queries. `peak_bytes` is what the engine holds at most on top of the model
    and the data: an estimate. `str(plan)` is a table.
    """

    examples: int
    tokens: int
    queries: int
    query_blocks: int
    fit: Cost
    self_influences: Cost
    score: Cost | None
    curvature_bytes: int
    factor_bytes: int
    peak_bytes: int

    def __str__(self) -> str:
        rows = {"fit": self.fit, "self-influences": self.self_influences}
        if self.score is not None:
            rows[f"score, {self.queries} queries"] = self.score
        lines = [f"{self.examples} training examples, {self.tokens} tokens"]
        lines += [
            f"{what:20} {cost.multiply_adds / 1e9:12.1f} G multiply-adds {cost.seconds:9.1f} s"
            for what, cost in rows.items()
        ]
        lines += [
            f"{what:20} {size / 2**20:12.1f} MB"
            for what, size in {
                "curvature": self.curvature_bytes,
                "query factors": self.factor_bytes,
                "peak": self.peak_bytes,
            }.items()
        ]
        if self.query_blocks > 1:
            lines.append(
                f"The queries are scored in {self.query_blocks} groups, each with a pass of its own."
            )
        return "\n".join(lines)


def make_plan(
    passes: Passes,
    train: Iterable[Batch],
    test: Iterable[Batch],
    budget: int | None,
    covariance_share: float | int,
    corrects_eigenvalues: bool,
) -> Plan:
    """The plan for these examples. Raises `EmptyLoader`, and what a forward pass raises."""
    blocks = [block for pool in pools_of(train, passes.token_mask) for block in pool.blocks]
    if not blocks:
        raise EmptyLoader("The training loader gave no batch.")
    query_blocks = [block for pool in pools_of(test, passes.token_mask) for block in pool.blocks]
    queries = sum(len(block.rows) for block in query_blocks)
    group = min(queries, queries_at_a_time(passes.layers, budget))
    by_length = sorted(blocks, key=lambda block: block.inputs.shape[1])
    chosen = [by_length[0], by_length[len(by_length) // 2], by_length[-1]]
    work, speeds = calibrated(passes, chosen, max(1, min(group, 10)))
    train_lengths = [_lengths(block, passes) for block in blocks]
    layers = list(work.values())
    bare = _bare(blocks, speeds.blocks)
    squares = _sum(layers, train_lengths, LayerWork.squares, speeds.squares)
    eigen_adds = sum(layer.eigenbasis() for layer in layers)
    covariances = bare + _sum(layers, train_lengths, LayerWork.covariances, speeds.covariances)
    fit = Cost(
        int(covariances.multiply_adds * covariance_share), covariances.seconds * covariance_share
    ) + Cost(eigen_adds, eigen_adds / speeds.eigenbases)
    if corrects_eigenvalues:
        fit += bare + squares
    score, groups = None, 0
    if queries:
        groups = -(-queries // group)
        score = _bare(query_blocks, speeds.blocks)
        test_lengths = [_lengths(block, passes) for block in query_blocks]
        score += _sum(layers, test_lengths, LayerWork.factors, speeds.factors)
        for start in range(0, queries, group):
            count = min(group, queries - start)
            adds = sum(
                layer.scores(lengths, count) for layer in layers for lengths in train_lengths
            )
            score += bare + Cost(adds, adds / speeds.scores)
    itemsize = max(layer.dtype.itemsize for layer in passes.layers.values())
    curvature = curvature_entries(passes.layers.values()) * itemsize
    widest = max(max(layer.d_in, layer.d_out) for layer in layers)
    entries = max(layer.d_in * layer.d_out for layer in layers)
    most = max(len(block.rows) for block in blocks)
    graph = max(cost.graph_bytes for cost in speeds.blocks)
    # Two rotated copies of the widest layer's rows, or per-example gradients, or an eigenproblem.
    rows = 2 * max(cost.tokens for cost in speeds.blocks) * widest * itemsize
    temporaries = max(graph + max(rows, most * entries * itemsize), 4 * widest**2 * 8)
    factors = queries * factor_bytes(passes.layers)
    return Plan(
        sum(map(len, train_lengths)),
        sum(map(sum, train_lengths)),
        queries,
        groups,
        fit,
        bare + squares,
        score,
        curvature,
        factors,
        curvature + group * factor_bytes(passes.layers) + temporaries,
    )


def _lengths(block: Block, passes: Passes) -> list[int]:
    if passes.token_mask is not None:
        return passes.token_mask(block.inputs).sum(dim=1).tolist()
    tokens = block.inputs.shape[1] if block.inputs.ndim > 2 else 1
    return [tokens] * len(block.rows)


def _sum(
    layers: list[LayerWork],
    lengths: Lengths,
    count: Callable[[LayerWork, list[int]], int],
    speed: float,
) -> Cost:
    adds = sum(count(layer, block) for layer in layers for block in lengths)
    return Cost(adds, adds / speed)


def _bare(blocks: list[Block], costs: list[BlockCost]) -> Cost:
    """Forward and backward passes: per token a constant and a part that grows with the length."""
    tokens = torch.tensor([cost.tokens for cost in costs], dtype=torch.float64)
    lengths = tokens / torch.tensor([cost.examples for cost in costs], dtype=torch.float64)
    terms = torch.stack([tokens, tokens * lengths], dim=1)
    measured = torch.tensor(
        [[cost.multiply_adds, cost.seconds] for cost in costs], dtype=torch.float64
    )
    sizes = [(_size(block, costs[0]), len(block.rows)) for block in blocks]
    wanted = sum(
        torch.tensor([size, size * size / examples], dtype=torch.float64)
        for size, examples in sizes
    )
    # The pseudo-inverse, because all blocks may have one length.
    multiply_adds, seconds = wanted @ torch.linalg.pinv(terms) @ measured
    return Cost(round(multiply_adds.item()), seconds.item())


def _size(block: Block, like: BlockCost) -> int:
    """Tokens of a block, padding included, as the calibration counts them."""
    by_token = block.inputs.ndim == 2 and not block.inputs.is_floating_point()
    return block.inputs.numel() if by_token else len(block.rows) * like.tokens // like.examples
