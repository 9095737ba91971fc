"""`python -m experiments.tail_on_model`: the engine on the model before the banks of its tail.

A bank of `experiments.bank_making` trains the last feed-forward layers and the head on vectors of [CLS], one
position per review. A user has the whole model, in which those layers see every token and only [CLS] has a
gradient. So the trained tail is put back into its encoder, and the engine is asked there: with the
activation covariance over the positions that carry gradient, which is that of the vectors, and with that
over all positions; `tail_on_model.csv`. Scores are kept in the cache.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from experiments.bank_making import EXPERIMENTS, QUERIES, Experiment, bank_path, retraining
from experiments.bases import scored
from experiments.judgement import agreement_row
from support.cache import cache_folder
from support.ekfac import EkfacInfluence
from support.ekfac.storage import digest, replacing
from support.imdb import ImdbDataset, load_imdb
from support.judge import load_bank
from support.model import ModelLogitsWrapper, load_tokenizer, packaged_encoder
from support.retraining import Checkpoint, ClassifierTail

TABLE = Path(__file__).parent / "tail_on_model.csv"
DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
ASKED = [("main", "20%", "all"), ("main", "100%", "all")]
ASKED += [(name, where, "gradient") for name in EXPERIMENTS for where in ("20%", "100%")]


def engine_on_the_model(experiment: Experiment, checkpoint: Checkpoint, positions: str) -> EkfacInfluence:
    """The engine, unfitted, on the encoder with this checkpoint's tail in it, whose layers are tracked."""
    encoder = packaged_encoder(experiment.recipe.head_seed).eval().requires_grad_(False)
    ClassifierTail(encoder).load_state_dict(checkpoint.model().state_dict())
    return EkfacInfluence(ModelLogitsWrapper(encoder), covariance_positions=positions)


def reviews(split: str, rows: range) -> list[tuple[Tensor, Tensor]]:
    """Batches of tokens and labels, of the reviews that the banks' vectors were read from."""
    chosen = load_imdb()[split].shuffle(seed=0).select(rows)
    return [(ids, labels) for ids, labels, _ in ImdbDataset(chosen, load_tokenizer()).loader(50)]


def influences(name: str, where: str, positions: str) -> Iterator[tuple[float, Tensor]]:
    """λ and influences `(queries, train)`; computed once, then read from the cache."""
    experiment = EXPERIMENTS[name]
    run, share = retraining(experiment), float(where.rstrip("%")) / 100
    (checkpoint,) = run.path(torch.arange(len(run.reviews)), seed=0, shares=[share])
    engine = engine_on_the_model(experiment, checkpoint, positions)
    first = experiment.first_review
    train = reviews("train", range(first, first + experiment.train_reviews))
    key = f"{digest(dict(engine.model.state_dict()))} {positions} {DAMPINGS} {digest(_numbered(train))}"
    file = (
        cache_folder() / "fidelity" / f"on-model-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    )
    if not file.exists():
        engine.fit(train)
        found = scored(engine, engine.curvature, reviews("test", range(QUERIES)), train, DAMPINGS)
        with replacing(file) as fresh:
            save_file({str(value): scores.influences.sum(dim=0) for value, scores in found.items()}, fresh)
    tensors = load_file(file)
    return ((value, tensors[str(value)]) for value in DAMPINGS)


def _numbered(batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {str(number): ids for number, (ids, _) in enumerate(batches)}


def table() -> pd.DataFrame:
    """One row for each bank, place, kind of positions and λ."""
    rows = []
    for name, where, positions in tqdm(ASKED, "tails on the model", unit="place"):
        bank = load_bank(bank_path(name))
        for value, scores in influences(name, where, positions):
            told = {"experiment": name, "where": where, "positions": positions, "regularization": str(value)}
            rows.append(agreement_row(bank, scores, **told))
    return pd.DataFrame(rows)


if __name__ == "__main__":
    table().round(5).to_csv(TABLE, index=False)
