"""Kronfluence, with our Fisher, mask and λ, so that its scores can be compared with ours.

It keeps factors and scores on disk; writing and reading them is part of its time.
"""

import logging
import math

import torch
from kronfluence import Analyzer, Task, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from benchmarks.inputs import PAD, Reviews, trimmed
from benchmarks.plan import FIT, NOTEBOOK, REGULARIZATION, SCORE, SELF
from benchmarks.work import Clock, Done, Job, Work
from support.ekfac.matrix_products import PRECISIONS

FACTORS, SCORES = "ekfac", "scores"


class Sentiment(Task):
    """What Kronfluence asks of its user."""

    def __init__(self, tracked: list[str]):
        super().__init__()
        self.tracked = tracked

    def get_influence_tracked_modules(self) -> list[str]:
        return self.tracked

    def get_attention_mask(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch[0] != PAD

    def compute_train_loss(
        self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool = False
    ) -> Tensor:
        if sample:
            return exact_fisher_loss(model(batch[0]))
        return self.compute_measurement(batch, model)

    def compute_measurement(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def exact_fisher_loss(logits: Tensor) -> Tensor:
    """√(p₀p₁)·(z₁ − z₀), whose gradients have the exact Fisher; by default one label is drawn."""
    size = logits.detach().softmax(dim=1).prod(dim=1).sqrt()
    return (size * (logits[:, 1] - logits[:, 0])).sum()


def padded_to_longest(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    ids, labels = zip(*items, strict=True)
    return trimmed(torch.stack(ids)), torch.stack(labels)


def dataset(reviews: Reviews) -> Dataset:
    return TensorDataset(reviews.input_ids, reviews.labels)


def new_analyzer(work: Work) -> Analyzer:
    task = Sentiment(work.classifier.tracked)
    made = Analyzer(
        analysis_name="kronfluence",
        model=prepare_model(work.classifier, task),
        task=task,
        cpu=work.device == "cpu",
        log_level=logging.ERROR,
        disable_tqdm=True,
        output_dir=str(work.factors),
    )
    made.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=padded_to_longest))
    return made


def arithmetic(work: Work) -> dict[str, torch.dtype]:
    """What our engine takes in lower precision: the model's products and the rotations, summed in float32."""
    products = PRECISIONS[work.precision].products
    return {"amp_dtype": products, "per_sample_gradient_dtype": products} if products else {}


def fit_in_parts(analyzer: Analyzer, work: Work, clock: Clock) -> None:
    data = {"dataset": dataset(work.train), "per_device_batch_size": work.batch_size}
    settings = {
        "factors_name": FACTORS,
        "factor_args": FactorArguments(
            strategy="ekfac",
            eigendecomposition_dtype=PRECISIONS[work.precision].eigenproblems,
            **arithmetic(work),
        ),
        "overwrite_output_dir": True,
    }
    with clock.part("covariances"):
        analyzer.fit_covariance_matrices(**data, **settings)
    with clock.part("eigenbases"):
        analyzer.perform_eigendecomposition(**settings)
    with clock.part("corrected eigenvalues"):
        analyzer.fit_lambda_matrices(**data, **settings)


def pairwise_scores(analyzer: Analyzer, work: Work) -> Tensor:
    # All queries' factors are held at once, so that the training reviews are passed once only.
    steps = math.ceil(len(work.test.labels) / work.batch_size)
    analyzer.compute_pairwise_scores(
        SCORES,
        FACTORS,
        query_dataset=dataset(work.test),
        train_dataset=dataset(work.train),
        per_device_query_batch_size=work.batch_size,
        per_device_train_batch_size=work.batch_size,
        score_args=ScoreArguments(
            damping_factor=REGULARIZATION, query_gradient_accumulation_steps=steps, **arithmetic(work)
        ),
        overwrite_output_dir=True,
    )
    return analyzer.load_pairwise_scores(SCORES)["all_modules"]


def fit(work: Work) -> Job:
    analyzer = new_analyzer(work)

    def job(clock: Clock) -> Done:
        fit_in_parts(analyzer, work, clock)
        return Done()

    return job


def score(work: Work) -> Job:
    analyzer = new_analyzer(work)
    return lambda clock: Done(pairwise_scores(analyzer, work))


def self_influences(work: Work) -> Job:
    analyzer = new_analyzer(work)

    def job(clock: Clock) -> Done:
        analyzer.compute_self_scores(
            SCORES,
            FACTORS,
            train_dataset=dataset(work.train),
            per_device_train_batch_size=work.batch_size,
            score_args=ScoreArguments(damping_factor=REGULARIZATION, **arithmetic(work)),
            overwrite_output_dir=True,
        )
        return Done(analyzer.load_self_scores(SCORES)["all_modules"])

    return job


def notebook(work: Work) -> Job:
    analyzer = new_analyzer(work)

    def job(clock: Clock) -> Done:
        with clock.part("fit"):
            fit_in_parts(analyzer, work, Clock())
        with clock.part("influences"):
            return Done(pairwise_scores(analyzer, work))

    return job


JOBS = {FIT: fit, SCORE: score, SELF: self_influences, NOTEBOOK: notebook}
