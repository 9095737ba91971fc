"""`python -m benchmarks.against CHECKOUT`: this checkout's engine beside another's, in turn, on one machine.

Each round is a process of its own for either: fit, scores of 10 queries and self-influence on real reviews
with the packaged model, at public names that both have. Prints seconds of this one over the other's, peak
memory, and the largest difference of their scores. For changes that should cost nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import machine
from benchmarks.running import ROOT
from benchmarks.table import table

JOBS = ("fit", "score", "self-influence")

MEASURE = """
import json, resource, sys, time
import torch
from support import EkfacInfluence, ImdbDataset, ModelLogitsWrapper
from support.imdb import load_imdb
from support.model import load_model, load_tokenizer, require_gradients_only

reviews, imdb, tokenizer, model = int(sys.argv[1]), load_imdb(), load_tokenizer(), load_model()
require_gradients_only(model)
train, test = (
    ImdbDataset(imdb[split].shuffle(seed=0).select(range(count)), tokenizer)
    for split, count in (("train", reviews), ("test", 10))
)
engine = EkfacInfluence(
    ModelLogitsWrapper(model), hessian_regularization=1e-5, covariance_positions="all"
)
x, y, _ = next(iter(train.loader(reviews)))
jobs = {
    "fit": lambda: engine.fit(train.loader(8)),
    "score": lambda: engine.score(test.loader(8), train.loader(8)),
    "self-influence": lambda: engine.self_influences(x, y),
}
found = {}
for name, job in jobs.items():
    start = time.perf_counter()
    result = job()
    found[name] = time.perf_counter() - start
    if name == "score":
        scores = result.tolist()
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": found, "megabytes": memory / 1024, "scores": scores}))
"""


def measured(checkout: Path, reviews: int) -> dict:
    """One process of a checkout, whatever package of that name is installed."""
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, str(reviews)],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(told.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    parser.add_argument("checkout", type=Path, help="the root of the other checkout")
    parser.add_argument("--reviews", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    rounds = [
        [measured(root, chosen.reviews) for root in (chosen.checkout.resolve(), ROOT)]
        for _ in range(chosen.rounds)
    ]
    rows = []
    for job in JOBS:
        pairs = [(other["seconds"][job], ours["seconds"][job]) for other, ours in rounds]
        ratios = sorted(ours / other for other, ours in pairs)
        other, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
        rows.append([job, f"{other:.1f} s", f"{ours:.1f} s", spread])
    sizes = [[side["megabytes"] for side in pair] for pair in rounds]
    other, ours = (statistics.median(side) for side in zip(*sizes, strict=True))
    rows.append(["peak memory", f"{other:.0f} MB", f"{ours:.0f} MB", f"{ours / other:.2f}"])
    print(f"{machine.described()['processor']}; {chosen.reviews} reviews, {chosen.rounds} rounds\n")
    print("\n".join(table(["", "the other", "this one", "this / other"], rows)))
    old, new = ([one for row in side["scores"] for one in row] for side in rounds[0])
    largest = max(abs(a - b) for a, b in zip(old, new, strict=True)) / max(map(abs, old))
    print(f"\nlargest difference of scores over the largest score: {largest:.1e}")


if __name__ == "__main__":
    main()
