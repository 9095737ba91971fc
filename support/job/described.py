"""What a reader is told of examples beside their texts: what the model says of them, their own columns."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from datasets import ClassLabel, Dataset

from support.job.examples import Examples
from support.job.sources import load_split, with_columns
from support.job.store import in_blocks
from support.job.work import Job

TOGETHER = 16
"""Examples of about one length that the model is shown at a time."""


def described(job: Job, examples: Examples, rows: Sequence[int], columns: Sequence[str]) -> pd.DataFrame:
    """Of the examples with these row numbers, which are the index: what `Task.said` tells, and these columns
    of their own. Queries may lack some. Raises `DatasetNotUsable` for a column that isn't there."""
    numbers = np.searchsorted(examples.rows, rows)
    said = said_of(job, examples, numbers).set_index(pd.Index(rows))
    return pd.concat([said, own_columns(job, examples, columns).loc[rows]], axis=1)


@torch.no_grad()
def said_of(job: Job, examples: Examples, numbers: np.ndarray) -> pd.DataFrame:
    """What the model says of these examples, in their order."""
    order, device = np.argsort(examples.lengths[numbers], kind="stable"), job.engine.passes.device
    parts = [numbers[order[block.start : block.stop]] for block in in_blocks(len(order), TOGETHER)]
    said = [pd.DataFrame(job.task.said(examples, part.tolist(), device)) for part in parts]
    return pd.concat(said).set_index(order).sort_index()


def own_columns(job: Job, examples: Examples, columns: Sequence[str]) -> pd.DataFrame:
    """The reader's own columns, as text, by row number. Raises `DatasetNotUsable`."""
    asked, question = examples is job.queries, job.question
    name = (asked and question.queries) or job.subject.dataset
    found = load_split(name, question.query_split if asked else job.subject.training_split)
    wanted = [column for column in columns if not asked or column in found.column_names]
    if not wanted:
        return pd.DataFrame(index=examples.rows)
    chosen = with_columns(found, {one: one for one in wanted}, name, "See --keep and --by").select(
        examples.rows
    )
    return pd.DataFrame({column: _as_text(chosen, column) for column in wanted}, index=examples.rows)


def _as_text(found: Dataset, column: str) -> list[str]:
    kind, values = found.features[column], found[column][:]
    if isinstance(kind, ClassLabel):
        values = [value if value is None or value < 0 else kind.names[value] for value in values]
    return ["" if value is None else str(value) for value in values]
