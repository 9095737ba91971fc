"""Influence along the training path: the same question asked at several checkpoints of one run.

What is left of a training example's gradient at the end of training says little about the push it gave
on the way. So influences are taken where training passed, gradients and curvature of both sides at the
checkpoint, and averaged with the weight of the segment of training each checkpoint stands for (TracIn,
Pruthi et al. 2020, sums gradient products over checkpoints; SOURCE, Bae et al. 2024, gives every segment
a curvature of its own).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from support.ekfac.errors import BadCheckpoints
from support.ekfac.influence import EkfacInfluence

Fit = Callable[[EkfacInfluence, Iterable], EkfacInfluence]
"""`EkfacInfluence.fit`, or something with the same result that keeps it for the next time."""


@dataclass(frozen=True)
class Checkpoint:
    """A state of the model on its way through training.

    `model` makes it, in eval mode with the tracked layers requiring gradients, when it is its turn.
    `weight` is what its segment of training counts; learning rate times steps is the principled
    choice. Only ratios of weights matter.
    """

    name: str
    model: Callable[[], nn.Module]
    weight: float = 1.0


class PathInfluence:
    """Weighted mean of EK-FAC influences over checkpoints of one training run; one is enough.

    `settings` are those of `EkfacInfluence`, the same at every checkpoint. One model and one curvature
    are in memory at a time. Raises `BadCheckpoints` when there is none, or a weight is not positive.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        fit: Fit = EkfacInfluence.fit,
        progress: bool = False,
        **settings,
    ):
        _check(checkpoints)
        self.checkpoints = list(checkpoints)
        self.fit = fit
        self.progress = progress
        self.settings = settings

    def score(
        self,
        fit_loader: Iterable,
        test_loader: Iterable,
        train_loader: Iterable,
        normalisation: str = "plain",
    ) -> Float[Tensor, "test train"]:
        """Influence of all training examples on all test examples, mean over the checkpoints.

        The curvature of every checkpoint is fitted on `fit_loader`. `normalisation` is that of
        `EkfacInfluence.score`, at each checkpoint, before they are averaged. Loaders are gone over once or
        more for each checkpoint. Raises as `EkfacInfluence.fit` and `score` do.
        """
        total = sum(checkpoint.weight for checkpoint in self.checkpoints)
        scores = None
        bar = tqdm(self.checkpoints, "checkpoints", unit="checkpoint", disable=not self.progress)
        for checkpoint in bar:
            engine = EkfacInfluence(checkpoint.model(), progress=self.progress, **self.settings)
            part = self.fit(engine, fit_loader).score(test_loader, train_loader, normalisation)
            part *= checkpoint.weight / total
            scores = part if scores is None else scores.add_(part)
            del engine
        return scores


def _check(checkpoints: Sequence[Checkpoint]) -> None:
    if not checkpoints:
        raise BadCheckpoints("There are no checkpoints. One is enough: the end of training.")
    for checkpoint in checkpoints:
        if not checkpoint.weight > 0:
            raise BadCheckpoints(
                f"Checkpoint {checkpoint.name!r} has weight {checkpoint.weight}. Weights are the "
                "learning rate summed over a segment of training: leave out what counts nothing."
            )
