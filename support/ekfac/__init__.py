"""EK-FAC influence functions for torch models; knows nothing of transformers, datasets or IMDB."""

from support.ekfac.conjugate_gradients import GaussNewtonInfluence
from support.ekfac.exact import ExactInfluence
from support.ekfac.influence import EkfacInfluence
from support.ekfac.likelihood import Categorical, Gaussian
from support.ekfac.training_path import Checkpoint, PathInfluence

__all__ = [
    "Categorical",
    "Checkpoint",
    "EkfacInfluence",
    "ExactInfluence",
    "GaussNewtonInfluence",
    "Gaussian",
    "PathInfluence",
]
