"""Influences of a whole training set, by all processes of a job, one chunk of the store at a time.

A chunk depends on its own examples and queries alone, so whoever computes it, whenever, computes the same.
"""

from contextlib import AbstractContextManager
from dataclasses import asdict

import torch
from torch import Tensor

from support.ekfac.blocks import ON_CPU
from support.ekfac.errors import DamagedFile, WrongModel
from support.ekfac.low_rank import LowRank, no_factors, tensors_of
from support.ekfac.scores import Factors, kept_share
from support.job.errors import StepMissing, StoreDamaged, refuse_all
from support.job.settings import mismatch
from support.job.store import FIT_AGAIN, in_blocks
from support.job.team import progress
from support.job.work import Job


def score(job: Job) -> str:
    """Influence of every training example on every query, into `scores`, by layer on demand.

    The training examples that are not scored yet pass by once for each group of queries. Raises what the
    engine, `Job.begin` and `Job.ask` raise, `StepMissing` without a fit, `StoreDamaged`, and `DiskFull`.
    """
    job.begin()
    load_curvature(job)
    job.ask()
    job.engine.query_rank = job.question.query_rank or None
    training, queries, by_layer = len(job.training), len(job.queries), job.question.by_layer
    names = ["scores", "layer_scores"] if by_layer else ["scores"]
    groups = in_blocks(queries, job.team.on_first(lambda: _make_arrays(job, names, job.query_group())))
    missing = job.team.on_first(lambda: [_missing(job, names, group) for group in groups])
    kept: list[float] = []
    with counted(job, "score", missing) as count:
        for number, (group, blocks) in enumerate(zip(groups, missing, strict=True)):
            factors = _factors(job, group) if blocks else {}
            kept += _kept(factors)
            for block in job.team.shared(f"score {number}", blocks):
                x, y = job.training.batch(block, job.engine.passes.device)
                by_name = job.engine.influences_by_layer_from_factors(factors, x, y)
                layers = job.training.added_up(torch.stack(list(by_name.values())), block)
                if by_layer:
                    job.store.write("layer_scores", (group, block), layers.numpy(force=True))
                job.store.write("scores", (group, block), layers.sum(dim=0).numpy(force=True))
                count(len(block))
        job.team.wait()
    low = f" At rank {job.question.query_rank} of each query {min(kept):.1%} or more is kept." if kept else ""
    asked = f"{queries:,} queries" if queries > 1 else "one query"
    return f"Scored {training:,} training examples on {asked}.{low}"


def self_influences(job: Job) -> str:
    """⟨(F + λ)⁻¹ ∇loss, ∇loss⟩ of every training example, into `self_influences`. Raises as `score` does."""
    job.begin()
    load_curvature(job)
    job.settle({"damping": asdict(job.damping)})
    name, training = "self_influences", len(job.training)
    array = (training,), (job.subject.block,), job.engine.passes.dtype
    job.team.on_first(lambda: job.store.make_array(name, *array))
    missing = job.team.on_first(lambda: _missing(job, [name]))
    with counted(job, "self", [missing]) as count:
        for block in job.team.shared("self", missing):
            job.store.write(name, (block,), _self_influences(job, block).numpy(force=True))
            count(len(block))
        job.team.wait()
    return f"Self-influence of {training:,} training examples."


def _self_influences(job: Job, block: range) -> Tensor:
    """Of each example. The pieces of one are on each other's, too."""
    engine, device = job.engine, job.engine.passes.device
    engine.query_rank = None
    found = engine.self_influences(*job.training.batch(block, device))
    counts = job.training.added_up(torch.ones_like(found), block)
    result = job.training.added_up(found, block)
    for place in (counts > 1).nonzero()[:, 0].tolist():
        pieces = [job.training.batch([block[place]], device)]
        result[place] = engine.score(pieces, pieces).sum()
    return result


def load_curvature(job: Job) -> None:
    """Give the engine the curvature in the store. Raises `StepMissing` and `StoreDamaged`."""
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
        refuse_all(mismatch({"--query-block": found}, {"--query-block": query_group}))
    return found


def _missing(job: Job, names: list[str], *group: range) -> list[range]:
    """The blocks of training examples that one of these arrays lacks for a group of queries."""
    blocks = in_blocks(len(job.training), job.subject.block)
    return [block for block in blocks if not all(job.store.has(name, (*group, block)) for name in names)]


def _factors(job: Job, group: range) -> Factors:
    """Each process preconditions some of the queries, in the same pieces for any number of processes."""
    passes, rank = job.engine.passes, job.engine.query_rank
    room = {
        name: no_factors(passes.zeros, (len(group), layer.d_out, layer.d_in), rank)
        for name, layer in passes.layers.items()
    }
    # At low rank one by one: what else is decomposed with a query changes its last digits.
    pieces = in_blocks(len(group), 1 if rank else ON_CPU.examples)
    for piece in pieces[job.team.rank :: job.team.size]:
        numbers = group[piece.start : piece.stop]
        x, y = job.queries.batch(numbers, passes.device)
        for name, own in job.engine.influence_factors(x, y, job.queries.weights(numbers)).items():
            for whole, part in zip(tensors_of(room[name]), tensors_of(own), strict=True):
                whole[piece.start : piece.stop] = part
    for factor in room.values():
        for tensor in tensors_of(factor):
            job.team.add_up(tensor)
    return room


def _kept(factors: Factors) -> list[float]:
    """The share of each query's squared norm that its low rank keeps."""
    low = isinstance(next(iter(factors.values()), None), LowRank)
    return kept_share(factors).tolist() if low else []


def counted(job: Job, stage: str, missing: list[list[range]]) -> AbstractContextManager:
    """Counts training examples, as often as they pass by; what is not missing is done."""
    total = len(missing) * len(job.training)
    to_do = sum(len(block) for blocks in missing for block in blocks)
    return progress(job.team, stage, total, total - to_do, job.given["tell_seconds"])
