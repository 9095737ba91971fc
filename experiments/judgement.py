"""Every scorer before the judge: one table row each, as the repository commits it.

Score matrices take minutes and are kept in the cache, one file each, so that a run that was killed goes
on where it was.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from experiments.bank_making import EXPERIMENTS, SHARES, digest, make, queries, retraining
from experiments.scorers import (
    SIMILARITIES,
    Normalised,
    Question,
    Scores,
    ekfac_at,
    exact_at,
    gradient_products,
    residual_sizes,
)
from support.cache import cache_folder
from support.ekfac.curvature import Regularization
from support.ekfac.storage import replacing
from support.judge import Bank, halves, linear_datamodeling_score
from support.retraining import Checkpoint, Retraining

JUDGEMENT = Path(__file__).parent / "judgement.csv"
REGULARIZATIONS: tuple[Regularization, ...] = (1e-5, 1e-3, 1e-2, 1e-1, "auto")
NUMBERS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
AT_CHECKPOINTS: dict[str, Callable[..., Iterator[tuple[Regularization, Normalised]]]] = {
    "EK-FAC": ekfac_at,
    "K-FAC": partial(ekfac_at, update_diagonal=False),
    "exact, per layer": partial(exact_at, joint=False),
    "exact, joint": partial(exact_at, joint=True),
}
"""Solvers: the influences at one checkpoint for several λ, both sides taken there."""

PATHS = {
    **{f"{share:.0%}": (share,) for share in SHARES},
    "3 checkpoints": (0.1, 0.35, 0.75),
    "all 8 checkpoints": SHARES,
}
"""Where on the path influences are taken, as shares of the steps."""


@dataclass(frozen=True)
class Asked:
    """A solver, and for which λ and where on the path it is asked."""

    solver: str
    regularizations: tuple[Regularization, ...]
    places: tuple[str, ...] = tuple(PATHS)


ON_MAIN = (
    Asked("EK-FAC", REGULARIZATIONS),
    Asked("K-FAC", REGULARIZATIONS, ("100%",)),
    Asked("exact, per layer", NUMBERS),
    Asked("exact, joint", NUMBERS),
)
# Not EK-FAC again: the solve that it approximates gives the same picture in a fraction of the time.
ELSEWHERE = (Asked("exact, per layer", NUMBERS), Asked("exact, joint", NUMBERS, ("20%", "100%")))


class Judge:
    """One experiment's bank and question, and the table of what scorers reach on it."""

    def __init__(self, name: str, progress: bool = False):
        self.name, self.progress = name, progress
        experiment = EXPERIMENTS[name]
        self.bank: Bank = make(name, progress)
        self.retraining: Retraining = retraining(experiment, progress)
        self.train, self.queries = self.retraining.reviews, queries(experiment, progress)
        self.question = Question(self.path(SHARES), self.train, self.queries)

    def path(self, shares: Sequence[float]) -> list[Checkpoint]:
        """Checkpoints, at these shares of its steps, of the run whose influences are judged."""
        return self.retraining.path(torch.arange(len(self.train)), seed=0, shares=shares)

    def table(self, asked: Sequence[Asked]) -> pd.DataFrame:
        """LDS of similarities, gradient products and solvers, on both halves of the queries."""
        rows = [self.row(scorer(self.question), scorer=name) for name, scorer in SIMILARITIES.items()]
        for name, scores in gradient_products(self.question.path[-1], self.question).items():
            rows.append(self.row(scores, scorer=name, where="100%"))
        for one in asked:
            rows += [self.row(**found) for found in self.scores(one)]
        return pd.DataFrame(rows)

    def scores(self, asked: Asked) -> Iterator[dict]:
        """What a solver says, as `scores` with the names of its table row."""
        for place in tqdm(
            asked.places, f"{self.name}: {asked.solver}", unit="place", disable=not self.progress
        ):
            checkpoints = self.path(PATHS[place])
            found = [self._at(asked, checkpoint) for checkpoint in checkpoints]
            weights = segment_weights([one.step for one in checkpoints], self.retraining.rates)
            for regularization in asked.regularizations:
                parts = [at[regularization].all() for at in found]
                for normalisation in parts[0]:
                    scores = sum(
                        weight * part[normalisation] for weight, part in zip(weights, parts, strict=True)
                    )
                    yield {
                        "scores": scores,
                        "scorer": asked.solver,
                        "where": place,
                        "regularization": str(regularization),
                        "normalisation": normalisation,
                    }

    def _at(self, asked: Asked, checkpoint: Checkpoint) -> dict[Regularization, Normalised]:
        """Influences at one checkpoint for every λ: from the cache as far as they are there."""
        files = {r: self._file(asked.solver, checkpoint, r) for r in asked.regularizations}
        missing = tuple(r for r, file in files.items() if not file.exists())
        if missing:
            solve = AT_CHECKPOINTS[asked.solver]
            for regularization, result in solve(checkpoint, self.question, missing):
                _keep(files[regularization], result)
        residuals = residual_sizes(checkpoint.model(), self.train)
        return {r: _kept(file, residuals) for r, file in files.items()}

    def _file(self, solver: str, checkpoint: Checkpoint, regularization: Regularization) -> Path:
        run = [digest(self.train), digest(self.queries), repr(self.retraining.recipe)]
        key = "-".join([*run, solver, checkpoint.name, str(regularization)])
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return cache_folder() / "fidelity" / f"{name}.safetensors"

    def row(self, scores: Scores, **names: str) -> dict:
        none = {"scorer": "", "where": "", "regularization": "", "normalisation": ""}
        return {"experiment": self.name, **none, **agreement_row(self.bank, scores, **names)}


def agreement_row(bank: Bank, scores: Scores, **names: object) -> dict:
    """LDS on the half of the queries that choices are made on, and on that which is reported, with its
    interval; behind the names that the row is to have."""
    choice, report = (
        linear_datamodeling_score(scores[half], bank.of_queries(half)) for half in halves(len(scores))
    )
    low, high = report.interval()
    return {**names, "choice": choice.mean, "report": report.mean, "low": low, "high": high}


def segment_weights(kept: list[int], rates: list[float]) -> list[float]:
    """Σ of the learning rates of the steps nearer to each kept step than to another, as shares of 1.

    Step s moves the weights from state s − 1 to state s; a step halfway between two kept states goes
    to the earlier one.
    """
    weights = [0.0] * len(kept)
    for before, rate in enumerate(rates):
        nearest = min(range(len(kept)), key=lambda number: abs(kept[number] - before))
        weights[nearest] += rate / sum(rates)
    return weights


def judge_all(progress: bool = False) -> pd.DataFrame:
    """The whole table: `main` in full, of every other committed experiment what the story asks."""
    return pd.concat(
        [Judge(name, progress).table(ON_MAIN if name == "main" else ELSEWHERE) for name in EXPERIMENTS],
        ignore_index=True,
    )


def _keep(file: Path, result: Normalised) -> None:
    tensors = {"influences": result.influences, "self_influences": result.self_influences}
    with replacing(file) as fresh:
        save_file({name: tensor.float() for name, tensor in tensors.items()}, fresh)


def _kept(file: Path, residuals: Tensor) -> Normalised:
    tensors = load_file(file)
    return Normalised(tensors["influences"], tensors["self_influences"], residuals)
