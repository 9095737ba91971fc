"""What a job would cost on machines that one doesn't have: on paper, from the counted formulas.

A pass of one example of T tokens takes, per token, each of P weights once forwards and once backwards
(activations' gradients only), and in each of L attention blocks of width w 2·T·w forwards and twice that
backwards: T·(2P + 6·L·T·w) multiply-adds. Every position of a tracked layer counts as one with a gradient.
"""

import math
from dataclasses import dataclass

from support.job.errors import BadSetting


@dataclass(frozen=True)
class Layer:
    """Widths of a layer; multiply-adds of its arithmetic for an example, in the engine's cheapest order."""

    d_out: int
    d_in: int

    @property
    def size(self) -> int:
        return self.d_out * self.d_in

    def curvature(self) -> int:
        """Numbers that a fit leaves: two bases, Λ, and the eigenvalues of the two covariances."""
        return self.d_in**2 + self.d_out**2 + self.size + self.d_in + self.d_out

    def eigenbases(self) -> int:
        """About 9 d³ operations each, half of them multiplications (Golub & Van Loan, §8.3)."""
        return (self.d_in**3 + self.d_out**3) * 9 // 2

    def covariances(self, tokens: int) -> int:
        return tokens * (self.d_in**2 + self.d_out**2)

    def rotated(self, tokens: int) -> int:
        """The gradient in the eigenbasis."""
        rotations = self.d_in**2 * min(tokens, self.d_out) + self.d_out**2 * min(tokens, self.d_in)
        return rotations + tokens * self.size

    def squares(self, tokens: int) -> int:
        """Corrected eigenvalues or self-influence: each entry of the rotated gradient squared."""
        return self.rotated(tokens) + self.size

    def factors(self, tokens: int) -> int:
        """Into the eigenbasis and back."""
        return self.rotated(tokens) + self.size * (self.d_out + self.d_in)

    def scores(self, tokens: int, queries: int) -> int:
        """Against the factors of so many queries."""
        return self.size * min(tokens + queries, tokens * queries)


@dataclass(frozen=True)
class Shape:
    """A transformer: its tracked layers, `weights` that a token meets, attention blocks and their width."""

    tracked: tuple[Layer, ...]
    weights: int
    weight_bytes: int
    attention_blocks: int
    width: int

    def passes(self, examples: int, tokens: int) -> int:
        """Multiply-adds of a forward and a backward pass of every example."""
        attention = 6 * self.attention_blocks * self.width * tokens
        return examples * tokens * (2 * self.weights + attention)


# Six blocks of width 384, feed-forward 1536. The last block and the head hear their first token only; they
# are counted as if they heard all.
PACKAGED = 6 * (Layer(1536, 385), Layer(384, 1537)) + (Layer(384, 385), Layer(2, 385))
# Grattafiori et al. 2024, table 3: 32 blocks of width 4096, feed-forward 14,336, keys and values of
# width 1024, 128,256 words. Tracked are the three feed-forward matrices, as in Grosse et al. 2023.
LLAMA = 32 * (Layer(14336, 4096), Layer(14336, 4096), Layer(4096, 14336))
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
    layers, weights = shape.tracked, shape.weights * shape.weight_bytes
    curvature = 4 * sum(layer.curvature() for layer in layers)  # in float32, as factors and scores
    factor = 4 * sum(layer.size for layer in layers)
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
    whole, rest = divmod(queries, at_a_time)
    squares = sum(layer.squares(tokens) for layer in layers)
    fit = sum(layer.covariances(tokens) for layer in layers) + squares
    products = sum(whole * one.scores(tokens, at_a_time) + one.scores(tokens, rest) for one in layers)
    asked = groups * shape.passes(queries, tokens) + queries * sum(one.factors(tokens) for one in layers)
    pass_by = shape.passes(examples, tokens)
    bases = sum(layer.eigenbases() for layer in layers)
    return {
        "fit": 2 * groups * shape.passes(fit_examples, tokens) + fit_examples * fit + bases,
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
        rows.append(f"The layers go in {plan['groups']} groups, a job each (--layers); their scores add up.")
    if plan["passes"] > plan["groups"]:
        rows.append(
            f"{plan['at_a_time']} queries fit at a time: {plan['passes']} passes of the training set."
        )
    return "\n".join(rows)
