"""`python -m benchmarks.fidelity`: Kronfluence before the same judge, and what each solver costs.

Kronfluence draws one label per review for its Fisher, as it does by default, and is asked at its default
damping, at its heuristic, and over a grid. Costs are seconds for the queries of `main` on this machine,
one solver after the other, fit included; divided by the number of queries they are the cost of one.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from kronfluence import Analyzer, Task, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from support.ekfac import EkfacInfluence, GaussNewtonInfluence, PathInfluence
from support.fidelity.judgement import PATHS, RECOMMENDED, Judge
from support.fidelity.scorers import Scores, batches, exact_at, gradient_products
from support.fidelity.tail import Reviews

FIDELITY = Path("support/fidelity/kronfluence.csv")
COSTS = Path("support/fidelity/costs.csv")
DEFAULT, HEURISTIC = ScoreArguments().damping_factor, None
GRID = (DEFAULT, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, HEURISTIC)


class Sentiment(Task):
    """What Kronfluence asks of its user, at the trained tail of the classifier."""

    def get_influence_tracked_modules(self) -> list[str]:
        return ["ffn.lin1", "ffn.lin2", "pre_classifier", "classifier"]

    def get_attention_mask(self, batch: tuple[Tensor, Tensor]) -> None:
        return None

    def compute_train_loss(
        self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool = False
    ) -> Tensor:
        vectors, labels = batch
        logits = model(vectors)
        if sample:
            labels = torch.multinomial(logits.detach().softmax(dim=1), 1).flatten()
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def dataset(reviews: Reviews) -> TensorDataset:
    return TensorDataset(reviews.vectors, reviews.labels)


def kronfluence_scores(judge: Judge, folder: str) -> Iterator[tuple[float | None, Scores]]:
    """Its pairwise scores at the end of training, for one damping after the other."""
    torch.manual_seed(0)
    task = Sentiment()
    analyzer = Analyzer(
        analysis_name="fidelity",
        model=prepare_model(judge.question.trained(), task),
        task=task,
        cpu=True,
        log_level=logging.ERROR,
        disable_tqdm=True,
        output_dir=folder,
    )
    analyzer.fit_all_factors(
        "ekfac",
        dataset(judge.train),
        per_device_batch_size=250,
        factor_args=FactorArguments(strategy="ekfac"),
    )
    for damping in GRID:
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            query_dataset=dataset(judge.queries),
            train_dataset=dataset(judge.train),
            per_device_query_batch_size=50,
            per_device_train_batch_size=250,
            score_args=ScoreArguments(damping_factor=damping),
            overwrite_output_dir=True,
        )
        yield damping, analyzer.load_pairwise_scores("scores")["all_modules"].float()


def written(damping: float | None) -> str:
    if damping is HEURISTIC:
        return "heuristic"
    return f"{damping} (default)" if damping == DEFAULT else str(damping)


def ekfac(judge: Judge) -> Scores:
    engine = EkfacInfluence(judge.question.trained(), hessian_regularization=1e-2)
    engine.fit(batches(judge.train))
    return engine.score(batches(judge.queries), batches(judge.train))


def recommended(judge: Judge) -> Scores:
    path = PathInfluence(
        judge.path(PATHS[RECOMMENDED.where]),
        hessian_regularization=float(RECOMMENDED.regularization),
    )
    train = batches(judge.train)
    return path.score(train, batches(judge.queries), train, RECOMMENDED.normalisation)


def exact(joint: bool) -> Callable[[Judge], None]:
    return lambda judge: list(exact_at(judge.question.path[-1], judge.question, (1e-2,), joint))


def conjugate_gradients(judge: Judge) -> None:
    engine = EkfacInfluence(judge.question.trained(), hessian_regularization=1e-2)
    engine.fit(batches(judge.train))
    solver = GaussNewtonInfluence(engine, batches(judge.train), tolerance=1e-2)
    queries = judge.queries
    for rows in torch.arange(len(queries)).split(25):
        factors = solver.solve(queries.vectors[rows], queries.labels[rows]).factors
        engine.influences_from_factors(factors, judge.train.vectors, judge.train.labels)


SOLVERS = {
    "gradient dot product": lambda judge: gradient_products(
        judge.question.path[-1], judge.question
    ),
    "EK-FAC at the end": ekfac,
    "recommended": recommended,
    "exact, per layer": exact(joint=False),
    "exact, joint": exact(joint=True),
    "conjugate gradients, joint": conjugate_gradients,
}


def main() -> None:
    judge = Judge("main", progress=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for damping, scores in kronfluence_scores(judge, folder):
            names = {"scorer": "Kronfluence", "where": "100%", "normalisation": "plain"}
            rows.append(judge.row(scores, regularization=written(damping), **names))
    pd.DataFrame(rows).round(5).to_csv(FIDELITY, index=False)
    print(pd.DataFrame(rows))
    costs = []
    for name, solve in SOLVERS.items():
        start = time.perf_counter()
        solve(judge)
        seconds = time.perf_counter() - start
        costs.append({"solver": name, "seconds_per_query": seconds / len(judge.queries)})
        print(costs[-1], flush=True)
    pd.DataFrame(costs).round(5).to_csv(COSTS, index=False)


if __name__ == "__main__":
    main()
