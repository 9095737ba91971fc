"""`python -m benchmarks.language`: a model that writes, ours beside Kronfluence, in turn on one machine.

SmolLM2-135M-Instruct, the feed-forward layers of its last blocks, real reviews cut at 128 tokens, queries of
a prompt with its completion. Prints three tables:

- `side`: seconds and peak memory, scores whole and at rank 32, and how far they are apart; both draw the
  same labels for the Fisher, and each engine runs in a process of its own, one after the other, in rounds;
- `noise`: how scores agree between two seeds of the Fisher, by the number of its samples;
- `ranks`: bytes of a query, what is kept of it, and how its scores rank, by the rank.
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
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks import machine
from benchmarks.running import ROOT
from benchmarks.table import table
from support.ekfac import EkfacInfluence, NextToken
from support.ekfac.draws import drawn
from support.ekfac.memory import factor_bytes
from support.ekfac.scores import kept_share
from support.imdb import load_imdb
from support.language import (
    FEED_FORWARD,
    Batch,
    encoded,
    inputs_and_labels,
    load_language_model,
    loader,
    padded,
)
from support.model import require_gradients_only

TOKENS, BATCH_SIZE, RANK, DAMPING = 128, 8, 32, 0.1
BUDGET = 4e9
"""Bytes, for our curvature and what a fit keeps beside it."""

SAMPLES, RANKS = (1, 2, 4, 8), (8, 32, 128)
QUERIES = [
    ("Review: The movie was", " a complete waste of time."),
    ("Review: The movie was", " a wonderful surprise."),
    ("Question: What did you think of the acting? Answer:", " The acting was wooden and the plot was thin."),
    ("My favourite scene is", " the one where the two brothers meet again after the war."),
]
JOBS = ("fit", f"score, rank {RANK}", "score")
PARTS = ("side", "noise", "ranks")
SPEARMAN = ("Spearman, mean of queries", "worst query")


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

    def engine(self, samples: int = 1, seed: int = 0) -> EkfacInfluence:
        # Kronfluence's positions, so that both do the same work.
        settings = {"hessian_regularization": DAMPING, "seed": seed, "covariance_positions": "all"}
        settings |= {"memory_budget": BUDGET}
        return EkfacInfluence(self.model, likelihood=NextToken(samples), **settings)

    def fit(self, engine: EkfacInfluence) -> None:
        engine.fit(loader(self.train, BATCH_SIZE))

    def scores(self, engine: EkfacInfluence, rank: int | None = None) -> Tensor:
        engine.query_rank = rank
        return engine.score(loader(self.queries, BATCH_SIZE), loader(self.train, BATCH_SIZE))


def ours(work: Work) -> dict[str, Callable[[], Tensor | None]]:
    engine = work.engine()
    jobs = (lambda: work.fit(engine), lambda: work.scores(engine, RANK), lambda: work.scores(engine))
    return dict(zip(JOBS, jobs, strict=True))


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
        def get_influence_tracked_modules(self) -> list[str]:
            return work.tracked

        def get_attention_mask(self, batch: Batch) -> Tensor:
            return batch["attention_mask"]

        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
            if not sample:
                return self.compute_measurement(batch, model)
            inputs = {name: part for name, part in batch.items() if name != "labels"}
            logits = model(**inputs).logits

            draws = partial(drawn, "0 Fisher", inputs, inputs["attention_mask"].bool())
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
        analyzer.fit_covariance_matrices(**data, **factors)
        analyzer.perform_eigendecomposition(**factors)
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

    return dict(zip(JOBS, (fit, lambda: score(RANK), lambda: score(None)), strict=True))


ENGINES = {"ours": ours, "kronfluence": kronfluence}


def measure(engine: str, reviews: int, blocks: int) -> None:
    """Seconds of each job, the most memory held by its end, and its scores, as JSON."""
    work = Work(reviews, blocks)
    found = {}
    for name, job in ENGINES[engine](work).items():
        start = time.perf_counter()
        result = job()
        found[name] = {
            "seconds": time.perf_counter() - start,
            "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "scores": result.tolist() if isinstance(result, Tensor) else None,
        }
    print(json.dumps(found))


def measured(engine: str, reviews: int, blocks: int) -> dict[str, dict]:
    """What `measure` finds in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.language", "--engine", engine]
    command += ["--reviews", str(reviews), "--blocks", str(blocks)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def side_by_side(reviews: int, blocks: int, rounds: int) -> list[str]:
    """The table of both engines, job by job."""
    found = [{engine: measured(engine, reviews, blocks) for engine in ENGINES} for _ in range(rounds)]
    rows = []
    for job in JOBS:
        (mine, my_room), (theirs, their_room) = (
            [statistics.median(one[engine][job][what] for one in found) for what in ("seconds", "megabytes")]
            for engine in ENGINES
        )
        agreement = ["", ""]
        if found[0]["ours"][job]["scores"]:
            one, other = (torch.tensor(found[0][engine][job]["scores"]).flatten() for engine in ENGINES)
            correlation = torch.corrcoef(torch.stack([one, other]))[0, 1]
            agreement = [f"{(one - other).norm() / other.norm():.1e}", f"{correlation:.7f}"]
        times = [f"{mine:.1f} s", f"{theirs:.1f} s", f"{theirs / mine:.2f}"]
        rows.append([job, *times, f"{my_room:.0f} MB", f"{their_room:.0f} MB", *agreement])
    heads = [
        "",
        "ours",
        "Kronfluence",
        "ratio",
        "memory by then",
        "Kronfluence's",
        "difference",
        "correlation",
    ]
    return table(heads, rows)


def noise(work: Work) -> list[str]:
    """How far scores agree between two seeds, by the number of labels drawn at each target."""
    rows = []
    for samples in SAMPLES:
        scores = []
        for seed in range(2):
            engine = work.engine(samples, seed)
            work.fit(engine)
            scores.append(work.scores(engine))
        one, other = (part.flatten() for part in scores)
        correlation = torch.corrcoef(torch.stack([one, other]))[0, 1]
        rows.append([str(samples), f"{correlation:.4f}", *map("{:.4f}".format, ranking(*scores))])
    return table(["samples", "correlation of two seeds", *SPEARMAN], rows)


def ranks(work: Work) -> list[str]:
    """What a query takes, what is kept of it, and how its scores agree with the whole ones, by the rank."""
    engine = work.engine()
    work.fit(engine)
    whole = work.scores(engine)
    size = factor_bytes(engine.layers)
    rows = [["whole", f"{size / 2**20:.1f} MB", "1", "1.0000", "1.0000", "0", "1.0000", "1.0000"]]
    inputs, labels = inputs_and_labels(padded(work.queries))
    for rank in RANKS:
        scores = work.scores(engine, rank)
        share = kept_share(engine.influence_factors(inputs, labels))
        own = factor_bytes(engine.layers, rank)
        kept = [f"{share.mean():.4f}", f"{share.min():.4f}"]
        apart = f"{(scores - whole).norm() / whole.norm():.1e}"
        ranked = map("{:.4f}".format, ranking(scores, whole))
        rows.append([str(rank), f"{own / 2**20:.1f} MB", f"{size / own:.1f}", *kept, apart, *ranked])
    heads = ["rank", "a query", "smaller by", "norm² kept, mean", "least", "difference", *SPEARMAN]
    return table(heads, rows)


def ranking(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Spearman's correlation of the scores of each query: the mean, and the worst."""
    found = [spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]
    return statistics.mean(found), min(found)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.language", description=__doc__, formatter_class=raw
    )
    parser.add_argument("--engine", choices=ENGINES, help="measure one of them, in this process")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which tables (all)")
    parser.add_argument("--reviews", type=int, default=32, help="training reviews (32)")
    parser.add_argument("--blocks", type=int, default=2, help="last blocks of the model (2)")
    parser.add_argument("--rounds", type=int, default=2, help="of the side by side (2)")
    chosen = parser.parse_args()
    sizes = chosen.reviews, chosen.blocks
    if chosen.engine:
        measure(chosen.engine, *sizes)
        return
    print(f"{machine.described()['processor']}; {chosen.reviews} reviews, last {chosen.blocks} blocks")
    tables = {
        "side": lambda: side_by_side(*sizes, chosen.rounds),
        "noise": lambda: noise(Work(*sizes)),
        "ranks": lambda: ranks(Work(*sizes)),
    }
    for part in chosen.parts:
        print("\n".join(["", f"**{part}**", "", *tables[part]()]), flush=True)


if __name__ == "__main__":
    main()
