"""What a job would cost on machines that one doesn't have: on paper, from the counted formulas.

A pass of one example of T tokens takes, per token, each of P weights once forwards and once backwards
(activations' gradients only), and in each of L attention blocks of width w 2·T·w forwards and twice that
backwards: T·(2P + 6·L·T·w) multiply-adds. Every position of a tracked layer counts as one with a gradient.
"""

import math
from dataclasses import dataclass

import numpy as np

from support.job.errors import BadSetting


@dataclass(frozen=True)
class Shape:
    """A transformer: tracked layers as `(d_out, d_in)`, weights that a token meets, blocks of a width."""

    tracked: tuple[tuple[int, int], ...]
    weights: int
    weight_bytes: int
    attention_blocks: int
    width: int

    def passes(self, examples: int, tokens: int) -> int:
        """Multiply-adds of a forward and a backward pass of every example."""
        attention = 6 * self.attention_blocks * self.width * tokens
        return examples * tokens * (2 * self.weights + attention)


def llama(blocks: int, width: int, feed_forward: int, keys: int, words: int, weight_bytes: int) -> Shape:
    """Tracked are the three feed-forward matrices of each block, as in Grosse et al. 2023."""
    tracked = blocks * ((feed_forward, width), (feed_forward, width), (width, feed_forward))
    weights = blocks * width * (2 * width + 2 * keys + 3 * feed_forward) + words * width
    return Shape(tracked, weights, weight_bytes, blocks, width)


# The packaged classifier's last block and head hear their first token only; they are counted as if they
# heard all.
PACKAGED = 6 * ((1536, 385), (384, 1537)) + ((384, 385), (2, 385))
SHAPES = {
    "packaged": Shape(PACKAGED, 6 * (4 * 384**2 + 2 * 384 * 1536), 4, 6, 384),
    "smollm2-135m": llama(30, 576, 1536, keys=192, words=49152, weight_bytes=4),
    # Grattafiori et al. 2024, table 3.
    "llama-3-8b": llama(32, 4096, 14336, keys=1024, words=128256, weight_bytes=2),
}


def on_paper(
    shape: Shape, examples: int, tokens: int, queries: int, fit_examples: int, memory: float | int, rank: int
) -> dict[str, int | float]:
    """Multiply-adds of each step, bytes, and how the work is cut to fit `memory` bytes of a device.

    The layers are taken in `groups`, each a job of its own (`--layers`), because influences add up over
    layers; `at_a_time` queries have room beside the curvature of a group, so that the training set
    passes by `passes` times: as rarely as possible. With a `rank` a query is kept at that rank once its
    whole factors are known. Raises `BadSetting` when the weights leave no room.
    """
    d_out, d_in = np.array(shape.tracked, dtype=np.float64).T
    size, weights = d_out * d_in, shape.weights * shape.weight_bytes
    # In float32: two bases, Λ, and the eigenvalues of the two covariances of each layer.
    curvature = 4 * np.sum(d_in**2 + d_out**2 + size + d_in + d_out)
    low = np.minimum(rank, np.minimum(d_out, d_in)) * (d_out + d_in)
    factor, whole = (4 * np.sum(low), 4 * np.sum(size)) if rank else (4 * np.sum(size), 0)
    held, cuts = curvature + whole, []
    for groups in range(1, len(size) + 1):
        at_a_time = min(queries, int((groups * (memory - weights) - held) // factor))
        if at_a_time >= 1:
            cuts.append((groups * math.ceil(queries / at_a_time), groups, at_a_time))
    if not cuts:
        raise BadSetting(
            f"The weights ({weights / 1e9:.0f} GB) leave no room for a layer's curvature and a query in "
            f"{memory / 1e9:.0f} GB. Use devices with more memory."
        )
    passes, groups, at_a_time = min(cuts)
    # A gradient in the eigenbasis: each side is rotated where it has fewer rows.
    rotated = d_in**2 * np.minimum(tokens, d_out) + d_out**2 * np.minimum(tokens, d_in) + tokens * size
    squares = np.sum(rotated + size)
    covariances = tokens * np.sum(d_in**2 + d_out**2)
    # About 9 d³ operations each, half of them multiplications (Golub & Van Loan, §8.3).
    eigenbases = np.sum(d_in**3 + d_out**3) * 9 / 2
    factors = np.sum(rotated + size * (d_out + d_in))  # into the eigenbasis and back
    if rank:
        # A randomised decomposition goes over the factors six times, with eight vectors more than are kept.
        factors += np.sum(6 * (rank + 8) * size)
        products = queries * tokens * np.sum(low)
    else:
        rounds, rest = divmod(queries, at_a_time)
        met = sum(n * min(tokens + q, tokens * q) for n, q in ((rounds, at_a_time), (1, rest)))
        products = np.sum(size) * met
    pass_by = shape.passes(examples, tokens)
    fit = fit_examples * (covariances + squares) + eigenbases
    score = queries * factors + examples * products
    return {
        "fit": 2 * groups * shape.passes(fit_examples, tokens) + fit,
        "self-influences": groups * pass_by + examples * squares,
        "score": groups * shape.passes(queries, tokens) + passes * pass_by + score,
        "curvature": curvature,
        "factors of one query": factor,
        "largest on a device": weights + (held + at_a_time * factor) / groups,
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
        fits = f"{plan['at_a_time']} queries fit at a time"
        rows.append(f"{fits}: {plan['passes']} passes of the training set.")
    return "\n".join(rows)
