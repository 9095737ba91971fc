"""Influences of a whole training set, by all processes of a job, one chunk of the store at a time.

A chunk depends on its own examples and queries alone, so whoever computes it, whenever, computes the same.
"""

from contextlib import AbstractContextManager
from dataclasses import asdict

import torch
from torch import Tensor

from support.ekfac.blocks import EXAMPLES_AT_A_TIME
from support.ekfac.errors import DamagedFile, WrongModel
from support.job.errors import StepMissing, StoreDamaged
from support.job.progress import progress
from support.job.settings import refuse_unless_equal
from support.job.store import FIT_AGAIN, in_blocks
from support.job.work import Job


def score(job: Job) -> str:
    """Influence of every training example on every query, into `scores`, by layer on demand.

    The training examples that are not scored yet pass by once for each group of queries. Raises what the
    engine, `Job.begin` and `Job.ask` raise, `StepMissing` without a fit, `StoreDamaged`, and `DiskFull`.
    """
    _load(job)
    job.ask()
    training, queries, by_layer = len(job.training), len(job.queries), job.question.by_layer
    names = ["scores", "layer_scores"] if by_layer else ["scores"]
    groups = in_blocks(queries, job.team.on_first(lambda: _make_arrays(job, names, job.query_group())))
    missing = job.team.on_first(lambda: [_missing(job, names, group) for group in groups])
    with _progress(job, "score", missing) as count:
        for number, (group, blocks) in enumerate(zip(groups, missing, strict=True)):
            factors = _factors(job, group) if blocks else {}
            for block in job.team.shared(f"score {number}", blocks):
                x, y = job.training.batch(block, job.engine.passes.device)
                by_name = job.engine.influences_by_layer_from_factors(factors, x, y)
                layers = torch.stack(list(by_name.values()))
                if by_layer:
                    job.store.write("layer_scores", (group, block), layers.numpy(force=True))
                job.store.write("scores", (group, block), layers.sum(dim=0).numpy(force=True))
                count(len(block))
        job.team.wait()
    return f"Scored {training:,} training examples on {queries:,} queries."


def self_influences(job: Job) -> str:
    """⟨(F + λ)⁻¹ ∇loss, ∇loss⟩ of every training example, into `self_influences`. Raises as `score` does."""
    _load(job)
    job.settle({"damping": asdict(job.damping)})
    name, training = "self_influences", len(job.training)
    array = (training,), (job.subject.block,), job.engine.passes.dtype
    job.team.on_first(lambda: job.store.make_array(name, *array))
    missing = job.team.on_first(lambda: _missing(job, [name]))
    with _progress(job, "self", [missing]) as count:
        for block in job.team.shared("self", missing):
            x, y = job.training.batch(block, job.engine.passes.device)
            job.store.write(name, (block,), job.engine.self_influences(x, y).numpy(force=True))
            count(len(block))
        job.team.wait()
    return f"Self-influence of {training:,} training examples."


def _load(job: Job) -> None:
    """Give the engine the curvature in the store."""
    job.begin()
    if not job.team.on_first(job.store.fitted):
        raise StepMissing(f"{job.store.folder} has no curvature yet. Run: fit")
    try:
        job.engine.load_curvature(job.store.curvature)
    except (DamagedFile, WrongModel) as error:
        raise StoreDamaged(f"{error} {FIT_AGAIN}.") from error


def _make_arrays(job: Job, names: list[str], query_group: int) -> int:
    """Room for the influences on all queries; so many of them make a chunk."""
    shape, found = (len(job.queries), len(job.training)), query_group
    for name in names:  # `layer_scores` is cut as `scores` is
        layers = (len(job.engine.layers),) if name == "layer_scores" else ()
        chunks = (*layers, found, job.subject.block)
        job.store.make_array(name, layers + shape, chunks, job.engine.passes.dtype)
        found = job.store.array("scores").chunks[0]
    if job.given.get("query_block"):
        refuse_unless_equal("--query-block", found, query_group)
    return found


def _missing(job: Job, names: list[str], *group: range) -> list[range]:
    """The blocks of training examples that one of these arrays lacks for a group of queries."""
    blocks = in_blocks(len(job.training), job.subject.block)
    return [block for block in blocks if not all(job.store.has(name, (*group, block)) for name in names)]


def _factors(job: Job, group: range) -> dict[str, Tensor]:
    """Each process preconditions some of the queries, in the same pieces for any number of processes."""
    passes = job.engine.passes
    factors = {
        name: passes.zeros(len(group), layer.d_out, layer.d_in) for name, layer in passes.layers.items()
    }
    pieces = in_blocks(len(group), EXAMPLES_AT_A_TIME)
    for piece in pieces[job.team.rank :: job.team.size]:
        x, y = job.queries.batch(group[piece.start : piece.stop], passes.device)
        for name, own in job.engine.influence_factors(x, y).items():
            factors[name][piece.start : piece.stop] = own
    for factor in factors.values():
        job.team.add_up(factor)
    return factors


def _progress(job: Job, stage: str, missing: list[list[range]]) -> AbstractContextManager:
    """Counts training examples, as often as they pass by; what is not missing is done."""
    total = len(missing) * len(job.training)
    to_do = sum(len(block) for blocks in missing for block in blocks)
    return progress(job.team, stage, total, total - to_do, job.given["tell_seconds"])
