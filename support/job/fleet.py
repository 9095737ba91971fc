"""What a job would cost on machines that one doesn't have: on paper, from the counted formulas.

A transformer is known by the shapes of its layers. The multiply-adds of the engine's own arithmetic
are those of `counting`; a pass of one example of T tokens takes, per token, each weight once forwards and
once backwards (activations' gradients only), and in each of L attention blocks of width w 2·T·w forwards
and twice that backwards: T·(2P + 6·L·T·w).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from support.ekfac.counting import LayerWork, curvature_entries
from support.job.errors import BadSetting

CURVATURE_BYTES = 4
"""Curvature and factors are kept in float32."""


@dataclass(frozen=True)
class Shape:
    """A transformer: its tracked layers with how often each occurs, the weights that every token
    meets in a forward pass, and its attention. `weight_bytes` is what one weight takes in memory."""

    tracked: tuple[tuple[int, LayerWork], ...]
    weights: int
    attention_blocks: int
    width: int
    weight_bytes: int

    def passes(self, examples: int, tokens: int) -> int:
        """Multiply-adds of a forward and a backward pass of every example."""
        attention = 6 * self.attention_blocks * self.width * tokens
        return examples * tokens * (2 * self.weights + attention)

    def layers(self) -> Iterator[LayerWork]:
        for count, layer in self.tracked:
            yield from [layer] * count

    @property
    def curvature_bytes(self) -> int:
        """What a fit of all tracked layers leaves."""
        return CURVATURE_BYTES * curvature_entries(self.layers())

    @property
    def factor_bytes(self) -> int:
        """The preconditioned gradient of one query."""
        return CURVATURE_BYTES * sum(layer.d_in * layer.d_out for layer in self.layers())


def _everywhere(d_out: int, d_in: int) -> LayerWork:
    return LayerWork(d_out, d_in, sees_positions=True, hears_positions=True)


def _once(d_out: int, d_in: int) -> LayerWork:
    return LayerWork(d_out, d_in, sees_positions=False, hears_positions=False)


SHAPES = {
    # Six blocks of width 384, feed-forward 1536; the last block hears its first token only.
    "packaged": Shape(
        (
            (5, _everywhere(1536, 385)),
            (5, _everywhere(384, 1537)),
            (1, LayerWork(1536, 385, sees_positions=True, hears_positions=False)),
            (1, LayerWork(384, 1537, sees_positions=True, hears_positions=False)),
            (1, _once(384, 385)),
            (1, _once(2, 385)),
        ),
        weights=6 * (4 * 384**2 + 2 * 384 * 1536),
        attention_blocks=6,
        width=384,
        weight_bytes=4,
    ),
    # Grattafiori et al. 2024, table 3: 32 blocks of width 4096, feed-forward 14,336, keys and values of
    # width 1024, 128,256 words. Tracked are the three feed-forward matrices, as in Grosse et al. 2023.
    "llama-3-8b": Shape(
        ((64, _everywhere(14336, 4096)), (32, _everywhere(4096, 14336))),
        weights=32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096,
        attention_blocks=32,
        width=4096,
        weight_bytes=2,
    ),
}


@dataclass(frozen=True)
class Fleet:
    """Devices of one kind: operations a second that each sustains, and bytes of memory."""

    devices: int
    flops: float | int
    memory: float | int

    def seconds(self, multiply_adds: int) -> float:
        """Two operations each, spread evenly."""
        return 2 * multiply_adds / (self.devices * self.flops)


@dataclass(frozen=True)
class PaperPlan:
    """Multiply-adds of each step, how the work is cut to fit a device, and bytes on disk.

    The tracked layers are taken in `layer_groups`, each a job of its own (`--layers`), because influences
    add up over layers; `queries_at_a_time` have room beside the curvature of such a group.
    """

    fit: int
    self_influences: int
    score: int
    layer_groups: int
    queries_at_a_time: int
    query_groups: int
    device_bytes: float
    score_bytes: int


def on_paper(
    shape: Shape, fleet: Fleet, examples: int, tokens: int, queries: int, fit_examples: int
) -> PaperPlan:
    """The plan for `examples` of `tokens` each, curvature from `fit_examples` of them.

    Raises `BadSetting` for numbers below one, and when the model's weights alone don't fit a device.
    """
    numbers = {"examples": examples, "tokens": tokens, "queries": queries}
    for name, number in {**numbers, "fit-examples": fit_examples, "devices": fleet.devices}.items():
        if number < 1:
            raise BadSetting(f"--{name} {number}: use 1 or more.")
    if fleet.flops <= 0:
        raise BadSetting("--teraflops: use a number above 0.")
    groups, at_a_time = _cut(shape, fleet, queries)
    query_groups = math.ceil(queries / at_a_time)
    layers = list(shape.layers())
    one = [tokens]
    covariances = sum(layer.covariances(one) for layer in layers)
    squares = sum(layer.squares(one) for layer in layers)
    scores = sum(
        layer.scores(one, at_a_time) * (queries // at_a_time)
        + (layer.scores(one, queries % at_a_time) if queries % at_a_time else 0)
        for layer in layers
    )
    eigenbases = sum(layer.eigenbasis() for layer in layers)
    factors = queries * sum(layer.factors(one) for layer in layers)
    fit_passes = groups * shape.passes(fit_examples, tokens)
    passes = groups * shape.passes(examples, tokens)
    return PaperPlan(
        fit=2 * fit_passes + fit_examples * (covariances + squares) + eigenbases,
        self_influences=passes + examples * squares,
        score=groups * shape.passes(queries, tokens)
        + factors
        + query_groups * passes
        + examples * scores,
        layer_groups=groups,
        queries_at_a_time=at_a_time,
        query_groups=query_groups,
        device_bytes=_weights(shape)
        + (shape.curvature_bytes + at_a_time * shape.factor_bytes) / groups,
        score_bytes=CURVATURE_BYTES * queries * examples,
    )


def _weights(shape: Shape) -> int:
    return shape.weights * shape.weight_bytes


def _cut(shape: Shape, fleet: Fleet, queries: int) -> tuple[int, int]:
    """Groups of layers, and queries at a time, with the fewest passes over the training set."""
    room = fleet.memory - _weights(shape)
    best: tuple[int, int, int] | None = None
    for groups in range(1, len(list(shape.layers())) + 1):
        left = room - shape.curvature_bytes / groups
        at_a_time = min(queries, int(left // (shape.factor_bytes / groups)))
        if at_a_time >= 1:
            passes = groups * math.ceil(queries / at_a_time)
            best = min(best or (passes, groups, at_a_time), (passes, groups, at_a_time))
    if best is None:
        raise BadSetting(
            f"The weights ({_weights(shape) / 1e9:.0f} GB) leave no room for a layer's curvature and a "
            f"query in {fleet.memory / 1e9:.0f} GB. Use devices with more memory."
        )
    return best[1], best[2]


def told(plan: PaperPlan, shape: Shape, fleet: Fleet) -> str:
    """The plan as a table with hours on the fleet."""
    rows = [
        f"{name:24} {adds:10.3g} multiply-adds {fleet.seconds(adds) / 3600:10.2f} h"
        for name, adds in {
            "fit": plan.fit,
            "self-influences": plan.self_influences,
            "score": plan.score,
        }.items()
    ]
    rows += [
        f"{name:24} {size / 1e9:10.1f} GB"
        for name, size in {
            "curvature": shape.curvature_bytes,
            "factors of one query": shape.factor_bytes,
            "largest on a device": plan.device_bytes,
            "scores on disk": plan.score_bytes,
        }.items()
    ]
    if plan.layer_groups > 1:
        rows.append(
            f"The layers are taken in {plan.layer_groups} groups, a job each (--layers); their scores "
            "add up."
        )
    if plan.query_groups > 1:
        rows.append(
            f"{plan.queries_at_a_time} queries fit at a time: the training set passes by "
            f"{plan.query_groups * plan.layer_groups} times."
        )
    return "\n".join(rows)
