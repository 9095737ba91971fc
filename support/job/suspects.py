"""Training examples whose labels look wrong, for the people who label them again."""

import re
from contextlib import suppress

import numpy as np
import pandas as pd

from support.ekfac.storage import replacing
from support.job.classifier import Classifier
from support.job.errors import BadSetting, StepMissing
from support.job.models import DOUBTS
from support.job.store import Store, disk_full_is_told
from support.job.top import columns_of, kept, own_columns, said_of
from support.job.work import Job

BEFORE = 60
"""Ranks imagined before the first, so that none decides alone (reciprocal ranks, Cormack et al. 2009)."""
ADVICE = (
    "As long as a model has not learned wrong labels by heart, rank_loss alone finds as many. When it has, "
    "and agrees with its own labels far more often than with others, the other ranks may find more."
)


def suspects(job: Job) -> str | None:
    """Write `suspects.csv`, the `--count` most suspicious training examples, and say what to expect of it.

    Ranks begin with the largest loss, self-influence, and harm, Σ −influence on the queries, whose labels are
    trusted; the last two if the store has them. Combined they are Σ 1/(60 + rank). Expected to be wrong are
    Σ 1 − p(label), as `doubts` has it. Where opinions differ, that counts, too: of 2,000 short reviews with
    5 % of the labels flipped it was one to two times what had been flipped of the first hundred.

    Raises `BadSetting` for a model that writes, and as `Job.begin`, `own_columns` and the store do.
    """
    if not isinstance(job.task, Classifier):
        raise BadSetting("suspects: a model that writes has no labels that could be wrong. See --task.")
    job.begin()
    training = job.training
    # Queries that were chosen for the model's doubts don't say how often it is right.
    fair = job.question.query_rows.partition(":")[0] not in DOUBTS
    asked_before = job.team.on_first(lambda: "queries" in job.store.facts())
    queries = job.queries if fair and asked_before else None
    if job.team.rank:  # from here on nothing may be asked of the team
        return None
    said = said_of(job, training, np.arange(len(training)))
    doubt, right = 1 - said["p_label"], [_agreed(said, "its training labels")]
    if queries is not None:
        asked = said_of(job, queries, np.arange(len(queries)))
        doubt = doubts(said["p_label"], asked["p_label"])
        right.append(_agreed(asked, f"the labels of {len(queries):,} queries"))
    found = ranks(job.store, said["p_label"])
    order = (1 / (BEFORE + found)).sum(axis=1).sort_values(ascending=False, kind="stable").index
    order = order[: job.given["count"]]
    path = (job.given["output"] or job.store.folder) / "suspects.csv"
    with disk_full_is_told(path.parent), replacing(path) as fresh:
        # The mark at the beginning tells a spreadsheet how to read what follows.
        table = _readable(job, said).join(found).loc[order].map(as_text)
        table.to_csv(fresh, index=False, encoding="utf-8-sig")
    return (
        f"{path}: {len(order):,} of {len(training):,} training examples, by {', '.join(found)}. About "
        f"{doubt[order].sum():.0f} of them are expected to be wrong, or open to dispute. The model agrees "
        f"with {' and '.join(right)}. {ADVICE}"
    )


def ranks(store: Store, p_label: pd.Series) -> pd.DataFrame:
    """Ranks, 1 for the most suspicious, a column for each sign that the store has. Raises `StoreDamaged`."""
    signs = {"loss": -np.log(p_label)}
    with suppress(StepMissing):
        signs["self_influence"] = pd.Series(store.read("self_influences", (range(len(p_label)),)))
    with suppress(StepMissing):
        harm = [-scores.sum(axis=0) for _, scores in columns_of(store, relative=False)]
        signs["harm"] = pd.Series(np.concatenate(harm))
    return pd.DataFrame(signs).rank(ascending=False, method="first").astype(int).add_prefix("rank_")


def _readable(job: Job, said: pd.DataFrame) -> pd.DataFrame:
    """All training examples as the people who label them are shown them."""
    rows, subject, keep = job.training.rows, job.subject, kept(job.given["keep"])
    own = own_columns(subject.dataset, subject.training_split, rows, keep).reset_index(names="row")
    columns = {"class_name": "label", "p_label": "p_label"}
    columns |= {"predicted": "suggested", "p_predicted": "p_suggested"}
    own["text"] = job.training.texts["text"][:]
    return own.join(said[list(columns)].rename(columns=columns))


def doubts(p_label: pd.Series, asked: pd.Series) -> pd.Series:
    """1 − p(label) of each training example, with its log-odds divided by the temperature at which the model
    is as sure of its queries (`asked`, their p(label)) as it is right."""
    odds, of_queries = (np.log(p) - np.log1p(-p.clip(upper=1 - 1e-15)) for p in (p_label, asked))
    temperatures = np.geomspace(0.1, 30, 100)
    losses = [np.logaddexp(0, -of_queries / one).mean() for one in temperatures]
    return 1 / (1 + np.exp(odds / temperatures[np.argmin(losses)]))


def _agreed(said: pd.DataFrame, what: str) -> str:
    return f"{(said['predicted'] == said['class_name']).mean():.1%} of {what}"


def as_text(value: object) -> object:
    """A stranger's text as a spreadsheet leaves it: behind an apostrophe if it would be computed."""
    return f"'{value}" if isinstance(value, str) and re.match(r"[=+\-@\t\r]", value) else value
