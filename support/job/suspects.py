"""Training examples whose labels look wrong, for the people who label them again."""

import re

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from support.ekfac.storage import replacing
from support.job.classifier import Classifier
from support.job.described import own_columns
from support.job.errors import BadSetting
from support.job.store import disk_full_is_told, in_blocks
from support.job.team import progress
from support.job.top import columns_of, has_all
from support.job.work import Job

BEFORE = 60
"""Ranks imagined before the first, so that none decides alone: reciprocal rank fusion, Cormack et al. 2009."""
TEMPERATURES = torch.logspace(-1, 1.5, 100, dtype=torch.float64)
ADVICE = (
    "As long as a model has not learned wrong labels by heart, rank_loss alone finds as many. When it has, and "
    "agrees with its own labels far more often than with others, self-influence and harm find more."
)


def suspects(job: Job) -> str | None:
    """Write `suspects.csv`, the `--count` most suspicious training examples, and say what to expect of it.

    Ranks begin with the largest loss, self-influence, and harm, Σ −influence on the queries, whose labels are
    trusted; the last two if the store has them. Combined they are Σ 1/(60 + rank). What `is expected to be
    wrong` is Σ 1 − p(label), with p at the temperature that makes the model as sure of the queries as it is
    right; without them, at 1. Where opinions differ, that counts, too: of 2,000 short reviews with 5 % of
    the labels flipped it was one to two and a half times what had been flipped of the first hundred.

    Raises `BadSetting` for a model that writes, and as `Job.begin`, `own_columns` and the store do.
    """
    if not isinstance(job.task, Classifier):
        raise BadSetting("suspects: a model that writes has no labels that could be wrong. See --task.")
    job.begin()
    _predict(job)
    store, numbers = job.store, range(len(job.training))
    queries = job.queries if job.team.on_first(lambda: has_all(store, "scores")) else None
    if job.team.rank:  # from here on nothing may be asked of the team
        return None
    p = torch.tensor(store.read("probabilities", (range(len(job.task.class_names)), numbers))).T
    labels = torch.tensor(job.training.described(numbers)["label"])
    found = {"loss": -p[numbers, labels].log()}
    calibrated, told = p, ""
    if has_all(store, "self_influences"):
        found["self-influence"] = store.read("self_influences", (numbers,))
    if queries is not None:
        found["harm"] = -np.concatenate([block.sum(axis=0) for _, block in columns_of(store, False)])
        calibrated, told = _by_queries(job, p)
    ranks = pd.DataFrame(
        {f"rank_{name}": pd.Series(one).rank(ascending=False, method="first") for name, one in found.items()}
    )
    order = (
        (1 / (BEFORE + ranks))
        .sum(axis=1)
        .sort_values(ascending=False, kind="stable")
        .index[: job.given["count"]]
    )
    table = _table(job, p, labels).join(ranks.astype(int)).loc[order]
    path = (job.given["output"] or store.folder) / "suspects.csv"
    with disk_full_is_told(path.parent), replacing(path) as fresh:
        table.to_csv(
            fresh, index=False, encoding="utf-8-sig"
        )  # the mark at its beginning is for spreadsheets
    wrong = (1 - calibrated[numbers, labels])[order.tolist()].sum()
    agreed = (p.argmax(dim=1) == labels).double().mean()
    return (
        f"{path}: {len(order):,} of {len(labels):,} training examples, by {', '.join(found)}. About {wrong:.0f} of "
        f"them are expected to be wrong, or open to dispute. The model agrees with {agreed:.1%} of its labels{told}. "
        f"{ADVICE}"
    )


def _predict(job: Job) -> None:
    """The probability of each class for each training example, into `probabilities`, `(classes, training)`."""
    name, classes, training = "probabilities", range(len(job.task.class_names)), len(job.training)
    blocks = in_blocks(training, job.subject.block)

    def missing() -> list[range]:
        job.store.make_array(name, (len(classes), training), (len(classes), job.subject.block), "float64")
        return [block for block in blocks if not job.store.has(name, (classes, block))]

    to_do = job.team.on_first(missing)
    done = training - sum(map(len, to_do))
    with progress(job.team, "predict", training, done, job.given["tell_seconds"]) as count, torch.no_grad():
        for block in job.team.shared("predict", to_do):
            p = job.task.probabilities(job.training, block, job.engine.passes.device)
            job.store.write(name, (classes, block), p.T.numpy(force=True))
            count(len(block))
        job.team.wait()


@torch.no_grad()
def _by_queries(job: Job, p: Tensor) -> tuple[Tensor, str]:
    """Probabilities at the temperature that suits the queries best, and how many of these are told right."""
    numbers = range(len(job.queries))
    asked = job.task.probabilities(job.queries, numbers, job.engine.passes.device).cpu()
    labels = torch.tensor(job.queries.described(numbers)["label"])
    losses = [-at_temperature(asked, heat)[numbers, labels].log().mean() for heat in TEMPERATURES]
    agreed = (asked.argmax(dim=1) == labels).double().mean()
    told = f", and with {agreed:.1%} of the labels of {len(numbers):,} queries"
    return at_temperature(p, TEMPERATURES[int(np.argmin(losses))]), told


def at_temperature(p: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities `(examples, classes)` as if the logits were divided by this."""
    smallest = torch.finfo(p.dtype).tiny
    return (p.clamp_min(smallest).log() / temperature).softmax(dim=1)


def _table(job: Job, p: Tensor, labels: Tensor) -> pd.DataFrame:
    """What the people who label are shown of each training example. Raises `DatasetNotUsable`."""
    names, subject, kept = job.task.model.model.config.id2label, job.subject, job.given["keep"]
    own = own_columns(
        subject.dataset, subject.training_split, job.training.rows, kept.split(",") if kept else []
    )
    others = p.scatter(1, labels[:, None], -1.0)
    table = {
        "row": job.training.rows,
        **{name: own[name].map(as_text) for name in own},
        "text": [as_text(text) for text in job.training.texts["text"]],
        "label": [names[label] for label in labels.tolist()],
        "p_label": p[range(len(p)), labels],
        "suggested": [names[label] for label in others.argmax(dim=1).tolist()],
        "p_suggested": others.max(dim=1).values,
    }
    return pd.DataFrame(table)


def as_text(value: str) -> str:
    """A stranger's text as a spreadsheet leaves it: behind an apostrophe if it would be computed."""
    return f"'{value}" if re.match(r"[=+\-@\t\r]", value) else value
