"""EK-FAC influence functions for torch models; knows nothing of transformers, datasets or IMDB."""

from support.ekfac.exact import ExactInfluence
from support.ekfac.index import EkfacIndex
from support.ekfac.influence import EkfacInfluence
from support.ekfac.likelihood import Bernoulli, Categorical, Gaussian
from support.ekfac.next_token import EachToken, NextToken

__all__ = [
    "Bernoulli",
    "Categorical",
    "EachToken",
    "EkfacIndex",
    "EkfacInfluence",
    "ExactInfluence",
    "Gaussian",
    "NextToken",
]
