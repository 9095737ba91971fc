"""pyDVL's EK-FAC on the job of notebook 04, as its own notebook does it; runs in .venv-pydvl.

It knows no mask: reviews are padded to 512 tokens and padded positions take part. Its Fisher weighs
the gradients of the labels in a way of its own, and its corrected eigenvalues are sums over positions
and not over reviews. So its scores go with ours, no more.
"""

import torch
from pydvl.influence.torch import EkfacInfluence
from torch import Tensor

from benchmarks.inputs import PAD
from benchmarks.plan import NOTEBOOK, REGULARIZATION
from benchmarks.work import Clock, Done, Job, Work

PADDED_TO = 512


def padded(input_ids: Tensor) -> Tensor:
    return torch.nn.functional.pad(input_ids, (0, PADDED_TO - input_ids.shape[1]), value=PAD)


def notebook(work: Work) -> Job:
    (x, y), (x_test, y_test) = work.train.whole(), work.test.whole()
    x, x_test = padded(x), padded(x_test)
    engine = EkfacInfluence(work.classifier, update_diagonal=True, hessian_regularization=REGULARIZATION)

    def job(clock: Clock) -> Done:
        with clock.part("fit"):
            engine.fit([(x, y)])
        with clock.part("influences"):
            return Done(engine.influences(x_test, y_test, x, y))

    return job


JOBS = {NOTEBOOK: notebook}
