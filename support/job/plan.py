"""What a job will cost on this machine, before it starts: counted, and timed on a few examples."""

import shutil
from dataclasses import replace

from torch.utils.data import DataLoader

from support.ekfac.plan import make_plan
from support.job.examples import Examples
from support.job.store import in_blocks
from support.job.team import device
from support.job.work import Job

TOKEN_BYTES = 8


def _batches(examples: Examples, size: int) -> DataLoader:
    """Examples in order, `size` at a time, read from the disk when they are asked for."""
    blocks = in_blocks(len(examples), size)
    return DataLoader(blocks, batch_size=None, collate_fn=lambda block: examples.batch(block, device()))


def planned(job: Job) -> str:
    """A table: time for as many processes as are here, memory of each, bytes on disk."""
    engine, block, query_group, size = job.engine, job.subject.block, job.query_group(), job.team.size
    engine.query_rank = job.question.query_rank or None
    queries = _batches(job.queries, query_group)
    plan = make_plan(engine, _batches(job.training, block), queries, query_group)
    if job.fitted_on is not job.training:
        fit = make_plan(engine, _batches(job.fitted_on, block), (), query_group)
        plan = replace(plan, fit_seconds=fit.fit_seconds)
    seconds = {"fit": plan.fit_seconds, "self": plan.self_seconds, "score": plan.score_seconds}
    kept = 1 + (len(engine.layers) if job.question.by_layer else 0)
    folder = job.store.folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    sizes = {
        # The curvature is there once more while it is written to the disk.
        "memory of a process": plan.peak_bytes + plan.curvature_bytes,
        "disk: curvature": plan.curvature_bytes,
        "disk: fit, on the way": (1 + size) * plan.curvature_bytes,
        # Before compression, which gains little on scores.
        "disk: scores": len(job.queries) * len(job.training) * engine.passes.dtype.itemsize * kept,
        "disk: tokens": TOKEN_BYTES * plan.tokens,
        "disk: free": shutil.disk_usage(existing).free,
    }
    counts = f"{len(job.training):,} training examples, {plan.tokens:,} tokens; {len(job.queries):,} queries"
    lines = [
        f"{counts}; {size} process{'es' if size > 1 else ''}",
        *(f"{step:24} {_time(each / size):>15}" for step, each in seconds.items()),
        *(f"{what:24} {_size(bytes_):>15}" for what, bytes_ in sizes.items()),
    ]
    if plan.score_groups > 1:
        lines.append(f"The queries are scored in {plan.score_groups} groups, each with a pass of its own.")
    return "\n".join(lines)


def _size(bytes_: int) -> str:
    return f"{bytes_ / 1e6:,.0f} MB" if bytes_ >= 10e6 else f"{bytes_ / 1e3:,.0f} kB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
