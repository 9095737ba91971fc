"""`python -m experiments.language_judgement`: scorers before the bank of a model that writes, `language.csv`.

Half of the queries are to choose by, the other half is reported. Scorers that look at texts alone; the loss
of a training text; products of gradients; EK-FAC for a grid of λ, before training, a fifth of the way and at
its end, whole and with queries at rank 32. The curvature comes from two samples of labels. Scores are kept
in the cache, place by place.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from experiments.bank_making import digest, finished
from experiments.bases import Damping, Share, scored
from experiments.judgement import agreement_row
from experiments.language_bank import BANK, WriterRetraining, log_odds, retraining, reviews_and_queries
from experiments.scorers import Question, bm25, representation_cosine, tf_idf
from experiments.whole_judgement import no_curvature, normalised
from support.cache import cache_folder
from support.ekfac import EkfacInfluence, NextToken
from support.ekfac.storage import replacing
from support.judge import Bank, noise_ceiling
from support.language import load_language_model
from support.retraining import Checkpoint, Reviews, losses

TABLE = Path(__file__).parent / "language.csv"
PLACES = (0.0, 0.2, 1.0)
DAMPINGS: tuple[Damping, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0, *(Share(x, "mean") for x in (0.1, 1.0, 10.0)))
RANK, RANK_DAMPING, SAMPLES = 32, 0.1, 2


def similarities(train: Reviews, queries: Reviews) -> Iterator[tuple[str, Tensor]]:
    """What looks at texts, or at what the blocks below make of them: the mean over tokens."""
    sides = (Reviews(side.vectors.mean(dim=1), side.labels, side.texts) for side in (train, queries))
    question = Question([], *sides)
    for scorer in (tf_idf, bm25, representation_cosine):
        yield scorer.__name__, scorer(question)


def influences_at(checkpoint: Checkpoint, train: Reviews, queries: Reviews) -> dict[str, Tensor]:
    """By "scorer/λ/normalisation": scores at one place, with gradients of both sides taken there."""
    engine = EkfacInfluence(checkpoint.model(), likelihood=NextToken(SAMPLES), progress=True)
    sides = [[*zip(side.vectors.split(16), side.labels.split(16), strict=True)] for side in (train, queries)]
    engine.fit(sides[0])
    found = {}
    asked = [("EK-FAC", engine.curvature, DAMPINGS), ("gradients", no_curvature(engine), (1.0,))]
    for scorer, curvature, dampings in asked:
        for value, scores in scored(engine, curvature, sides[1], sides[0], dampings, True).items():
            for name, part in normalised(scores).items():
                found[f"{scorer}/{value}/{name.removesuffix('/')}"] = part.contiguous()
    engine.query_rank, engine.hessian_regularization = RANK, RANK_DAMPING
    found[f"EK-FAC, rank {RANK}/{RANK_DAMPING}/plain"] = engine.score(sides[1], sides[0])
    return found


def kept_influences(run: WriterRetraining, queries: Reviews) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """`influences_at` every place of a training on all reviews: computed once, then read from the cache."""
    told = [digest(run.reviews), digest(queries), repr(run.recipe), repr(list(map(str, DAMPINGS)))]
    key = hashlib.sha256(" ".join(told).encode()).hexdigest()[:32]
    files = {share: cache_folder() / f"language-{key}-{share:g}.safetensors" for share in PLACES}
    missing = [share for share, file in files.items() if not file.exists()]
    path = run.path(torch.arange(len(run.reviews)), seed=0, shares=missing) if missing else []
    for share, checkpoint in zip(missing, path, strict=True):
        with replacing(files[share]) as fresh:
            save_file(influences_at(checkpoint, run.reviews, queries), fresh)
    for share, file in files.items():
        yield share, load_file(file)


def table(bank: Bank, run: WriterRetraining, queries: Reviews) -> pd.DataFrame:
    """One row for each scorer, place, λ and normalisation, and, of a bank with several seeds, one for what
    noise leaves to be reached."""
    train = run.reviews
    rows = [agreement_row(bank, scores, scorer=name) for name, scores in similarities(train, queries)]
    for share, found in tqdm(kept_influences(run, queries), "places", len(PLACES), unit="place"):
        for name, scores in found.items():
            scorer, regularization, normalisation = name.split("/")
            told = {"scorer": scorer, "where": f"{share:.0%}", "regularization": regularization}
            rows.append(agreement_row(bank, scores, **told, normalisation=normalisation))
    loss = losses(log_odds(run.run_on_all(seed=0), train)).expand(len(queries), -1)
    rows.append(agreement_row(bank, loss, scorer="training_loss", where="100%"))
    if bank.margins.shape[1] > 1:
        ceiling = noise_ceiling(bank)
        rows.append({"scorer": "ceiling", "choice": ceiling, "report": ceiling})
    return pd.DataFrame(rows)


def main() -> None:
    model, tokenizer = load_language_model()
    train, queries = reviews_and_queries(model, tokenizer)
    table(finished(BANK), retraining(model, train), queries).round(5).to_csv(TABLE, index=False)


if __name__ == "__main__":
    main()
