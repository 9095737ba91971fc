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
    said = said_of(job, examples, np.searchsorted(examples.rows, rows)).set_index(pd.Index(rows))
    name, split = job.subject.dataset, job.subject.training_split
    if examples is job.queries:
        name, split = job.question.queries or name, job.question.query_split
        columns = [one for one in columns if one in load_split(name, split).column_names]
    return said.join(own_columns(name, split, examples.rows, columns))


@torch.no_grad()
def said_of(job: Job, examples: Examples, numbers: np.ndarray) -> pd.DataFrame:
    """What the model says of these examples, in their order."""
    order, device = np.argsort(examples.lengths[numbers], kind="stable"), job.engine.passes.device
    parts = [numbers[order[block.start : block.stop]] for block in in_blocks(len(order), TOGETHER)]
    said = [pd.DataFrame(job.task.said(examples, part.tolist(), device)) for part in parts]
    return pd.concat(said).set_index(order).sort_index()


def own_columns(name: str, split: str, rows: np.ndarray, columns: Sequence[str]) -> pd.DataFrame:
    """A reader's own columns of a split, as text, by row number. Raises `DatasetNotUsable`."""
    if not columns:
        return pd.DataFrame(index=rows)
    found = load_split(name, split)
    chosen = with_columns(found, {one: one for one in columns}, name, "See --keep and --by").select(rows)
    return pd.DataFrame({column: _as_text(chosen, column) for column in columns}, index=rows)


def _as_text(found: Dataset, column: str) -> list[str]:
    kind, values = found.features[column], found[column][:]
    if isinstance(kind, ClassLabel):
        values = [value if value is None or value < 0 else kind.names[value] for value in values]
    return ["" if value is None else str(value) for value in values]
