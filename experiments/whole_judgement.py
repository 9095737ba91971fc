"""`python -m experiments.whole_judgement`: scorers before the bank of whole models, `whole_model.csv`.

EK-FAC on the model itself, its layers those of the chapters (feed-forward and head) or LoRA's own, in the
bases of `experiments.bases`, at checkpoints of a training on all reviews, for a grid of λ; beside it what
looks at texts and labels only. What is done is kept in the cache. With a GPU two minutes, without one some
hours.
"""

import copy
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from experiments.bank_making import QUERIES, TRAIN_REVIEWS, finished
from experiments.bases import Damping, Scores, Share, curvatures, scored
from experiments.finetuning import Finetuning
from experiments.judgement import agreement_row
from experiments.scorers import SIMILARITIES, Question
from experiments.whole_model import BANK, RECIPE, WholeRetraining, reviews
from support.cache import cache_folder
from support.ekfac import EkfacInfluence
from support.ekfac.curvature import Eigenbasis, LayerCurvature
from support.ekfac.storage import digest, replacing
from support.imdb import ImdbDataset
from support.judge import Bank, subset_scores
from support.model import ModelLogitsWrapper, require_gradients_only
from support.retraining import Reviews, read_vectors

TABLE = Path(__file__).parent / "whole_model.csv"
TWO = ("all positions", "gradient")
GRADIENTS = "gradients alone"
ASKED = [(0.1, "chapters", TWO), (0.2, "chapters", (*TWO, "weighted", GRADIENTS)), (0.5, "chapters", TWO)]
ASKED += [(1.0, "chapters", (*TWO, GRADIENTS)), (0.2, "LoRA", TWO)]
"""Share of the steps, layers that are tracked, and bases."""

LAYER_BY_LAYER = [(share, "chapters", kind) for share in (0.2, 1.0) for kind in TWO]

DAMPINGS = (
    *(1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    *(Share(factor, "mean") for factor in (0.1, 1.0, 10.0, 100.0)),
    *(Share(factor, "0.99 quantile") for factor in (0.1, 1.0, 10.0)),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@cache
def run_at(share: float) -> Finetuning:
    """A training on all reviews, of seed 0, at a share of its steps; its weights are kept in the cache."""
    train = reviews("train", TRAIN_REVIEWS)
    states = WholeRetraining(train).steps(list(range(len(train))), seed=0)
    run = next(states)
    step = round(share * len(run.batches))
    key = hashlib.sha256(f"{RECIPE} {digest(dict(tokens_by_number(train)))} {step}".encode()).hexdigest()
    path = cache_folder() / "fidelity" / f"whole-{key[:32]}.safetensors"
    if not path.exists():
        while run.steps_done < step:
            run = next(states)
        with replacing(path) as fresh:
            save_file({name: tensor.detach() for name, tensor in run.trained.items()}, fresh)
    for name, tensor in load_file(path).items():
        run.trained[name].data.copy_(tensor)
    return run


def tokens_by_number(dataset: ImdbDataset) -> Iterator[tuple[str, Tensor]]:
    """The reviews' tokens by number."""
    return ((str(row), ids) for row, ids in enumerate(dataset.input_ids))


def engine_at(share: float, tracked: str) -> EkfacInfluence:
    """The engine on the model at a place, unfitted."""
    model = copy.deepcopy(run_at(share).model).eval()
    if tracked == "chapters":
        model = model.merge_and_unload()
        require_gradients_only(model)
    return EkfacInfluence(ModelLogitsWrapper(model)).to(DEVICE)


def sums_at(share: float, tracked: str, kinds: tuple[str, ...]) -> Iterator[tuple[dict[str, str], Tensor]]:
    """Settings, and what they say of each subset: its summed scores, `(queries, subsets)`. All that the judge
    asks; computed once, then read from the cache."""
    engine, member = engine_at(share, tracked), finished(BANK).membership
    told = [digest(dict(engine.model.state_dict())), digest({"membership": member}), *map(str, DAMPINGS)]
    key = hashlib.sha256(" ".join(told).encode()).hexdigest()[:24]
    files = {kind: cache_folder() / "fidelity" / f"whole-{key}-{kind}.safetensors" for kind in kinds}
    train, queries = (
        list(reviews(split, rows).loader(50)) for split, rows in (("train", TRAIN_REVIEWS), ("test", QUERIES))
    )
    missing = [kind for kind, file in files.items() if not file.exists()]
    if bases := [kind for kind in missing if kind != GRADIENTS]:
        found = curvatures(engine, train, bases, progress=True)
    for kind in missing:
        curvature = no_curvature(engine) if kind == GRADIENTS else found[kind]
        layered = (share, tracked, kind) in LAYER_BY_LAYER
        sums = {}
        for value, scores in scored(engine, curvature, queries, train, dampings(kind), True).items():
            parts = normalised(scores)
            by_layer = zip(engine.layers, scores.influences, strict=True) if layered else ()
            parts |= {f"plain/{name}": part for name, part in by_layer}
            for name, part in parts.items():
                sums[f"{value}/{name}"] = subset_scores(part.cpu().double(), member).T.float().contiguous()
        with replacing(files[kind]) as fresh:
            save_file(sums, fresh)
    for kind, file in files.items():
        sums = load_file(file)
        for value in dampings(kind):
            for normalisation, layer in [
                ("plain", ""),
                ("relative", ""),
                *(("plain", name) for name in engine.layers),
            ]:
                if (setting := f"{value}/{normalisation}/{layer}") in sums:
                    told = {"basis": kind, "regularization": str(value)}
                    yield told | {"normalisation": normalisation, "layer": layer}, sums[setting]


def dampings(kind: str) -> tuple[Damping, ...]:
    """Without curvature λ changes nothing."""
    return (1.0,) if kind == GRADIENTS else DAMPINGS


def no_curvature(engine: EkfacInfluence) -> dict[str, LayerCurvature]:
    """One in which influences are products of gradients, for λ = 1."""
    found = {}
    for name, layer in engine.layers.items():
        sides = [torch.eye(width, device=layer.device) for width in (layer.d_in, layer.d_out)]
        basis = Eigenbasis(*sides, *(side.diagonal() for side in sides))
        found[name] = LayerCurvature(basis, engine.passes.zeros(layer.d_out, layer.d_in))
    return found


def normalised(scores: Scores) -> dict[str, Tensor]:
    """Scores of all layers together, plain and relative to the root of self-influence."""
    plain, own = scores.influences.sum(dim=0), scores.self_influences.sum(dim=0)
    return {"plain/": plain, "relative/": plain / own.sqrt()}


def similarities() -> Iterator[tuple[str, Tensor]]:
    """What looks at texts, labels and the untrained encoder."""
    start = WholeRetraining(reviews("train", TRAIN_REVIEWS)).steps([0], seed=0)
    encoder = ModelLogitsWrapper(copy.deepcopy(next(start).model).merge_and_unload().eval())
    sides: list[Reviews] = [
        read_vectors(encoder, reviews(split, rows), encoder.model.pre_classifier)
        for split, rows in (("train", TRAIN_REVIEWS), ("test", QUERIES))
    ]
    question = Question([], *sides)
    for name in ("same label", "TF-IDF, label sign", "BM25, label sign", "representation cosine, label sign"):
        yield name, SIMILARITIES[name](question)


def table() -> pd.DataFrame:
    """One row for each scorer, place (or two, whose scores are added), tracked layers, basis, λ,
    normalisation, and layer or all layers."""
    bank = finished(BANK)
    rows = [agreement_row(bank, scores, scorer=name) for name, scores in similarities()]
    # Of summed scores: each subset then has one member, its sum.
    summed = Bank(torch.eye(len(bank.membership), dtype=torch.bool), bank.margins)
    for share, tracked, kinds in tqdm(ASKED, "places", unit="place"):
        told = {"scorer": "EK-FAC", "where": f"{share:.0%}", "tracked": tracked}
        for settings, sums in sums_at(share, tracked, kinds):
            rows.append(agreement_row(summed, sums, **told, **settings))
    one, other = (
        [(told, sums) for told, sums in sums_at(share, "chapters", TWO) if not told["layer"]]
        for share in (0.2, 0.5)
    )
    for (settings, sums), (_, more) in zip(one, other, strict=True):
        told = {"scorer": "EK-FAC", "where": "20% and 50%", "tracked": "chapters"}
        rows.append(agreement_row(summed, sums + more, **told, **settings))
    return pd.DataFrame(rows)


if __name__ == "__main__":
    table().round(5).to_csv(TABLE, index=False)
