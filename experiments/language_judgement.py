"""`python -m experiments.language_judgement`: scorers before the bank of a model that writes, `language.csv`.

Half of the queries are to choose by, the other half is reported. Scorers that look at texts alone; the loss
of a training text; products of gradients; EK-FAC, K-FAC, EK-FAC in bases weighted by the other side, and the
exact solve, for a grid of λ, before training, a fifth of the way, at its end, and the mean of the three;
EK-FAC with queries at rank 32. The curvature comes from two samples of labels, the same for all. Scores are
kept in the cache, place by place and solver by solver.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from experiments.bank_making import digest, finished
from experiments.bases import Damping, Scores, Share, curvatures, scored
from experiments.judgement import agreement_row
from experiments.language_bank import BANK, WriterRetraining, log_odds, retraining, reviews_and_queries
from experiments.scorers import Normalised, Question, bm25, representation_cosine, tf_idf
from experiments.whole_judgement import no_curvature
from support.cache import cache_folder
from support.ekfac import EkfacInfluence, ExactInfluence, NextToken
from support.ekfac.curvature import LayerCurvature, kfac_eigenvalues
from support.ekfac.exact import InnerProducts, exact_influences
from support.ekfac.storage import replacing
from support.judge import Bank, noise_ceiling
from support.language import load_language_model
from support.retraining import Checkpoint, Reviews, losses

TABLE = Path(__file__).parent / "language.csv"
PLACES = (0.0, 0.2, 1.0)
NUMBERS: tuple[Damping, ...] = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
DAMPINGS: tuple[Damping, ...] = (*NUMBERS, *(Share(factor, "mean") for factor in (0.1, 1.0, 10.0)))
RANK, RANK_DAMPING, SAMPLES = 32, 0.1, 2


def similarities(train: Reviews, queries: Reviews) -> Iterator[tuple[str, Tensor]]:
    """What looks at texts, or at what the blocks below make of them: the mean over tokens."""
    sides = (Reviews(side.vectors.mean(dim=1), side.labels, side.texts) for side in (train, queries))
    question = Question([], *sides)
    for scorer in (tf_idf, bm25, representation_cosine):
        yield scorer.__name__, scorer(question)


class Place:
    """The model on its way through a training on all reviews, and what is asked of it there: gradients of
    both sides are taken at this place."""

    def __init__(self, checkpoint: Checkpoint, train: Reviews, queries: Reviews):
        self.model, self.train, self.queries = checkpoint.model(), train, queries

    def loaders(self, at_once: int = 16) -> tuple[list, list]:
        """Training reviews and queries in batches."""
        sides = self.train, self.queries
        return tuple([*zip(one.vectors.split(at_once), one.labels.split(at_once), strict=True)] for one in sides)

    @cached_property
    def engine(self) -> EkfacInfluence:
        """Fitted on the training reviews."""
        engine = EkfacInfluence(self.model, likelihood=NextToken(SAMPLES), progress=True)
        return engine.fit(self.loaders()[0])

    def by(self, curvature: dict[str, LayerCurvature], dampings: tuple = DAMPINGS) -> dict[Damping, Scores]:
        """Influences through a curvature."""
        train, queries = self.loaders()
        return scored(self.engine, curvature, queries, train, dampings, progress=True)

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
        for value in NUMBERS:
            parts = [exact_influences(system, value) for system in systems]
            found[value] = Scores(*(torch.stack(side).float() for side in zip(*parts, strict=True)))
        return found

    def weighted(self) -> dict[str, LayerCurvature]:
        return curvatures(self.engine, self.loaders()[0], ("weighted",), progress=True)["weighted"]

    def kfac(self) -> dict[str, LayerCurvature]:
        fitted = self.engine.curvature.items()
        return {name: LayerCurvature(one.basis, kfac_eigenvalues(one.basis)) for name, one in fitted}

    def at_low_rank(self) -> Float[Tensor, "queries train"]:
        """EK-FAC, the queries at a rank."""
        self.engine.query_rank, self.engine.hessian_regularization = RANK, RANK_DAMPING
        train, queries = self.loaders()
        return self.engine.score(queries, train)


SOLVERS = {
    "EK-FAC": lambda place: place.by(place.engine.curvature),
    "gradients": lambda place: place.by(no_curvature(place.engine), (1.0,)),
    "K-FAC": lambda place: place.by(place.kfac()),
    "EK-FAC, weighted bases": lambda place: place.by(place.weighted()),
    "exact, per layer": lambda place: place.exact(joint=False),
    "exact, joint": lambda place: place.exact(joint=True),
}
"""What is asked at a place: influences for every λ."""

LOW_RANK = f"EK-FAC, rank {RANK}"


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
        summed = Normalised(scores.influences.sum(dim=0), scores.self_influences.sum(dim=0), sizes)
        found |= {f"{value}/{name}": part.contiguous() for name, part in summed.all().items()}
    return found


def kept_influences(run: WriterRetraining, queries: Reviews) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """Solver, share of the steps and `said_at` there, of a training on all reviews: computed once, then read
    from the cache. Last come the means over the places."""
    told = [digest(run.reviews), digest(queries), repr(run.recipe), repr(list(map(str, DAMPINGS)))]
    key = hashlib.sha256(" ".join([*told, str(SAMPLES)]).encode()).hexdigest()[:32]
    solvers, path = [*SOLVERS, LOW_RANK], []
    sums: dict[str, dict[str, Tensor]] = {solver: {} for solver in solvers}
    for number, share in enumerate(tqdm(PLACES, "places", unit="place")):
        place = None
        for solver in solvers:
            name = f"language-{key}-{share:g}-{solver.replace(' ', '-').replace(',', '')}.safetensors"
            file = cache_folder() / name
            if not file.exists():
                path = path or run.path(torch.arange(len(run.reviews)), seed=0, shares=PLACES)
                place = place or Place(path[number], run.reviews, queries)
                with replacing(file) as fresh:
                    save_file(said_at(place, solver), fresh)
            found = load_file(file)
            yield solver, f"{share:.0%}", found
            sums[solver] = {name: part + sums[solver].get(name, 0) for name, part in found.items()}
    for solver, found in sums.items():
        yield solver, "mean of three", found


def table(bank: Bank, run: WriterRetraining, queries: Reviews) -> pd.DataFrame:
    """One row for each scorer, place, λ and normalisation, and, of a bank with several seeds, one for what
    noise leaves to be reached."""
    train = run.reviews
    rows = [agreement_row(bank, scores, scorer=name) for name, scores in similarities(train, queries)]
    for solver, where, found in kept_influences(run, queries):
        for name, scores in found.items():
            regularization, normalisation = name.split("/")
            told = {"scorer": solver, "where": where, "regularization": regularization}
            rows.append(agreement_row(bank, scores, **told, normalisation=normalisation))
    loss = losses(log_odds(run.run_on_all(seed=0), train)).expand(len(queries), -1)
    rows.append(agreement_row(bank, loss, scorer="training_loss", where="100%"))
    if bank.margins.shape[1] > 1:
        ceiling = noise_ceiling(bank)
        rows.append({"scorer": "ceiling", "choice": ceiling, "report": ceiling})
    return pd.DataFrame(rows)


def main() -> None:
    model, tokenizer = load_language_model()
    train, queries = reviews_and_queries(model, tokenizer)
    table(finished(BANK), retraining(model, train), queries).round(5).to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
