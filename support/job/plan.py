"""What a job will cost on this machine, before it starts: counted, and timed on a few examples."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from support.ekfac.memory import factor_bytes
from support.ekfac.plan import Plan
from support.job.examples import Examples
from support.job.sharding import in_blocks
from support.job.team import device
from support.job.work import Job

TOKEN_BYTES = 8


def planned(job: Job) -> Plan:
    """The engine's plan for all training examples and queries of a job, with the fit on its own rows."""
    query_block, block = job.query_block(), job.subject.block
    job.engine.memory_budget = query_block * factor_bytes(job.engine.layers)
    whole = job.engine.plan(
        list(_batches(job.training, block)), list(_batches(job.queries, query_block))
    )
    if job.fitted_on is job.training:
        return whole
    return replace(whole, fit=job.engine.plan(list(_batches(job.fitted_on, block))).fit)


def _batches(examples: Examples, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for block in in_blocks(len(examples), size):
        yield examples.batch(block, device())


def told(job: Job, plan: Plan) -> str:
    """The plan as a table: time for as many processes as are here, memory of each, bytes on disk."""
    size = job.team.size
    steps = {"fit": plan.fit, "self": plan.self_influences, "score": plan.score}
    lines = [
        f"{plan.examples:,} training examples, {plan.tokens:,} tokens; {plan.queries:,} queries; "
        f"{size} process{'es' if size > 1 else ''}"
    ]
    lines += [
        f"{name:24} {cost.multiply_adds:12.3g} multiply-adds {_time(cost.seconds / size):>12}"
        for name, cost in steps.items()
    ]
    lines += [
        f"{name:24} {_size(bytes_):>15}"
        for name, bytes_ in {
            "memory of a process": process_bytes(plan),
            "disk: curvature": plan.curvature_bytes,
            "disk: fit, on the way": (1 + size) * plan.curvature_bytes,
            "disk: scores": score_bytes(job, plan),
            "disk: tokens": TOKEN_BYTES * plan.tokens,
            "disk: free": shutil.disk_usage(_existing(job.store.folder)).free,
        }.items()
    ]
    if plan.query_blocks > 1:
        lines.append(
            f"The queries are scored in {plan.query_blocks} groups, each with a pass of its own."
        )
    return "\n".join(lines)


def process_bytes(plan: Plan) -> int:
    """What a process takes at most where its layers live: an estimate.

    What this one has by now, with libraries, model and examples on a CPU; what the engine adds; and the
    copy of the curvature that is written to the disk.
    """
    on_gpu = device().type == "cuda"
    held = torch.cuda.memory_reserved() if on_gpu else psutil.Process().memory_info().rss
    return held + plan.peak_bytes + plan.curvature_bytes


def score_bytes(job: Job, plan: Plan) -> int:
    """Before compression, which gains little on scores."""
    layers = len(job.engine.layers) if job.question.by_layer else 0
    itemsize = max(layer.dtype.itemsize for layer in job.engine.layers.values())
    return plan.queries * plan.examples * itemsize * (1 + layers)


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _size(bytes_: int) -> str:
    return f"{bytes_ / 2**20:,.0f} MB" if bytes_ >= 10 * 2**20 else f"{bytes_ / 2**10:,.0f} kB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
