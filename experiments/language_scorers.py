"""What scores training texts for a model that writes: `language_judgement` brings it before a bank of
retrainings, `language_facts` before facts that were planted.

Scorers that look at texts alone; products of gradients; influences by `SOLVERS` for a grid of λ at one place
of a training. The curvature comes from two samples of labels, the same for all solvers. Scores are kept in
the cache, place by place and solver by solver.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.bases import Damping, Scores, Share, scored
from experiments.scorers import Normalised, Question, bm25, representation_cosine, tf_idf
from support.cache import cache_folder, fit_or_load
from support.ekfac import EkfacInfluence, ExactInfluence, NextToken
from support.ekfac.curvature import LayerCurvature, kfac_eigenvalues
from support.ekfac.exact import InnerProducts, exact_influences
from support.ekfac.storage import replacing
from support.retraining import Reviews

GRADIENTS, NO_CURVATURE = "gradients", 1e9
"""With a λ beside which no curvature is left influences are products of gradients, over λ."""
SHARES = tuple(Share(factor, "mean") for factor in (0.1, 1.0, 10.0))
NUMBERS: tuple[Damping, ...] = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
DAMPINGS: tuple[Damping, ...] = (*NUMBERS, *SHARES)
EXACT_NUMBERS = (*NUMBERS, 1e2, 1e3)
"""The exact solve knows as many directions as there are draws, all of them steep."""
RANK, RANK_DAMPING, SAMPLES = 32, 0.1, 2
WEIGHTED = "EK-FAC, weighted covariances"


def similarities(train: Reviews, queries: Reviews) -> Iterator[tuple[str, Tensor]]:
    """What looks at texts, or at what the blocks below make of them: the mean over real tokens."""
    means = (one.vectors.sum(dim=1) / one.vectors.any(dim=2).sum(dim=1)[:, None] for one in (train, queries))
    sides = ((mean, one.labels, one.texts) for mean, one in zip(means, (train, queries), strict=True))
    question = Question([], *(Reviews(*side) for side in sides))
    for scorer in (tf_idf, bm25, representation_cosine):
        yield scorer.__name__, scorer(question)


class Place:
    """The model on its way through a training on all reviews, and what is asked of it there: gradients of
    both sides are taken at this place."""

    def __init__(self, model: nn.Module, train: Reviews, queries: Reviews, **settings: object):
        self.model, self.train, self.queries = model, train, queries
        self.settings = {"likelihood": NextToken(SAMPLES), "progress": True} | settings

    def loaders(self, at_once: int = 16) -> tuple[list, list]:
        """Training reviews and queries in batches."""
        sides = self.train, self.queries
        return tuple(
            [*zip(one.vectors.split(at_once), one.labels.split(at_once), strict=True)] for one in sides
        )

    @cached_property
    def engine(self) -> EkfacInfluence:
        """Fitted on the training texts."""
        return self.fitted()

    def fitted(self, **settings: object) -> EkfacInfluence:
        """On the training texts, with these settings, too."""
        return fit_or_load(EkfacInfluence(self.model, **self.settings | settings), self.loaders()[0])

    def by(self, curvature: dict[str, LayerCurvature], *more: Damping) -> dict[Damping, Scores]:
        """Influences through a curvature, for every λ of the grid and these."""
        train, queries = self.loaders()
        return scored(self.engine, curvature, queries, train, (*DAMPINGS, *more), progress=True)

    @cached_property
    def systems(self) -> list[InnerProducts]:
        """Of the exact solve, layer by layer. As many texts at once as make their products cheap."""
        exact = ExactInfluence(self.model, joint=False, progress=True, likelihood=NextToken(SAMPLES))
        train, queries = self.loaders(at_once=80)
        return exact.inner_products(train, queries, train)

    def exact(self, joint: bool) -> dict[Damping, Scores]:
        """Influences by the exact solve, all layers as one or each by itself."""
        systems = [sum(self.systems[1:], self.systems[0])] if joint else self.systems
        found = {}
        for value in EXACT_NUMBERS:
            parts = [exact_influences(system, value) for system in systems]
            found[value] = Scores(*(torch.stack(side).float() for side in zip(*parts, strict=True)))
        return found

    def kfac(self) -> dict[str, LayerCurvature]:
        """Eigenvalues of the Kronecker product instead of corrected ones."""
        fitted = self.engine.curvature.items()
        return {name: LayerCurvature(one.basis, kfac_eigenvalues(one.basis)) for name, one in fitted}

    def at_low_rank(self) -> Float[Tensor, "queries train"]:
        """EK-FAC, the queries at a rank."""
        self.engine.query_rank, self.engine.hessian_regularization = RANK, RANK_DAMPING
        train, queries = self.loaders()
        return self.engine.score(queries, train)


SOLVERS: dict[str, Callable[[Place], dict[Damping, Scores]]] = {
    "EK-FAC": lambda place: place.by(place.engine.curvature, NO_CURVATURE),
    "K-FAC": lambda place: place.by(place.kfac()),
    WEIGHTED: lambda place: place.by(place.fitted(covariance_positions="weighted").curvature),
    "exact, layer by layer": lambda place: place.exact(joint=False),
    "exact, all layers as one": lambda place: place.exact(joint=True),
}
LOW_RANK = f"EK-FAC, queries at rank {RANK}"


@torch.no_grad()
def residual_sizes(model: nn.Module, reviews: Reviews) -> Float[Tensor, " reviews"]:
    """√ of Σ ‖p − e_token‖² over the targets of each text."""
    parts = zip(reviews.vectors.split(8), reviews.labels.split(8), strict=True)
    return torch.cat([NextToken().loss_direction(model(x), y).flatten(1).norm(dim=1) for x, y in parts])


def said_at(place: Place, solver: str) -> dict[str, Tensor]:
    """By "λ/normalisation": scores at one place."""
    if solver == LOW_RANK:
        return {f"{RANK_DAMPING}/plain": place.at_low_rank()}
    sizes, found = residual_sizes(place.model, place.train), {}
    for value, scores in SOLVERS[solver](place).items():
        unit = NO_CURVATURE if value == NO_CURVATURE else 1.0
        parts = (unit * part.sum(dim=0) for part in (scores.influences, scores.self_influences))
        summed = Normalised(*parts, sizes)
        found |= {f"{value}/{name}": part.contiguous() for name, part in summed.all().items()}
    return found


def settings(solver: str, name: str) -> dict[str, str]:
    """Scorer, λ and normalisation of scores of that name."""
    regularization, normalisation = name.split("/")
    if regularization == str(NO_CURVATURE):
        solver, regularization = GRADIENTS, ""
    return {"scorer": solver, "regularization": regularization, "normalisation": normalisation}


def kept(told: Sequence[object], place: Callable[[], Place], solver: str = "EK-FAC") -> dict[str, Tensor]:
    """`said_at` of a place, which `told` and the settings decide: computed once, then read from the cache."""
    key = " ".join(map(str, [*told, solver, *DAMPINGS, RANK_DAMPING, SAMPLES]))
    file = cache_folder() / f"language-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if not file.exists():
        with replacing(file) as fresh:
            save_file(said_at(place(), solver), fresh)
    return load_file(file)
