"""What the job of notebook 04 costs: `python benchmarks/notebook_04.py`.

Each measurement runs in a process of its own, because a process only knows its largest memory ever.
The first row, loading everything and one forward pass without gradients, is what the others stand on.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from support import EkfacInfluence, ImdbDataset, ModelLogitsWrapper
from support.imdb import load_imdb
from support.model import load_model, load_tokenizer, require_gradients_only

SEED, NUM_TRAIN = 0, 100


def prepared() -> tuple[ModelLogitsWrapper, ImdbDataset, ImdbDataset]:
    """Model and samples as in the notebook."""
    imdb, tokenizer, model = load_imdb(), load_tokenizer(), load_model()
    require_gradients_only(model)
    train, test = (
        ImdbDataset(imdb[split].shuffle(seed=SEED).select(range(NUM_TRAIN)), tokenizer)
        for split in ("train", "test")
    )
    return ModelLogitsWrapper(model, tokenizer.pad_token_id), train, test


def forward() -> Callable[[], object]:
    model, train, _ = prepared()

    def job() -> None:
        with torch.inference_mode():
            for input_ids, *_ in train.loader(7):
                model(input_ids)

    return job


def fit() -> Callable[[], object]:
    model, train, _ = prepared()
    return lambda: EkfacInfluence(model).fit(train.loader(7))


def influences() -> Callable[[], object]:
    model, train, test = prepared()
    batch, queries = train.batch(range(7)), test.batch(range(5))
    engine = EkfacInfluence(model, hessian_regularization=1e-5).fit([batch])
    return lambda: engine.influences(*queries[:2], *batch[:2])


JOBS = {
    "bare forward passes, 100 reviews": forward,
    "fit, 100 reviews": fit,
    "influences, 5 x 7, after a fit on 7": influences,
}


def measure(name: str) -> None:
    job = JOBS[name]()
    start = time.monotonic()
    job()
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{name:38} {seconds:7.1f} s   peak {peak:6.0f} MB", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        for job_name in JOBS:
            subprocess.run([sys.executable, __file__, job_name], check=True)
