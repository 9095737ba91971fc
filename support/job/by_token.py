"""What each training example adds to each token that a query asks about.

The loss of a query is a sum over its targets, so its influence is one, too: a query with one target after
another says what each target takes from each training example.
"""

import numpy as np
import pandas as pd

from support.job.errors import BadSetting
from support.job.sequences import Sequences
from support.job.top import Top
from support.job.work import Job
from support.language import IGNORED


def by_token(job: Job, found: Top) -> pd.DataFrame:
    """For each query, each of its strongest training examples and each target: `score`, which adds up to
    that of the query (but for what a low rank leaves out), and the `token` as `said`.

    The engine has to know the curvature. Raises `BadSetting` for a classifier.
    """
    if not isinstance(job.queries, Sequences):
        raise BadSetting("--by-token: a classifier says no tokens. Leave it out.")
    job.engine.query_rank = job.question.query_rank or None
    tables = [_of_query(job, query, rows) for query, rows in found.by_query.groupby("query")]
    return pd.concat(tables, ignore_index=True)


def _of_query(job: Job, query: int, rows: pd.DataFrame) -> pd.DataFrame:
    engine, device = job.engine, job.engine.passes.device
    numbers = np.searchsorted(job.training.rows, rows["training_row"]).tolist()
    inputs, labels = job.queries.batch([query], device)
    places = (labels[0, 1:] != IGNORED).nonzero()[:, 0] + 1
    alone = labels.new_full((len(places), labels.shape[1]), IGNORED)
    alone[range(len(places)), places] = labels[0, places]
    copies = {name: part.expand(len(places), -1) for name, part in inputs.items()}
    scores = engine.score([(copies, alone)], [job.training.batch(numbers, device)])
    scores = job.training.added_up(scores, numbers).T.numpy(force=True)
    said = job.queries.said(query, places.tolist())
    return pd.DataFrame(
        {
            "query": query,
            "training_row": rows["training_row"].repeat(len(places)).to_numpy(),
            "token": np.tile(places.numpy(force=True), len(rows)),
            "said": said * len(rows),
            "score": scores.flatten(),
        }
    )
