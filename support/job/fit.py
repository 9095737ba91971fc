"""The curvature from many examples, by all processes of a job, in pieces that survive a kill.

The examples are cut into blocks, the blocks dealt into shards, one for each process that begins the fit. A
shard's sums are written to disk now and then, with the number of blocks in them; a run that goes on takes up
each where it was. With as many processes as before, whose products one library takes (`matrix_products`), the
result is the same to the bit, else to rounding.
"""

import shutil
import time
from collections.abc import Callable

from support.ekfac import storage
from support.ekfac.blocks import Block, blocks_of
from support.ekfac.curvature import Eigenbasis, LayerCurvature
from support.ekfac.fit import CovarianceSums, EigenvalueSums, Sums
from support.ekfac.verification import verify
from support.job.errors import StoreDamaged
from support.job.layout import FITTED
from support.job.store import disk_full_is_told, in_blocks
from support.job.team import progress
from support.job.work import Job

Shards = list[list[range]]
TITLES = {"covariances": "fit 1/2, covariances", "eigenvalues": "fit 2/2, eigenvalues"}


def fit(job: Job) -> str:
    """Fit, unless it was done, and leave the curvature in the store. Raises as `engine.fit` and `score`."""
    job.begin()
    if job.team.on_first(job.store.fitted):
        job.team.on_first(lambda: shutil.rmtree(job.store.partial_fit, ignore_errors=True))
        return "It was fitted before."
    engine, examples = job.engine, len(job.fitted_on)
    shards = job.team.on_first(lambda: _shards(job))
    job.team.on_first(lambda: _verify(job, shards[0][0]))
    bases = _bases(job, shards)
    sums = _sums(job, "eigenvalues", lambda: EigenvalueSums(engine, bases), shards)
    engine.curvature = {
        name: LayerCurvature(basis, sums.tensors[name] / examples) for name, basis in bases.items()
    }
    engine.examples = examples

    def save() -> None:
        with disk_full_is_told(job.store.folder):
            of = engine.identity() | {"job": job.store.belonging(FITTED)}
            storage.save(job.store.curvature, engine.curvature, of, engine.examples, engine.probe)
        shutil.rmtree(job.store.partial_fit)

    job.team.on_first(save)
    return f"Fitted on {examples:,} examples."


def _shards(job: Job) -> Shards:
    """The blocks, dealt over as many processes as began the fit, however many go on with it."""
    blocks = in_blocks(len(job.fitted_on), job.subject.block)
    if "shards" not in job.store.facts():
        job.store.settle({"shards": min(job.team.size, len(blocks))})
    with disk_full_is_told(job.store.folder):
        job.store.partial_fit.mkdir(exist_ok=True)
    shards = job.store.facts()["shards"]
    if not isinstance(shards, int) or not 1 <= shards <= len(blocks):
        raise StoreDamaged(f"The store says shards: {shards}, of {len(blocks)} blocks. Name another --store.")
    return [blocks[n::shards] for n in range(shards)]


def _verify(job: Job, numbers: range) -> None:
    """As `engine.fit` does: the curvature is saved with what it was told."""
    inputs, _ = job.fitted_on.batch(numbers, job.engine.passes.device)
    job.engine.probe = verify(job.engine.passes, [(inputs, None)])


def _bases(job: Job, shards: Shards) -> dict[str, Eigenbasis]:
    """Every layer's eigenbasis: computed by one process, read by all from the disk."""
    team, engine = job.team, job.engine
    missing = team.on_first(lambda: missing_bases(job))
    if missing:
        sums = _sums(job, "covariances", lambda: CovarianceSums(engine), shards)
        for name, basis in sums.bases(missing[team.rank :: team.size]):
            parts = {part: getattr(basis, part) for part in storage.BASIS_PARTS}
            job.store.save_sums(_basis(job, name), parts, blocks=sum(map(len, shards)))
        del sums
    team.wait()
    bases = {}
    for name in engine.layer_names:
        saved, _ = job.store.load_sums(_basis(job, name))
        tensors = [saved[part].to(engine.passes.device) for part in storage.BASIS_PARTS]
        bases[name] = Eigenbasis(*tensors, products=engine.passes.precision.products)
    return bases


def missing_bases(job: Job) -> list[str]:
    """Layers without a basis on the disk. Sums of squares in another basis, if there are any, go."""
    missing = [name for name in job.engine.layer_names if not job.store.load_sums(_basis(job, name), True)[1]]
    for path in job.store.partial_fit.glob("eigenvalues-*") if missing else ():
        path.unlink()
    return missing


def _basis(job: Job, name: str) -> str:
    return f"basis-{job.engine.layer_names.index(name)}"


def _sums(job: Job, name: str, begin: Callable[[], Sums], shards: Shards) -> Sums:
    """One pass over the examples: sums over all shards, in every process."""
    files = [f"{name}-shard-{n}" for n in range(len(shards))]

    def before() -> int:
        done = [job.store.load_sums(file, header_only=True)[1] for file in files]
        return sum(len(block) for n, shard in zip(done, shards, strict=True) for block in shard[:n])

    own = range(job.team.rank, len(shards), job.team.size)
    total, done = begin(), job.team.on_first(before)
    with progress(job.team, TITLES[name], len(job.fitted_on), done, job.given["tell_seconds"]) as count:
        for number in own:
            sums = total if len(own) == 1 else begin()
            _add_shard(job, sums, shards[number], files[number], count)
            for key, tensor in total.tensors.items() if sums is not total else ():
                tensor += sums.tensors[key]
        for tensor in total.tensors.values():
            job.team.add_up(tensor)
    return total


def _add_shard(job: Job, sums: Sums, shard: list[range], file: str, count: Callable[[int], None]) -> None:
    """The examples of a shard that are not in its file yet; it is written as often as is wanted."""
    saved = time.monotonic()
    before, done = job.store.load_sums(file)
    for key in list(before):
        sums.tensors[key].copy_(before.pop(key))
    for block in shard[done:]:
        sums.add(_blocks(job, block))
        count(len(block))
        done += 1
        if done == len(shard) or time.monotonic() - saved >= job.given["save_seconds"]:
            job.store.save_sums(file, sums.tensors, done)
            saved = time.monotonic()


def _blocks(job: Job, numbers: range) -> list[Block]:
    """Examples that the fit is on; with labels only where they say what is asked."""
    passes = job.engine.passes
    inputs, labels = job.fitted_on.batch(numbers, passes.device)
    asked = labels if job.engine.likelihood.fits_on_labels else None
    return blocks_of(inputs, asked, *passes.together)
