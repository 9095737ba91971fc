"""Which training examples matter most: as tables, as text, and as one page of HTML that needs nothing
else. Scores are read a column of chunks at a time: memory holds one block of training examples, and two
numbers for each.

Texts are data from strangers: the page's template escapes all of them; of their markup only line breaks
are kept, as line breaks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader

from support.ekfac.storage import replacing
from support.job.errors import StepMissing
from support.job.examples import Examples, in_blocks
from support.job.store import Store, disk_full_is_told
from support.text import paragraphs

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

    def __str__(self) -> str:
        """Tables for a terminal: over all queries, then helpful and harmful ones for each."""
        parts = ["Over all queries:", _aligned(self.overall)]
        for (query, effect), rows in self.by_query.groupby(["query", "effect"], sort=False):
            parts.append(f"\nQuery {query} (row {rows['query_row'].iloc[0]}), {effect}:")
            parts.append(_aligned(rows.drop(columns=["query", "query_row", "effect"])))
        return "\n".join(parts)

    def write(self, folder: Path, html: str) -> None:
        """`top.parquet`, `top_overall.parquet` and `top.html` in a folder, each whole or not at all.

        Raises `DiskFull`.
        """
        writers = {
            "top.parquet": self.by_query.to_parquet,
            "top_overall.parquet": self.overall.to_parquet,
            "top.html": lambda path: path.write_text(html, encoding="utf-8"),
        }
        for name, write in writers.items():
            with disk_full_is_told(folder), replacing(folder / name) as fresh:
                write(fresh)


def strongest(store: Store, training: Examples, queries: Examples, count: int, relative: bool = False) -> Top:
    """The `count` most helpful and most harmful training examples, for each query and for all.

    `relative` divides each score by √self-influence of the training example, which keeps outliers that
    pull on everything from winning every row. Raises `StepMissing` when scores are missing.
    """
    totals = np.zeros(len(queries))
    best = {effect: _Best(len(queries), count) for effect in EFFECTS}
    for block, scores in _columns(store, relative):
        totals += np.abs(scores).sum(axis=1)
        for effect, sign in EFFECTS.items():
            best[effect].take(sign * scores, block.start)
    totals = np.where(totals > 0, totals, 1)
    shares, helps = np.zeros(len(training)), np.zeros(len(training), dtype=np.int64)
    for block, scores in _columns(store, relative):
        shares[block] = (np.abs(scores) / totals[:, None]).mean(axis=0)
        helps[block] = (scores > 0).sum(axis=0)
    tables = []
    for query, row in enumerate(queries.rows):
        for effect, sign in EFFECTS.items():
            numbers, sizes = best[effect].found(query)
            about = {"query": query, "query_row": row, "effect": effect}
            scored = {"score": sign * sizes, "share": sizes / totals[query]}
            tables.append(_table(training, numbers, about, scored))
    numbers = np.argsort(-shares, kind="stable")[:count]
    numbers = numbers[shares[numbers] > 0]
    overall = _table(training, numbers, {}, {"share": shares[numbers], "helps": helps[numbers]})
    return Top(pd.concat(tables, ignore_index=True), overall)


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

    def found(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and values of a row."""
        positive = self.values[row] > 0
        return self.numbers[row][positive], self.values[row][positive]


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


def _table(training: Examples, numbers: np.ndarray, about: Mapping, scored: Mapping) -> pd.DataFrame:
    chosen = training.texts.select(numbers)
    return pd.DataFrame(
        {
            **about,
            "place": np.arange(1, len(numbers) + 1),
            "training_row": training.rows[numbers],
            **scored,
            # A list of no labels has no type, and would make the others' numbers floats.
            "label": np.array(chosen["label"][:], dtype=np.int64),
            "text": chosen["text"][:],
        }
    )


def _aligned(frame: pd.DataFrame) -> str:
    """Numbers with the digits that people read, texts in one line."""
    shares = frame["share"].map("{:.2%}".format)
    texts = frame["text"].str.replace(r"\s+", " ", regex=True).str.slice(0, 60)
    frame = frame.assign(share=shares, text=texts)
    if "score" in frame:
        frame["score"] = frame["score"].map("{:+.4g}".format)
    with pd.option_context("display.width", 120, "display.max_colwidth", 60):
        return frame.to_string(index=False)


def page(top: Top, queries: Examples, class_names: Mapping[int, str], facts: Mapping) -> str:
    """The page: facts of the job, the strongest training examples over all queries and for each."""

    def readable(row: dict) -> dict:
        class_name = class_names.get(row["label"], f"label {row['label']}")
        return row | {"text": "\n\n".join(paragraphs(row["text"])), "class_name": class_name}

    shown = []
    for number, row in enumerate(queries.rows):
        rows = top.by_query[top.by_query["query"] == number]
        query = {"number": number, "row": row, "largest": rows["share"].max()}
        for effect, found in rows.groupby("effect"):
            query[effect] = [readable(one) for one in found.to_dict("records")]
        shown.append(readable(query | queries.texts[number]))
    overall = [readable(row) for row in top.overall.to_dict("records")]
    loader = PackageLoader("support.job", "")
    template = Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("page.html.jinja")
    return template.render(facts=facts, overall=overall, queries=shown)
