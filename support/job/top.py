"""Which training examples matter most, as tables. Scores are read a column of chunks at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from support.ekfac.storage import replacing
from support.job.described import described
from support.job.errors import BadSetting, StepMissing, StoreDamaged
from support.job.examples import Examples
from support.job.store import Store, disk_full_is_told, in_blocks
from support.job.work import Job

EFFECTS = {"helps": 1, "harms": -1}
SAID = ("class_name", "predicted", "p_predicted", "p_label", "nats")
"""Columns of what the model says of an example."""
FORMATS = {
    **dict.fromkeys(("share", "helps share", "harms share"), "{:.2%}".format),
    **dict.fromkeys(("p_label", "nats", "times"), "{:.3g}".format),
    "score": "{:+.4g}".format,
    "prompt": lambda text: " ".join(text.split())[:30],
    "text": lambda text: " ".join(text.split())[:60],
}


@dataclass(frozen=True)
class Top:
    """The strongest training examples of a scored store.

    `by_query`: `count` helping and as many harming ones for each query; `share` is the size of the score
    over the sum of the sizes of all scores of that query. `overall`: the `count` with the largest mean
    share over all queries; `helps` says how many of them. `queries`: these, a row each. If wanted,
    `by_column`: influence by the values of a column, `by_token`: what each adds to each token.
    """

    by_query: pd.DataFrame
    overall: pd.DataFrame
    queries: pd.DataFrame
    by_column: pd.DataFrame | None = None
    by_token: pd.DataFrame | None = None

    def __str__(self) -> str:
        """Tables for a terminal: over all queries, then helpful and harmful ones for each."""
        parts = ["Over all queries:", _readable(self.overall)]
        if self.by_column is not None:
            by_value = self.by_column.drop(columns="column")[:20]
            parts += [f"\nBy {self.by_column['column'][0]}:", _readable(by_value)]
        about = self.queries.to_dict("index")
        for (query, effect), rows in self.by_query.groupby(["query", "effect"], sort=False):
            parts.append(f"\nQuery {query} ({in_short(about[query])}), {effect}:{_asked(about[query])}")
            parts.append(_readable(rows.drop(columns=["query", "query_row", "effect"])))
        return "\n".join(parts)

    def write(self, folder: Path, html: str) -> None:
        """`top.parquet`, `top_overall.parquet`, `top_queries.parquet`, `top.html`, and what else is wanted,
        each whole or not at all. Raises `DiskFull`."""
        tables = {
            "top": self.by_query,
            # One table of the examples and one of what is said of each: here is the first alone.
            "top_overall": self.overall.drop(columns=list(SAID), errors="ignore"),
            "top_queries": self.queries,
            "top_by": self.by_column,
            "top_tokens": self.by_token,
        }
        there = {name: table for name, table in tables.items() if table is not None}
        writers = {f"{name}.parquet": table.to_parquet for name, table in there.items()}
        writers["top.html"] = lambda path: path.write_text(html, encoding="utf-8")
        for name, write in writers.items():
            with disk_full_is_told(folder), replacing(folder / name) as fresh:
                write(fresh)


def in_short(query: Mapping) -> str:
    """A query in a few words: its row, its class, and what the model says of it."""
    row = f"row {query['query_row']}"
    if "predicted" in query:
        said = f"{query['predicted']} {query['p_predicted']:.0%}"
        return f"{row}, labelled {query['class_name']}, predicted {said}"
    return f"{row}, {query['nats']:.3g} nats a token" if "nats" in query else row


def _asked(query: Mapping) -> str:
    """Prompt and completion in short; nothing of a text that has a label."""
    if "prompt" not in query:
        return ""
    parts = " ".join(query["prompt"].split())[-40:], " ".join(query["text"].split())[:60]
    return " " + " → ".join(part for part in parts if part)


def _readable(rows: pd.DataFrame) -> str:
    """A table for a terminal; classes by their names."""
    if "class_name" in rows:
        rows = rows.drop(columns=["label", "p_predicted"]).rename(columns={"class_name": "label"})
        rows = rows[[*(name for name in rows if name != "text"), "text"]]
    return rows.to_string(index=False, formatters=FORMATS)


def strongest(store: Store, training: Examples, queries: Examples, count: int, relative: bool = False) -> Top:
    """The `count` most helpful and most harmful training examples, for each query and for all.

    `relative` divides each score by √self-influence of the training example, which keeps outliers that
    pull on everything from winning every row. Raises `StepMissing` when scores are missing, `StoreDamaged`.
    """
    shape, expected = store.array("scores").shape, (len(queries), len(training))
    if shape != expected:
        told = f"The scores are said to be {shape}, but queries and training examples are {expected}"
        raise StoreDamaged(f"{told}. Run: score")
    totals = np.zeros(len(queries))
    best = {effect: (np.zeros((len(queries), 0)), np.zeros((len(queries), 0), int)) for effect in EFFECTS}
    for block, scores in columns_of(store, relative):
        totals += np.abs(scores).sum(axis=1)
        for effect, sign in EFFECTS.items():
            best[effect] = _largest(best[effect], sign * scores, block, count)
    totals = np.where(totals > 0, totals, 1)
    shares, helps = np.zeros(len(training)), np.zeros(len(training), int)
    for block, scores in columns_of(store, relative):
        shares[block] = (np.abs(scores) / totals[:, None]).mean(axis=0)
        helps[block] = (scores > 0).sum(axis=0)
    tables: list[pd.DataFrame] = []
    for query, row in enumerate(queries.rows):
        for effect, (sizes, numbers) in best.items():
            sizes, numbers = sizes[query][sizes[query] > 0], numbers[query][sizes[query] > 0]
            about = {"query": query, "query_row": row, "effect": effect}
            scored = {"score": EFFECTS[effect] * sizes, "share": sizes / totals[query]}
            tables.append(_table(training, numbers, about, scored))
    numbers = np.argsort(-shares, kind="stable")[:count]
    numbers = numbers[shares[numbers] > 0]
    overall = _table(training, numbers, {}, {"share": shares[numbers], "helps": helps[numbers]})
    asked = pd.DataFrame({"query_row": queries.rows, **queries.described(range(len(queries)))})
    return Top(pd.concat(tables, ignore_index=True), overall, asked)


def _largest(
    before: tuple[np.ndarray, np.ndarray], values: np.ndarray, columns: range, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The largest positive values of each row, and their columns: of those before and of some more."""
    values = np.concatenate([before[0], np.maximum(values, 0)], axis=1)
    numbers = np.concatenate([before[1], np.tile(columns, (len(values), 1))], axis=1)
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(numbers, order, axis=1)


def has_all(store: Store, name: str) -> bool:
    """Whether all of an array is there."""
    try:
        return store.has(name, tuple(map(range, store.array(name).shape)))
    except StepMissing:
        return False


def columns_of(store: Store, relative: bool) -> Iterator[tuple[range, np.ndarray]]:
    """Each block of training examples with all its scores, `(queries, block)`."""
    array = store.array("scores")
    for block in in_blocks(array.shape[1], array.chunks[1]):
        scores = store.read("scores", (range(array.shape[0]), block)).astype(np.float64)
        if relative:
            norms = np.sqrt(store.read("self_influences", (block,)).astype(np.float64))
            scores = np.divide(scores, norms, out=np.zeros_like(scores), where=norms > 0)
        yield block, scores


def _table(training: Examples, numbers: np.ndarray, about: Mapping, scored: Mapping) -> pd.DataFrame:
    places = {"place": np.arange(1, len(numbers) + 1), "training_row": training.rows[numbers]}
    return pd.DataFrame({**about, **places, **scored, **training.described(numbers.tolist())})


def with_descriptions(job: Job, found: Mapping[str, Top], columns: Sequence[str]) -> dict[str, Top]:
    """The same, with what the model says of each example, and these columns of the reader's own. Raises
    `BadSetting` for one whose name the tables have already, and `DatasetNotUsable`."""
    for column in columns:
        if any(column in table for one in found.values() for table in (one.by_query, one.overall)):
            told = "the tables have a column of this name already"
            raise BadSetting(f"--keep {column}: {told}. Leave it out, or rename yours.")
    named = [table["training_row"] for one in found.values() for table in (one.by_query, one.overall)]
    rows = pd.concat(named).unique()
    training = described(job, job.training, rows, columns)
    queries = described(job, job.queries, job.queries.rows, columns)
    return {
        name: replace(
            one,
            by_query=one.by_query.join(training, on="training_row"),
            overall=one.overall.join(training, on="training_row"),
            queries=one.queries.join(queries, on="query_row"),
        )
        for name, one in found.items()
    }


def by_column(store: Store, name: str, values: Sequence[str], relative: bool = False) -> pd.DataFrame:
    """Influence by the values that a column has in the training examples, the loudest value first: how many
    `examples` have it; the shares of the influence on a query, a mean over queries, of those that help and
    those that harm; their sum; and how many `times` more that is than if all examples were alike."""
    codes, names = pd.factorize(np.asarray(values, dtype=object))
    sums = np.zeros((len(EFFECTS), len(names), store.array("scores").shape[0]))
    for block, scores in columns_of(store, relative):
        for number, sign in enumerate(EFFECTS.values()):
            np.add.at(sums[number], codes[block], np.maximum(sign * scores, 0).T)
    total, examples = sums.sum(axis=(0, 1)), np.bincount(codes)
    helps, harms = (sums / np.where(total > 0, total, 1)).mean(axis=2)
    share = helps + harms
    shares = {"helps share": helps, "harms share": harms, "share": share}
    about = {"column": name, "value": names, "examples": examples}
    found = pd.DataFrame(about | shares | {"times": share * len(values) / examples})
    return found.sort_values("share", ascending=False, kind="stable", ignore_index=True)
