"""`python -m benchmarks.index`: what an index costs to make and to ask, into `index.md`.

The packaged model a fifth of the way through its training, all its feed-forward layers and the head, and
some training reviews at full length. Making the index and self-influences take turns, batch by batch. Seconds
are of the processor, all threads together: other work on the machine then counts for little.
"""

import argparse
import time
from collections.abc import Callable
from datetime import date

import torch

from benchmarks import machine
from benchmarks.running import ROOT
from benchmarks.table import table
from support import EkfacInfluence, ImdbDataset
from support.chapters.story import begin
from support.ekfac import EkfacIndex

NUMBERS, KEPT, EXACT = 2044, 20_000, 100
"""Numbers of a byte for each review; reviews whose index is asked; reviews computed exactly."""
SIZE = NUMBERS + 4
BATCH, FITTED, SAMPLED = 10, 30, 1_000


def timed(call: Callable, *given: object) -> float:
    """Seconds of the processor."""
    start = time.process_time()
    call(*given)
    return time.process_time() - start


def questions(engine: EkfacInfluence, index: EkfacIndex, test: ImdbDataset, train: ImdbDataset) -> dict:
    """Seconds of a question: its own passes, then the index of `KEPT` reviews, made of random numbers, then
    `EXACT` reviews exactly."""
    ids, labels, _ = test.batch([0])
    index.sketches = torch.randint(-127, 128, (KEPT, NUMBERS), dtype=torch.int8)
    index.scales = torch.rand(KEPT)
    passes, whole = timed(index.sketched, [(ids, labels)]), timed(index.ask, ids, labels)
    factors = engine.influence_factors(ids, labels)
    blocks = [list(range(first, first + BATCH)) for first in range(0, min(EXACT, len(train)), BATCH)]
    exact = sum(timed(engine.influences_from_factors, factors, *train.batch(rows)[:2]) for rows in blocks)
    return {"passes": passes, "index": max(0.0, whole - passes), "exact": exact}


def making(engine: EkfacInfluence, index: EkfacIndex, train: ImdbDataset) -> dict:
    """Seconds of an index and of self-influences of the same reviews, by turns."""
    found = {"index": 0.0, "self": 0.0}
    for first in range(0, len(train), BATCH):
        ids, labels, _ = train.batch(list(range(first, min(first + BATCH, len(train)))))
        found["index"] += timed(index.sketched, [(ids, labels)])
        found["self"] += timed(engine.self_influences, ids, labels)
    return found


def on_paper(seconds_a_token: float, mean_tokens: float, reviews: int) -> list[str]:
    """A row: size and time of an index of so many reviews of the mean length."""
    hours = reviews * mean_tokens * seconds_a_token / 3600
    return [f"{reviews:,}", f"{reviews * SIZE / 1e6:,.0f} MB", f"{hours:,.1f} h"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description=__doc__)
    parser.add_argument("--reviews", type=int, default=300, help="training reviews that are measured")
    parser.add_argument("--quick", action="store_true", help="20 of them, to build/bench/quick")
    chosen = parser.parse_args()
    reviews = 20 if chosen.quick else chosen.reviews
    output = ROOT / "build" / "bench" / "quick" if chosen.quick else ROOT / "benchmarks"
    output.mkdir(parents=True, exist_ok=True)
    story = begin("packaged", 0, reviews, 1)
    engine = EkfacInfluence(story.early_model, hessian_regularization=1e-2)
    engine.fit([story.train.batch(list(range(first, first + BATCH))) for first in range(0, FITTED, BATCH)])
    index = EkfacIndex(engine, NUMBERS)
    made, asked = making(engine, index, story.train), questions(engine, index, story.test, story.train)
    tokens = sum(story.train.lengths())
    sample = story.imdb["train"].shuffle(seed=0).select(range(SAMPLED))
    mean = sum(ImdbDataset(sample, story.tokenizer).lengths()) / SAMPLED
    exactly = min(EXACT, reviews)
    rows = [
        [f"index of {reviews} reviews, {tokens:,} tokens", f"{made['index']:.1f} s"],
        ["self-influences of the same", f"{made['self']:.1f} s"],
        ["ratio of the two", f"{made['index'] / made['self']:.2f}"],
        ["a question's own passes", f"{asked['passes']:.2f} s"],
        [f"index of {KEPT:,} reviews asked, {SIZE:,} bytes each", f"{asked['index']:.2f} s"],
        [f"{exactly} reviews exactly", f"{asked['exact']:.1f} s"],
    ]
    paper = [on_paper(made["index"] / tokens, mean, count) for count in (KEPT, 1_000_000)]
    told = "Seconds of the processor, all threads together; other work on the machine counts for little."
    lines = [
        "# An index, made and asked",
        f"Written by `python -m benchmarks.index` on {date.today().isoformat()}; not by hand. {told}",
        f"{machine.processor()}, threads of torch: {torch.get_num_threads()}. The packaged model, all its "
        "feed-forward layers and the head, reviews at full length. The index asked has random numbers.",
        "\n".join(table(["", "seconds"], rows)),
        f"On paper, at {mean:.0f} tokens a review, the mean of {SAMPLED:,}:",
        "\n".join(table(["reviews", "index", "to make it"], paper)),
    ]
    (output / "index.md").write_text("\n\n".join(lines) + "\n")
    print(*lines, sep="\n\n")


if __name__ == "__main__":
    main()
