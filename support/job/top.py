"""Which training examples matter most, read from the store a column of chunks at a time.

Memory holds the best so far and one block of training examples, however many there are.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from support.job.errors import BadSetting, StepMissing
from support.job.examples import Examples
from support.job.sharding import in_blocks
from support.job.store import Store

EFFECTS = {"helps": 1, "harms": -1}


@dataclass(frozen=True)
class Top:
    """The strongest training examples of a scored store.

    `by_query`: `count` helping and as many harming ones for each query. Columns `query`, `query_row`,
    `effect`, `place`, `training_row`, `score`, `share`, `label`, `text`; `share` is the size of the score
    over the sum of the sizes of all scores of that query. `overall`: the `count` with the largest mean
    share over all queries. Columns `place`, `training_row`, `share`, `helps` (of how many queries),
    `label`, `text`.
    """

    by_query: pd.DataFrame
    overall: pd.DataFrame


def strongest(
    store: Store, training: Examples, queries: Examples, count: int, relative: bool = False
) -> Top:
    """The `count` most helpful and most harmful training examples, for each query and for all.

    `relative` divides each score by √self-influence of the training example, which keeps outliers that
    pull on everything from winning every row. Raises `BadSetting`, and `StepMissing` when scores are
    missing.
    """
    if count < 1:
        raise BadSetting(f"--count {count}: use 1 or more.")
    totals = np.zeros(len(queries))
    best = {effect: _Best(len(queries), count) for effect in EFFECTS}
    for block, scores in _columns(store, relative):
        totals += np.abs(scores).sum(axis=1)
        for effect, sign in EFFECTS.items():
            best[effect].take(sign * scores, block.start)
    overall, helped = _Best(1, count), {}
    safe = np.where(totals > 0, totals, 1)[:, None]
    for block, scores in _columns(store, relative):
        overall.take((np.abs(scores) / safe).mean(axis=0)[None], block.start)
        kept = set(overall.numbers[0].tolist())
        helped = {number: times for number, times in helped.items() if number in kept}
        for number in kept.intersection(block):
            helped[number] = int((scores[:, number - block.start] > 0).sum())
    return Top(
        pd.concat(
            [
                _of_query(query, effect, best[effect], safe[query, 0], training, queries)
                for query in range(len(queries))
                for effect in EFFECTS
            ],
            ignore_index=True,
        ),
        _of_all(overall, helped, training),
    )


class _Best:
    """The largest positive values of each row so far, with their numbers, largest first."""

    def __init__(self, rows: int, count: int):
        self.values = np.zeros((rows, 0))
        self.numbers = np.zeros((rows, 0), dtype=np.int64)
        self.count = count

    def take(self, values: np.ndarray, first: int) -> None:
        """Look through more columns, numbered from `first`."""
        numbers = np.broadcast_to(np.arange(first, first + values.shape[1]), values.shape)
        values = np.concatenate([self.values, np.maximum(values, 0)], axis=1)
        numbers = np.concatenate([self.numbers, numbers], axis=1)
        order = np.argsort(-values, axis=1, kind="stable")[:, : self.count]
        self.values = np.take_along_axis(values, order, axis=1)
        self.numbers = np.take_along_axis(numbers, order, axis=1)


def _columns(store: Store, relative: bool) -> Iterator[tuple[range, np.ndarray]]:
    """Each block of training examples with all its scores, `(queries, block)`."""
    array = store.array("scores")
    queries, training = array.shape
    for block in in_blocks(training, array.chunks[1]):
        columns = slice(block.start, block.stop)
        scores = store.read("scores", (slice(0, queries), columns)).astype(np.float64)
        if np.isnan(scores).any():
            raise StepMissing("Not all scores are there yet. Run: score. It goes on where it was.")
        if relative:
            norms = np.sqrt(store.read("self_influences", (columns,)).astype(np.float64))
            if np.isnan(norms).any():
                raise StepMissing("Not all self-influences are there yet. Run: self")
            scores = np.divide(scores, norms, out=np.zeros_like(scores), where=norms > 0)
        yield block, scores


def _of_query(
    query: int,
    effect: str,
    best: _Best,
    total: float,
    training: Examples,
    queries: Examples,
) -> pd.DataFrame:
    found = best.values[query] > 0
    numbers, sizes = best.numbers[query][found], best.values[query][found]
    return pd.DataFrame(
        {
            "query": query,
            "query_row": queries.rows[query],
            "effect": effect,
            "place": np.arange(1, len(numbers) + 1),
            "training_row": training.rows[numbers],
            "score": EFFECTS[effect] * sizes,
            "share": sizes / total,
            **_said(training, numbers),
        }
    )


def _of_all(best: _Best, helped: dict[int, int], training: Examples) -> pd.DataFrame:
    found = best.values[0] > 0
    numbers = best.numbers[0][found]
    return pd.DataFrame(
        {
            "place": np.arange(1, len(numbers) + 1),
            "training_row": training.rows[numbers],
            "share": best.values[0][found],
            "helps": [helped[number] for number in numbers.tolist()],
            **_said(training, numbers),
        }
    )


def _said(examples: Examples, numbers: np.ndarray) -> dict[str, np.ndarray | list[str]]:
    chosen = examples.texts.select(numbers)
    # Named, because a list of no labels has no type, and would make the others' numbers floats.
    return {"label": np.array(chosen["label"][:], dtype=np.int64), "text": chosen["text"][:]}
