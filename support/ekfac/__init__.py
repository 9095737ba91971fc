"""EK-FAC influence functions for torch models; knows nothing of transformers, datasets or IMDB."""

from support.ekfac.exact import ExactInfluence
from support.ekfac.influence import EkfacInfluence
from support.ekfac.likelihood import Categorical, Gaussian

__all__ = ["Categorical", "EkfacInfluence", "ExactInfluence", "Gaussian"]
