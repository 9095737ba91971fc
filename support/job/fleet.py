"""What a job would cost on machines that one doesn't have: on paper, from the counted formulas.

The engine's own arithmetic is counted in `counting`. A pass of one example of T tokens takes, per token,
each of P weights once forwards and once backwards (activations' gradients only), and in each of L
attention blocks of width w 2·T·w forwards and twice that backwards: T·(2P + 6·L·T·w).
"""

import math
from dataclasses import dataclass

from support.ekfac.counting import LayerWork, curvature_entries
from support.job.errors import BadSetting


@dataclass(frozen=True)
class Shape:
    """A transformer: its tracked layers, each with how often it occurs; `weights` that a token meets."""

    tracked: tuple[tuple[int, LayerWork], ...]
    weights: int
    weight_bytes: int
    attention_blocks: int
    width: int

    def passes(self, examples: int, tokens: int) -> int:
        """Multiply-adds of a forward and a backward pass of every example."""
        attention = 6 * self.attention_blocks * self.width * tokens
        return examples * tokens * (2 * self.weights + attention)


PACKAGED = (  # six blocks of width 384, feed-forward 1536; the last block hears its first token only
    *((5, LayerWork(1536, 385, True, True)), (5, LayerWork(384, 1537, True, True))),
    *((1, LayerWork(1536, 385, True, False)), (1, LayerWork(384, 1537, True, False))),
    *((1, LayerWork(384, 385, False, False)), (1, LayerWork(2, 385, False, False))),
)
# Grattafiori et al. 2024, table 3: 32 blocks of width 4096, feed-forward 14,336, keys and values of
# width 1024, 128,256 words. Tracked are the three feed-forward matrices, as in Grosse et al. 2023.
LLAMA = ((64, LayerWork(14336, 4096, True, True)), (32, LayerWork(4096, 14336, True, True)))
LLAMA_WEIGHTS = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 128256 * 4096
SHAPES = {
    "packaged": Shape(PACKAGED, 6 * (4 * 384**2 + 2 * 384 * 1536), 4, 6, 384),
    "llama-3-8b": Shape(LLAMA, LLAMA_WEIGHTS, 2, 32, 4096),
}


def on_paper(
    shape: Shape, examples: int, tokens: int, queries: int, fit_examples: int, memory: float | int
) -> dict[str, int | float]:
    """Multiply-adds of each step, bytes, and how the work is cut to fit `memory` bytes of a device.

    The layers are taken in `groups`, each a job of its own (`--layers`), because influences add up over
    layers; `at_a_time` queries have room beside the curvature of a group, so that the training set
    passes by `passes` times: as rarely as possible. Raises `BadSetting` when the weights leave no room.
    """
    layers = [layer for often, layer in shape.tracked for _ in range(often)]
    weights = shape.weights * shape.weight_bytes
    curvature = 4 * curvature_entries(layers)  # in float32, as factors and scores
    factor = 4 * sum(layer.d_in * layer.d_out for layer in layers)
    cuts = []
    for groups in range(1, len(layers) + 1):
        room = groups * (memory - weights) - curvature
        at_a_time = min(queries, int(room // factor))
        if at_a_time >= 1:
            cuts.append((groups * math.ceil(queries / at_a_time), groups, at_a_time))
    if not cuts:
        raise BadSetting(
            f"The weights ({weights / 1e9:.0f} GB) leave no room for a layer's curvature and a query in "
            f"{memory / 1e9:.0f} GB. Use devices with more memory."
        )
    passes, groups, at_a_time = min(cuts)

    def work(step: str, *of: list[int] | int) -> int:
        return sum(getattr(layer, step)(*of) for layer in layers)

    one, squares = [tokens], work("squares", [tokens])
    whole, rest = divmod(queries, at_a_time)
    products = whole * work("scores", one, at_a_time) + work("scores", one, rest)
    fit = 2 * groups * shape.passes(fit_examples, tokens) + work("eigenbasis")
    asked = groups * shape.passes(queries, tokens) + queries * work("factors", one)
    pass_by = shape.passes(examples, tokens)
    return {
        "fit": fit + fit_examples * (work("covariances", one) + squares),
        "self-influences": groups * pass_by + examples * squares,
        "score": asked + passes * pass_by + examples * products,
        "curvature": curvature,
        "factors of one query": factor,
        "largest on a device": weights + (curvature + at_a_time * factor) / groups,
        "scores on disk": 4 * queries * examples,
        **{"groups": groups, "at_a_time": at_a_time, "passes": passes},
    }


def told(plan: dict[str, int | float], operations: float | int) -> str:
    """The plan as a table, with hours at so many operations a second of all devices together."""
    rows = []
    for name in ("fit", "self-influences", "score"):  # a multiply-add is two operations
        hours = 2 * plan[name] / operations / 3600
        rows.append(f"{name:24} {plan[name]:10.3g} multiply-adds {hours:10.2f} h")
    for name in ("curvature", "factors of one query", "largest on a device", "scores on disk"):
        rows.append(f"{name:24} {plan[name] / 1e9:10.1f} GB")
    if plan["groups"] > 1:
        cut = f"The layers are taken in {plan['groups']} groups, a job each (--layers)"
        rows.append(f"{cut}; their scores add up.")
    if plan["passes"] > plan["groups"]:
        cut = f"{plan['at_a_time']} queries fit at a time"
        rows.append(f"{cut}: the training set passes by {plan['passes']} times.")
    return "\n".join(rows)
