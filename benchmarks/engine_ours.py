"""Our engine, used as its users would."""

import copy

from benchmarks.engine_bare import engine_blocks, forward_and_backward, prepare_passes
from benchmarks.plan import FIT, GROWTH, NOTEBOOK, REGULARIZATION, SCORE, SELF, TRAINING_SIDE
from benchmarks.work import Clock, Done, Job, Work
from support import EkfacInfluence

FILE = "curvature.safetensors"
SETTINGS = {"hessian_regularization": REGULARIZATION, "covariance_positions": "all"}
"""Kronfluence's, so that both do the same work."""


def new_engine(work: Work) -> EkfacInfluence:
    return EkfacInfluence(work.classifier.to(work.device), precision=work.precision, **SETTINGS)


def fitted_engine(work: Work) -> EkfacInfluence:
    return new_engine(work).load_curvature(work.factors / FILE)


def fit(work: Work) -> Job:
    engine, batches = new_engine(work), work.train.batches(work.batch_size)

    def job(clock: Clock) -> Done:
        engine.fit(batches)
        return Done(keep=lambda: engine.save(work.factors / FILE))

    return job


def score(work: Work) -> Job:
    engine = fitted_engine(work)
    queries, batches = work.test.batches(work.batch_size), work.train.batches(work.batch_size)
    return lambda clock: Done(engine.score(queries, batches))


def training_side(work: Work) -> Job:
    """Scoring with the queries' factors at hand: what each further training review costs."""
    engine, batch = fitted_engine(work), work.train.whole()
    factors = engine.influence_factors(*work.test.whole())
    return lambda clock: Done(engine.influences_from_factors(factors, *batch))


def self_influences(work: Work) -> Job:
    engine, batch = fitted_engine(work), work.train.whole()
    return lambda clock: Done(engine.self_influences(*batch))


def notebook(work: Work) -> Job:
    engine, batch, queries = new_engine(work), work.train.whole(), work.test.whole()

    def job(clock: Clock) -> Done:
        with clock.part("fit"):
            engine.fit([batch])
        with clock.part("influences"):
            return Done(engine.influences(*queries, *batch))

    return job


def growth(work: Work) -> Job:
    """Bare passes, fit and scores one after the other, because only their time is of interest."""
    engine, bare = new_engine(work), copy.deepcopy(work.classifier)
    prepare_passes(bare)
    queries, batches = work.test.batches(work.batch_size), work.train.batches(work.batch_size)
    blocks = engine_blocks(work)

    def job(clock: Clock) -> Done:
        with clock.part("passes"):
            forward_and_backward(bare, blocks)
        with clock.part("fit"):
            engine.fit(batches)
        with clock.part("score"):
            return Done(engine.score(queries, batches))

    return job


JOBS = {
    FIT: fit,
    SCORE: score,
    TRAINING_SIDE: training_side,
    SELF: self_influences,
    NOTEBOOK: notebook,
    GROWTH: growth,
}
