"""`python -m experiments.language_facts`: scorers before the facts planted in the model that writes.

Ten invented facts, each in three training texts, its teachers, beside three decoys that share the words and
not the fact; each is asked for in three wordings. `language_facts.csv` has how many teachers come first, for
each scorer, snapshot of the taught model, λ and normalisation: means over the seeds of the Fisher's draws.
"""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from experiments.bank_making import digest
from experiments.language_bank import BLOCKS
from experiments.language_scorers import WEIGHTED, Place, kept, settings, similarities
from support.ekfac import storage
from support.imdb import load_imdb
from support.judge import Agreement
from support.language import FEED_FORWARD
from support.model import require_gradients_only
from support.writing import (
    Text,
    WriterTail,
    load_writer,
    questions,
    read_for_the_writer,
    sequence,
    training_texts,
)

FACTS_TABLE = Path(__file__).parent / "language_facts.csv"
SNAPSHOTS = "20-percent", "final"
SEEDS = range(3)
"""Of the Fisher's draws."""


def first_places(
    scores: Float[Tensor, "asked texts"], texts: Sequence[Text], count: int, kind: str
) -> Float[np.ndarray, " facts"]:
    """How many of a fact's teachers, or of its decoys, are among the `count` texts that a question about it
    scores highest, as a share of as many as could be: the mean over the questions in other words."""
    found = [[] for _ in questions()]
    for number, row in enumerate(scores.topk(count, dim=1).indices.tolist()):
        fact = number % len(found)
        ours = sum(texts[place].kind == kind and texts[place].fact == fact for place in row)
        found[fact].append(ours / min(count, 3))
    return np.mean(found, axis=1)


def facts_row(scores: Sequence[Float[Tensor, "asked texts"]], texts: Sequence[Text], **names: object) -> dict:
    """Of scores of one or more seeds, means over these: the first text a teacher, teachers among three and
    ten, with intervals over facts; the same of decoys that are false alarms; of teachers among three the mean
    of every other fact, to choose by, and of the rest; and the standard deviation over seeds."""

    def found(count: int, kind: str) -> Float[np.ndarray, "seeds facts"]:
        return np.stack([first_places(one, texts, count, kind) for one in scores])

    row = dict(names)
    for count in (1, 3, 10):
        recall = Agreement(found(count, "teacher").mean(axis=0))
        low, high = recall.interval()
        row |= {f"teachers_{count}": recall.mean, f"low_{count}": low, f"high_{count}": high}
        row[f"decoys_{count}"] = found(count, "decoy").mean()
    of_facts = found(3, "teacher")
    spread = of_facts.mean(axis=1).std(ddof=1) if len(scores) > 1 else np.nan
    return row | {"choice": of_facts[:, ::2].mean(), "report": of_facts[:, 1::2].mean(), "spread": spread}


def facts_place(snapshot: str, seed: int, texts: Sequence[Text]) -> Place:
    """The taught model, its texts and the questions about the facts, each in three words."""
    model, tokenizer = load_writer(snapshot=snapshot)
    asked = [question for words in range(3) for question in questions(words)]
    tail = WriterTail(model, BLOCKS)
    require_gradients_only(tail, FEED_FORWARD)
    told = [sequence(tokenizer, text) for text in texts], [text.said for text in texts]
    asked = [sequence(tokenizer, *one) for one in asked], [f"{one.asked} {b}{one.said}" for one, b in asked]
    return Place(tail, *(read_for_the_writer(model, *side, BLOCKS) for side in (told, asked)), seed=seed)


def facts_table() -> pd.DataFrame:
    """One row for each scorer, snapshot, λ and normalisation, the last snapshot "all", for the sum over them;
    and for the sum of EK-FAC and BM25, each over its standard deviation."""
    texts, rows, summed = training_texts(load_imdb()["train"]), [], {}
    for snapshot in tqdm(SNAPSHOTS, "snapshots", unit="snapshot"):
        by_seed = []
        for seed in SEEDS:
            place = cache(partial(facts_place, snapshot, seed, texts))
            told = [storage.digest(dict(place().model.named_parameters())), digest(place().queries), seed]
            by_seed.append({("EK-FAC", name): scores for name, scores in kept(told, place).items()})
            if snapshot == SNAPSHOTS[-1]:
                weighted = kept(told, place, WEIGHTED)
                by_seed[-1] |= {(WEIGHTED, name): scores for name, scores in weighted.items()}
        words = dict(similarities(place().train, place().queries))
        if not rows:
            rows += [facts_row([scores], texts, scorer=name) for name, scores in words.items()]
        together = {key: [one[key] for one in by_seed] for key in by_seed[0]}
        for key, scores in together.items():
            rows += _with_bm25(scores, words["bm25"], texts, settings(*key) | {"where": snapshot})
            before = summed.get(key, [0.0] * len(scores))
            summed[key] = [total + one for total, one in zip(before, scores, strict=True)]
    for key in (key for key in summed if key[0] != WEIGHTED):
        rows += _with_bm25(summed[key], words["bm25"], texts, settings(*key) | {"where": "all"})
    return pd.DataFrame(rows)


def _with_bm25(
    scores: list[Tensor], bm25: Tensor, texts: Sequence[Text], names: dict[str, str]
) -> list[dict]:
    rows = [facts_row(scores, texts, **names)]
    if names["scorer"] == "EK-FAC":
        both = [sum(one / one.std(dim=1, keepdim=True) for one in (seed, bm25)) for seed in scores]
        rows.append(facts_row(both, texts, **names | {"scorer": "EK-FAC and BM25"}))
    return rows


if __name__ == "__main__":
    facts_table().round(5).to_csv(FACTS_TABLE, index=False)
