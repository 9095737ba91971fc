"""`python -m experiments.language_judgement`: scorers before the bank of a model that writes, `language.csv`,
and before the facts that were planted in the taught one, `language_facts.csv`.

Half of the queries are to choose by, the other half is reported. Scorers that look at texts alone; the loss
of a training text; products of gradients; EK-FAC for a grid of λ, a fifth of the way through training, at its
end, and the two added up. The curvature comes from two samples of labels; of the bank's model products are
taken in bfloat16, as in its training. Scores are kept in the cache, place by place.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from experiments.bank_making import digest, finished
from experiments.bases import Damping, Scores, Share, scored
from experiments.judgement import agreement_row
from experiments.language_bank import (
    BANK,
    BLOCKS,
    WriterRetraining,
    log_odds,
    retraining,
    reviews_and_queries,
)
from experiments.scorers import Normalised, Question, bm25, representation_cosine, tf_idf
from support.cache import cache_folder, fit_or_load
from support.ekfac import EkfacInfluence, NextToken, storage
from support.ekfac.storage import replacing
from support.imdb import load_imdb
from support.judge import Agreement, Bank, reliability
from support.language import FEED_FORWARD, load_language_model
from support.model import require_gradients_only
from support.retraining import Reviews, losses
from support.writing import (
    Text,
    WriterTail,
    load_writer,
    questions,
    read_for_the_writer,
    sequence,
    training_texts,
)

FOLDER = Path(__file__).parent
TABLE, FACTS_TABLE = FOLDER / "language.csv", FOLDER / "language_facts.csv"
SNAPSHOTS = (("final", 0),)
"""Of the taught model, and seeds of the Fisher's draws."""
PLACES = (0.2, 1.0)
GRADIENTS, NO_CURVATURE = "gradients", 1e9
"""With a λ beside which no curvature is left influences are products of gradients, over λ."""
SHARES = tuple(Share(factor, "mean") for factor in (0.1, 1.0, 10.0))
DAMPINGS: tuple[Damping, ...] = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0, *SHARES, NO_CURVATURE)
SAMPLES = 2


def similarities(train: Reviews, queries: Reviews) -> Iterator[tuple[str, Tensor]]:
    """What looks at texts, or at what the blocks below make of them: the mean over real tokens."""
    means = (one.vectors.sum(dim=1) / one.vectors.any(dim=2).sum(dim=1)[:, None] for one in (train, queries))
    sides = ((mean, one.labels, one.texts) for mean, one in zip(means, (train, queries), strict=True))
    question = Question([], *(Reviews(*side) for side in sides))
    for scorer in (tf_idf, bm25, representation_cosine):
        yield scorer.__name__, scorer(question)


class Place:
    """The model on its way through a training on all reviews, and what is asked of it there: gradients of
    both sides are taken at this place."""

    def __init__(self, model: nn.Module, train: Reviews, queries: Reviews, **settings: object):
        self.model, self.train, self.queries = model, train, queries
        self.settings = {"likelihood": NextToken(SAMPLES), "progress": True} | settings

    def loaders(self, at_once: int = 16) -> tuple[list, list]:
        """Training reviews and queries in batches."""
        sides = self.train, self.queries
        return tuple(
            [*zip(one.vectors.split(at_once), one.labels.split(at_once), strict=True)] for one in sides
        )

    @cached_property
    def engine(self) -> EkfacInfluence:
        """Fitted on the training texts."""
        return fit_or_load(EkfacInfluence(self.model, **self.settings), self.loaders()[0])

    def influences(self) -> dict[Damping, Scores]:
        """EK-FAC for every λ."""
        train, queries = self.loaders()
        return scored(self.engine, self.engine.curvature, queries, train, DAMPINGS, progress=True)


@torch.no_grad()
def residual_sizes(model: nn.Module, reviews: Reviews) -> Float[Tensor, " reviews"]:
    """√ of Σ ‖p − e_token‖² over the targets of each text."""
    parts = zip(reviews.vectors.split(8), reviews.labels.split(8), strict=True)
    return torch.cat([NextToken().loss_direction(model(x), y).flatten(1).norm(dim=1) for x, y in parts])


def said_at(place: Place) -> dict[str, Tensor]:
    """By "λ/normalisation": scores at one place."""
    sizes, found = residual_sizes(place.model, place.train), {}
    for value, scores in place.influences().items():
        unit = NO_CURVATURE if value == NO_CURVATURE else 1.0
        parts = (unit * part.sum(dim=0) for part in (scores.influences, scores.self_influences))
        summed = Normalised(*parts, sizes)
        found |= {f"{value}/{name}": part.contiguous() for name, part in summed.all().items()}
    return found


def settings(name: str) -> dict[str, str]:
    """Scorer, λ and normalisation of scores of that name."""
    regularization, normalisation = name.split("/")
    told = {"scorer": "EK-FAC", "regularization": regularization, "normalisation": normalisation}
    return told | ({"scorer": GRADIENTS, "regularization": ""} if regularization == str(NO_CURVATURE) else {})


def kept(told: Sequence[object], place: Callable[[], Place]) -> dict[str, Tensor]:
    """`said_at` of a place, which `told` and the settings decide: computed once, then read from the cache."""
    key = " ".join(map(str, [*told, *DAMPINGS, SAMPLES]))
    file = cache_folder() / f"language-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if not file.exists():
        with replacing(file) as fresh:
            save_file(said_at(place()), fresh)
    return load_file(file)


def kept_influences(run: WriterRetraining, queries: Reviews) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Where on the way of a training on all reviews, and what is `kept` of there; last come the sums over the
    places."""
    told = [digest(run.reviews), digest(queries), run.recipe]
    path = cache(lambda: run.path(torch.arange(len(run.reviews)), seed=0, shares=PLACES))

    def place(number: int) -> Place:
        return Place(path()[number].model(), run.reviews, queries, precision="bfloat16")

    found = []
    for number, share in enumerate(tqdm(PLACES, "places", unit="place")):
        found.append(kept([*told, share], partial(place, number)))
        yield f"{share:.0%}", found[-1]
    yield "both", {name: sum(one[name] for one in found) for name in found[0]}


def ceiling(bank: Bank, twice: Bank) -> float:
    """The noise ceiling of a bank, as `noise_ceiling`, with the reliability of one seed from `twice`: its
    subsets that were trained on with two."""
    one, seeds = max(reliability(twice).mean, 0.0), bank.margins.shape[1]
    return float(np.sqrt(seeds * one / (1 + (seeds - 1) * one)))


def table(bank: Bank, twice: Bank, run: WriterRetraining, queries: Reviews) -> pd.DataFrame:
    """One row for each scorer, place, λ and normalisation, and one for what noise leaves to be reached."""
    train = run.reviews
    rows = [agreement_row(bank, scores, scorer=name) for name, scores in similarities(train, queries)]
    for where, found in kept_influences(run, queries):
        for name, scores in found.items():
            rows.append(agreement_row(bank, scores, **settings(name), where=where))
    loss = losses(log_odds(run.run_on_all(seed=0), train)).expand(len(queries), -1)
    rows.append(agreement_row(bank, loss, scorer="training_loss", where="100%"))
    limit = ceiling(bank, twice)
    rows.append({"scorer": "ceiling"} | dict.fromkeys(("choice", "report", "low", "high"), limit))
    return pd.DataFrame(rows)


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


def facts_row(scores: Float[Tensor, "asked texts"], texts: Sequence[Text], **names: object) -> dict:
    """The first text a teacher, teachers among three and ten, with intervals over facts; the same of decoys
    that are false alarms; and of teachers among three the mean of every other fact, to choose by, and of the
    rest."""
    row = dict(names)
    for count in (1, 3, 10):
        recall = Agreement(first_places(scores, texts, count, "teacher"))
        low, high = recall.interval()
        row |= {f"teachers_{count}": recall.mean, f"low_{count}": low, f"high_{count}": high}
        row[f"decoys_{count}"] = first_places(scores, texts, count, "decoy").mean()
    of_facts = first_places(scores, texts, 3, "teacher")
    return row | {"choice": of_facts[::2].mean(), "report": of_facts[1::2].mean()}


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
    """One row for each scorer, snapshot, seed of the Fisher, λ and normalisation; and for the sum of EK-FAC
    and BM25, each over its standard deviation."""
    texts, rows = training_texts(load_imdb()["train"]), []
    for snapshot, seed in tqdm(SNAPSHOTS, "snapshots", unit="snapshot"):
        place = cache(partial(facts_place, snapshot, seed, texts))
        told = [storage.digest(dict(place().model.named_parameters())), digest(place().queries), seed]
        words = dict(similarities(place().train, place().queries))
        if not rows:
            rows += [facts_row(scores, texts, scorer=name) for name, scores in words.items()]
        for name, scores in kept(told, place).items():
            names = settings(name) | {"where": snapshot, "seed": seed}
            rows.append(facts_row(scores, texts, **names))
            if names["scorer"] == "EK-FAC":
                both = sum(one / one.std(dim=1, keepdim=True) for one in (scores, words["bm25"]))
                rows.append(facts_row(both, texts, **names | {"scorer": "EK-FAC and BM25"}))
    return pd.DataFrame(rows)


def main() -> None:
    facts_table().round(5).to_csv(FACTS_TABLE, index=False)
    model, tokenizer = load_language_model()
    train, queries = reviews_and_queries(model, tokenizer)
    bank, twice = finished(BANK), finished(BANK, seeds=2)
    table(bank, twice, retraining(model, train), queries).round(5).to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
