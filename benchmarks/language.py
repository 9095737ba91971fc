"""`python -m benchmarks.language`: a model that writes, ours beside Kronfluence, in turn on one machine.

SmolLM2-135M-Instruct, the feed-forward layers of its last blocks, real reviews cut at 128 tokens, queries
of a prompt with its completion, whole and at rank 32; both draw the same labels for the Fisher. Each
engine runs in a process of its own, one after the other, in rounds. Prints seconds, peak memory, and how
far scores are apart.
"""

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks import machine
from benchmarks.running import ROOT
from benchmarks.table import table
from support.ekfac import EkfacInfluence, NextToken
from support.ekfac.draws import drawn
from support.imdb import load_imdb
from support.language import FEED_FORWARD, Batch, encoded, load_language_model, loader, padded
from support.model import require_gradients_only

TOKENS, BATCH_SIZE, RANK, DAMPING = 128, 8, 32, 0.1
QUERIES = [
    ("Review: The movie was", " a complete waste of time."),
    ("Review: The movie was", " a wonderful surprise."),
    ("Question: What did you think of the acting? Answer:", " The acting was wooden and the plot was thin."),
    ("My favourite scene is", " the one where the two brothers meet again after the war."),
]
JOBS = ("fit", "score", f"score, rank {RANK}")


class Work:
    """The model with the layers of its last blocks tracked, training reviews and queries."""

    def __init__(self, reviews: int, blocks: int):
        self.model, tokenizer = load_language_model()
        last = self.model.config.num_hidden_layers
        names = require_gradients_only(self.model, FEED_FORWARD)
        kept = {f".{number}." for number in range(last - blocks, last)}
        for name in names:
            if not any(part in name for part in kept):
                self.model.get_submodule(name).requires_grad_(False)
        self.tracked = [name for name in names if any(part in name for part in kept)]
        texts = load_imdb()["train"].shuffle(seed=0)["text"][:reviews]
        self.train = [encoded(tokenizer, text, max_tokens=TOKENS) for text in texts]
        self.queries = [encoded(tokenizer, *query) for query in QUERIES]


def ours(work: Work) -> dict[str, Callable[[], Tensor | None]]:
    engine = EkfacInfluence(work.model, likelihood=NextToken(), hessian_regularization=DAMPING)

    def score(rank: int | None) -> Tensor:
        engine.query_rank = rank
        return engine.score(loader(work.queries, BATCH_SIZE), loader(work.train, BATCH_SIZE))

    jobs = lambda: engine.fit(loader(work.train, BATCH_SIZE))  # noqa: E731
    return dict(zip(JOBS, (jobs, lambda: score(None), lambda: score(RANK)), strict=True))


class Sequences(Dataset):
    """As Kronfluence takes them."""

    def __init__(self, sequences: list[Batch]):
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, row: int) -> Batch:
        return self.sequences[row]


def kronfluence(work: Work) -> dict[str, Callable[[], Tensor | None]]:
    from kronfluence import Analyzer, Task, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.utils.dataset import DataLoaderKwargs

    class Writing(Task):
        draws = ""

        def get_influence_tracked_modules(self) -> list[str]:
            return work.tracked

        def get_attention_mask(self, batch: Batch) -> Tensor:
            return batch["attention_mask"]

        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
            if not sample:
                return self.compute_measurement(batch, model)
            inputs = {name: part for name, part in batch.items() if name != "labels"}
            logits = model(**inputs).logits

            draws = partial(drawn, f"0 {self.draws}", inputs, inputs["attention_mask"].bool())
            directions = NextToken().fisher_directions(logits.detach(), draws, batch["labels"])
            return sum((logits * direction).sum() for direction in directions)

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
            )

    task, folder = Writing(), tempfile.mkdtemp()
    analyzer = Analyzer(
        analysis_name="kronfluence",
        model=prepare_model(work.model, task),
        task=task,
        cpu=True,
        log_level=logging.ERROR,
        disable_tqdm=True,
        output_dir=folder,
    )
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=padded))
    train, queries = Sequences(work.train), Sequences(work.queries)
    factors = {"factors_name": "ekfac", "factor_args": FactorArguments(strategy="ekfac")}

    def fit() -> None:
        data = {"dataset": train, "per_device_batch_size": BATCH_SIZE}
        task.draws = "CovarianceSums"
        analyzer.fit_covariance_matrices(**data, **factors)
        analyzer.perform_eigendecomposition(**factors)
        task.draws = "EigenvalueSums"
        analyzer.fit_lambda_matrices(**data, **factors)

    def score(rank: int | None) -> Tensor:
        analyzer.compute_pairwise_scores(
            f"scores-{rank}",
            "ekfac",
            query_dataset=queries,
            train_dataset=train,
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=BATCH_SIZE,
            score_args=ScoreArguments(damping_factor=DAMPING, query_gradient_low_rank=rank),
            overwrite_output_dir=True,
        )
        return analyzer.load_pairwise_scores(f"scores-{rank}")["all_modules"]

    return dict(zip(JOBS, (fit, lambda: score(None), lambda: score(RANK)), strict=True))


ENGINES = {"ours": ours, "kronfluence": kronfluence}


def measure(engine: str, reviews: int, blocks: int) -> None:
    work = Work(reviews, blocks)
    found, scores = {}, {}
    for name, job in ENGINES[engine](work).items():
        start = time.perf_counter()
        result = job()
        found[name] = time.perf_counter() - start
        if isinstance(result, Tensor):
            scores[name] = result.tolist()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": found, "megabytes": memory / 1024, "scores": scores}))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language", description=__doc__)
    parser.add_argument("--engine", choices=ENGINES, help="measure one of them, in this process")
    parser.add_argument("--reviews", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    if chosen.engine:
        measure(chosen.engine, chosen.reviews, chosen.blocks)
        return
    command = [sys.executable, "-m", "benchmarks.language", "--reviews", str(chosen.reviews)]
    command += ["--blocks", str(chosen.blocks), "--engine"]
    rounds = [
        {
            engine: json.loads(
                subprocess.run([*command, engine], cwd=ROOT, check=True, capture_output=True, text=True)
                .stdout.strip().splitlines()[-1]
            )
            for engine in ENGINES
        }
        for _ in range(chosen.rounds)
    ]  # fmt: skip
    rows = []
    for job in JOBS:
        times = [[one[engine]["seconds"][job] for one in rounds] for engine in ENGINES]
        mine, theirs = map(statistics.median, times)
        rows.append([job, f"{mine:.1f} s", f"{theirs:.1f} s", f"{theirs / mine:.2f}"])
    mine, theirs = (statistics.median(one[engine]["megabytes"] for one in rounds) for engine in ENGINES)
    rows.append(["peak memory", f"{mine:.0f} MB", f"{theirs:.0f} MB", f"{theirs / mine:.2f}"])
    print(f"{machine.described()['processor']}; {chosen.reviews} reviews, {chosen.rounds} rounds\n")
    print("\n".join(table(["", "ours", "Kronfluence", "Kronfluence / ours"], rows)))
    for job in JOBS[1:]:
        one, other = (torch.tensor(rounds[0][engine]["scores"][job]) for engine in ENGINES)
        apart = (one - other).norm() / one.norm()
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        print(f"\n{job}: relative difference {apart:.1e}, correlation {correlation:.7f}")


if __name__ == "__main__":
    main()
