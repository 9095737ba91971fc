"""Asking at once: a short vector of every training example, made once, and a question that looks at those."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd
import torch

from support.ekfac.index import EkfacIndex, in_bytes
from support.ekfac.scores import refuse_not_finite
from support.job.errors import BadSetting
from support.job.examples import Examples
from support.job.score import counted, load_curvature
from support.job.store import in_blocks
from support.job.top import described, readable
from support.job.work import Job

NAME, SCALES = "sketches", "sketch_scales"


def index(job: Job) -> str:
    """The vectors of all training examples, into `sketches` and `sketch_scales`. Raises as `score` does."""
    job.begin()
    load_curvature(job)
    job.settle({"damping": asdict(job.damping)})
    made, training = EkfacIndex(job.engine, job.given["numbers"]), job.training
    device = job.engine.passes.device
    numbers, block = range(made.sketches.shape[1]), job.subject.block
    for name, kept, sizes in ((SCALES, made.scales, ()), (NAME, made.sketches, (len(numbers),))):
        make = partial(job.store.make_array, name, (len(training), *sizes), (block, *sizes), kept.dtype)
        job.team.on_first(make)
    blocks = in_blocks(len(training), job.subject.block)
    missing = job.team.on_first(lambda: [one for one in blocks if not job.store.has(NAME, (one, numbers))])
    with counted(job, "index", [missing]) as count:
        for block in job.team.shared("index", missing):
            found = training.added_up(made.sketched([training.batch(block, device)]).T, block).T
            found, scales = in_bytes(refuse_not_finite(found, job.engine.hessian_regularization))
            job.store.write(SCALES, (block,), scales.numpy(force=True))
            job.store.write(NAME, (block, numbers), found.numpy(force=True))
            count(len(block))
        job.team.wait()
    size = len(numbers) + made.scales.element_size()
    told = f"Indexed {len(training):,} training examples, {size:,} bytes each, for: ask"
    return f"{told}. By Λ they keep {made.share:.1%} of the mean squared influence."


def ask(job: Job, texts: Sequence[str]) -> Iterator[str]:
    """For each text as the model answers it, the training examples with the largest influence by `sketches`,
    computed anew from their texts: a table, and the time that it took. A pass over the training examples is
    not needed. Raises `StepMissing` without an index, and `BadSetting` for an empty text."""
    if empty := [text for text in texts if not text.strip()]:
        raise BadSetting(f"ask {empty[0]!r}: there is nothing to read. Say a text.")
    shape = job.team.on_first(lambda: job.store.array(NAME).shape)
    load_curvature(job)
    if job.team.rank:  # from here on nothing may be asked of the team
        return
    made = EkfacIndex(job.engine, shape[1])
    queries = job.task.asked(texts, job.store.tokens, job.question)
    made.sketches = torch.from_numpy(job.store.read(NAME, tuple(map(range, shape))))
    made.scales = torch.from_numpy(job.store.read(SCALES, (range(shape[0]),)))
    with torch.no_grad():
        said = job.task.said(queries, range(len(queries)), job.engine.passes.device)
    for number, text in enumerate(texts):
        start = time.perf_counter()
        scores = made.ask(*queries.batch([number], job.engine.passes.device)).sum(dim=0)
        looked = time.perf_counter()
        nearest = scores.abs().topk(min(job.given["exact"], len(scores))).indices.sort().values.numpy()
        exact = _influences(job, queries, number, nearest)
        done = time.perf_counter()
        order = np.argsort(-np.abs(exact), kind="stable")[: job.given["count"]]
        rows = job.training.rows[nearest[order]]
        table = pd.DataFrame({"training_row": rows, "score": exact[order]})
        about = described(job, job.training, rows, []).reset_index(drop=True)
        shown = pd.DataFrame(job.training.described(nearest[order].tolist()))
        answer = ", ".join(str(one[number]) for name, one in said.items() if name == "predicted")
        yield (
            f"\n{text}{f' → {answer}' if answer else ''}\n{readable(table.join(about).join(shown))}\n"
            f"{len(scores):,} training examples looked at in {looked - start:.2f} s, with the question's own "
            f"passes; the first {len(nearest)} computed exactly in {done - looked:.1f} s."
        )


def _influences(job: Job, queries: Examples, number: int, nearest: np.ndarray) -> np.ndarray:
    """The exact ones of these training examples on a query."""
    device, found = job.engine.passes.device, []
    factors = job.engine.influence_factors(*queries.batch([number], device))
    for block in in_blocks(len(nearest), job.subject.block):
        own = nearest[block].tolist()
        scores = job.engine.influences_from_factors(factors, *job.training.batch(own, device))
        found.append(job.training.added_up(scores.sum(dim=0), own).numpy(force=True))
    return np.concatenate(found)
