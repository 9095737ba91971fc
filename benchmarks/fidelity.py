"""`python -m benchmarks.fidelity`: Kronfluence before the same judge, and what each solver costs.

Kronfluence draws one label per review for its Fisher, as it does by default, and is asked at its default
damping, at its heuristic, and over a grid. Costs are seconds for the queries of `main` on this machine,
one solver after the other, fit included; divided by the number of queries they are the cost of one.
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator

import pandas as pd
import torch
from kronfluence import Analyzer, Task, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from experiments.judgement import Judge
from experiments.scorers import Scores, exact_at, gradient_products
from support.chapters.fidelity import EXPERIMENTS
from support.ekfac import EkfacInfluence
from support.retraining import Reviews, batches

COSTS, KRONFLUENCE = EXPERIMENTS / "costs.csv", EXPERIMENTS / "kronfluence.csv"
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


def gradients(judge: Judge) -> int:
    gradient_products(judge.question.path[-1], judge.question)
    return len(judge.queries)


def ekfac(judge: Judge) -> int:
    engine = EkfacInfluence(judge.question.trained(), hessian_regularization=1e-2)
    engine.fit(batches(judge.train))
    engine.score(batches(judge.queries), batches(judge.train))
    return len(judge.queries)


def exact(joint: bool) -> Callable[[Judge], int]:
    def solve(judge: Judge) -> int:
        list(exact_at(judge.question.path[-1], judge.question, (1e-2,), joint))
        return len(judge.queries)

    return solve


SOLVERS = {
    "gradient dot product": gradients,
    "EK-FAC": ekfac,
    "exact, per layer": exact(joint=False),
    "exact, joint": exact(joint=True),
}


def kronfluence_table(judge: Judge) -> pd.DataFrame:
    names = {"scorer": "Kronfluence", "where": "100%", "normalisation": "plain"}
    with tempfile.TemporaryDirectory() as folder:
        return pd.DataFrame(
            [
                judge.row(scores, regularization=written(damping), **names)
                for damping, scores in kronfluence_scores(judge, folder)
            ]
        )


def cost_table(judge: Judge) -> pd.DataFrame:
    rows = []
    for name, solve in SOLVERS.items():
        start = time.perf_counter()
        queries = solve(judge)
        seconds = time.perf_counter() - start
        rows.append({"solver": name, "queries": queries, "seconds_per_query": seconds / queries})
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument("--costs", action="store_true", help="the costs only")
    chosen = parser.parse_args()
    judge = Judge("main", progress=True)
    if not chosen.costs:
        table = kronfluence_table(judge)
        table.round(5).to_csv(KRONFLUENCE, index=False)
        print(table)
    costs = cost_table(judge)
    costs.round(5).to_csv(COSTS, index=False)
    print(costs)


if __name__ == "__main__":
    main()
