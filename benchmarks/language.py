"""`python -m benchmarks.language`: a model that writes, ours beside Kronfluence, in turn on one machine.

SmolLM2-135M-Instruct, the feed-forward layers of its last blocks, real reviews cut at 128 tokens, queries of
a prompt with its completion. Prints a table for each part:

- `kronfluence`: seconds and peak memory, scores whole and at rank 32, and how far they are apart; both draw
  the same labels for the Fisher, and each runs in a process of its own, one after the other, in rounds;
- `bergson`: the same beside Bergson, if it is installed (without dependencies, which bring another torch);
- `noise`: how scores agree between two seeds of the Fisher, by the number of its samples;
- `ranks`: bytes of a query, what is kept of it, and how its scores rank, by the rank.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks import machine
from benchmarks.language_engines import ENGINES, Work
from benchmarks.running import ROOT
from benchmarks.table import table
from support.ekfac.memory import factor_bytes
from support.ekfac.scores import kept_share
from support.language import inputs_and_labels, padded

SAMPLES, RANKS = (1, 2, 4, 8), (8, 32, 128)
PARTS = ("kronfluence", "bergson", "noise", "ranks")
SPEARMAN = ("Spearman, mean of queries", "worst query")


def measure(engine: str, work: Work) -> None:
    """Seconds of each job, the most memory held by its end, and its scores, as JSON."""
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


def measured(engine: str, reviews: int, blocks: int, whole: bool) -> dict[str, dict]:
    """What `measure` finds in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.language", "--engine", engine]
    command += ["--reviews", str(reviews), "--blocks", str(blocks)]
    if whole:
        command.append("--whole")
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def side_by_side(peer: str, reviews: int, blocks: int, rounds: int) -> list[str]:
    """The table of ours and a peer, job by job; the first is ours alone."""
    both, whole = ("ours", peer), peer == "bergson"
    found = [{one: measured(one, reviews, blocks, whole) for one in both} for _ in range(rounds)]
    rows = []
    for job in found[0]["ours"]:
        known = [one for one in both if job in found[0][one]]
        seconds, room = (
            [f"{statistics.median(one[who][job][what] for one in found):.1f}" for who in known]
            for what in ("seconds", "megabytes")
        )
        row = [job, seconds[0], "", "", room[0], "", "", ""]
        if len(known) == 2:
            row[2:6] = seconds[1], f"{float(seconds[1]) / float(seconds[0]):.2f}", *room
        if len(known) == 2 and found[0]["ours"][job]["scores"]:
            mine, theirs = (torch.tensor(found[0][who][job]["scores"]) for who in both)
            correlation = torch.corrcoef(torch.stack([mine.flatten(), theirs.flatten()]))[0, 1]
            row[6:] = f"{(mine - theirs).norm() / theirs.norm():.1e}", f"{correlation:.7f}"
        rows.append(row)
    heads = ["", "ours, s", f"{peer}, s", "ratio", "MB by then", f"{peer}, MB", "difference", "correlation"]
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
    parser.add_argument("--whole", action="store_true", help="ask about whole texts, not completions")
    parser.add_argument("--rounds", type=int, default=2, help="of the side by side (2)")
    chosen = parser.parse_args()
    sizes = chosen.reviews, chosen.blocks
    if chosen.engine:
        measure(chosen.engine, Work(*sizes, chosen.whole))
        return
    print(f"{machine.described()['processor']}; {chosen.reviews} reviews, last {chosen.blocks} blocks")
    tables = {
        "kronfluence": lambda: side_by_side("kronfluence", *sizes, chosen.rounds),
        "bergson": lambda: side_by_side("bergson", *sizes, chosen.rounds),
        "noise": lambda: noise(Work(*sizes)),
        "ranks": lambda: ranks(Work(*sizes)),
    }
    for part in chosen.parts:
        print("\n".join(["", f"**{part}**", "", *tables[part]()]), flush=True)


if __name__ == "__main__":
    main()
