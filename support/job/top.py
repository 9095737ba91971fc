"""Which training examples matter most, as tables. Scores are read a column of chunks at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import ClassLabel
from tqdm.auto import tqdm

from support.ekfac.storage import replacing
from support.job.errors import BadSetting, StoreDamaged
from support.job.examples import Examples
from support.job.sources import load_split, with_columns
from support.job.store import Store, disk_full_is_told, in_blocks
from support.job.team import device
from support.job.work import Job

TOGETHER = 16
"""Examples of about one length that the model is shown at a time."""
EFFECTS = {"helps": 1, "harms": -1}
SAID = ("class_name", "predicted", "p_predicted", "p_label", "nats")
"""Columns of what the model says of an example."""
OWN = {*SAID, "query", "query_row", "effect", "place", "training_row", "score", "share", "helps", "prompt"}
OWN |= {"row", "text", "label", "suggested", "p_suggested"}
"""Names that a column of a reader's would share with one of ours."""
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
    share over all queries; `helps` says how many of them. `queries`: these, a row each. `shares`: the mean
    of each training example's shares in queries that it helps, and in those that it harms, over all queries.
    If wanted, `by_column`: influence by the values of a column, `by_token`: what each adds to each token.
    """

    by_query: pd.DataFrame
    overall: pd.DataFrame
    queries: pd.DataFrame
    shares: pd.DataFrame
    by_column: pd.DataFrame | None = None
    by_token: pd.DataFrame | None = None

    def __str__(self) -> str:
        """Tables for a terminal: over all queries, if there are several, then helpful and harmful ones for
        each."""
        parts = ["Over all queries:", readable(self.overall)] if len(self.queries) > 1 else []
        if self.by_column is not None:
            by_value = self.by_column.drop(columns="column")[:20]
            parts += [f"\nBy {self.by_column['column'][0]}:", readable(by_value)]
        about = self.queries.to_dict("index")
        for (query, effect), rows in self.by_query.groupby(["query", "effect"], sort=False):
            parts.append(f"\nQuery {query} ({in_short(about[query])}), {effect}:{_asked(about[query])}")
            parts.append(readable(rows.drop(columns=["query", "query_row", "effect"])))
        return "\n".join(parts).lstrip("\n")

    def write(self, folder: Path, html: str) -> None:
        """`top.parquet`, `top_overall.parquet`, `top_queries.parquet`, `top.html`, and what else is wanted,
        each whole or not at all. Raises `DiskFull`."""
        tables = {
            "top": self.by_query,
            # 08 shows this one whole; what the model says stands in the others.
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


def kept(listed: str) -> list[str]:
    """The columns that `--keep` lists. Raises `BadSetting` for one whose name the tables have already."""
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if taken := OWN.intersection(names):
        told = "the tables have a column of this name already"
        raise BadSetting(f"--keep {taken.pop()}: {told}. Leave it out, or rename yours.")
    return names


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


def readable(rows: pd.DataFrame) -> str:
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
    parts, helps = {effect: np.zeros(len(training)) for effect in EFFECTS}, np.zeros(len(training), int)
    for block, scores in columns_of(store, relative):
        for effect, sign in EFFECTS.items():
            parts[effect][block] = (np.maximum(sign * scores, 0) / totals[:, None]).mean(axis=0)
        helps[block] = (scores > 0).sum(axis=0)
    shares = parts["helps"] + parts["harms"]
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
    return Top(pd.concat(tables, ignore_index=True), overall, asked, pd.DataFrame(parts).add_suffix(" share"))


def _largest(
    before: tuple[np.ndarray, np.ndarray], values: np.ndarray, columns: range, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The largest positive values of each row, and their columns: of those before and of some more."""
    values = np.concatenate([before[0], np.maximum(values, 0)], axis=1)
    numbers = np.concatenate([before[1], np.tile(columns, (len(values), 1))], axis=1)
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(numbers, order, axis=1)


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
    `DatasetNotUsable` for one that isn't there."""
    tables = [table for one in found.values() for table in (one.by_query, one.overall)]
    rows = pd.concat([table["training_row"] for table in tables]).unique()
    training = described(job, job.training, rows, columns)
    queries = described(job, job.queries, job.queries.rows, columns)
    return {
        name: Top(
            one.by_query.join(training, on="training_row"),
            one.overall.join(training, on="training_row"),
            one.queries.join(queries, on="query_row"),
            one.shares,
        )
        for name, one in found.items()
    }


def described(job: Job, examples: Examples, rows: np.ndarray, columns: Sequence[str]) -> pd.DataFrame:
    """Of the examples with these row numbers, which are the index: what `Task.said` tells, and these columns
    of their own. Queries may lack some. Raises `DatasetNotUsable` for a column that isn't there."""
    name, split = job.subject.dataset, job.subject.training_split
    if examples is job.queries:
        name, split = job.question.queries or name, job.question.query_split
        columns = [one for one in columns if one in load_split(name, split).column_names]
    said = said_of(job, examples, np.searchsorted(examples.rows, rows)).set_index(pd.Index(rows))
    return said.join(own_columns(name, split, examples.rows, columns))


@torch.no_grad()
def said_of(job: Job, examples: Examples, numbers: np.ndarray) -> pd.DataFrame:
    """What the model says of these examples, in their order."""
    order = np.argsort(examples.lengths[numbers], kind="stable")
    blocks = tqdm(in_blocks(len(order), TOGETHER), "predictions", unit="block", disable=None, leave=False)
    parts = (numbers[order[block.start : block.stop]].tolist() for block in blocks)
    said = [pd.DataFrame(job.task.said(examples, part, device())) for part in parts]
    return pd.concat(said).set_index(order).sort_index()


def own_columns(name: str, split: str, rows: np.ndarray, columns: Sequence[str]) -> pd.DataFrame:
    """A reader's own columns of a split, as text, by row number. Raises `DatasetNotUsable`."""
    table = pd.DataFrame(index=rows)
    if columns:
        found = with_columns(load_split(name, split), {one: one for one in columns}, name, "See --keep, --by")
    for column in columns:
        values, kind = found.select(rows)[column][:], found.features[column]
        names = kind.names if isinstance(kind, ClassLabel) else []
        values = [names[one] if names and one is not None and one >= 0 else one for one in values]
        table[column] = ["" if one is None else str(one) for one in values]
    return table


def by_column(shares: pd.DataFrame, name: str, values: Sequence[str]) -> pd.DataFrame:
    """`Top.shares` added up by the values that a column has in the training examples, the loudest first: how
    many `examples` have one, what of them helps and harms, both together as `share`, and how many `times`
    more that is than if all examples were alike."""
    table = shares.assign(value=values, examples=1).groupby("value", sort=False).sum().reset_index()
    table["share"] = table["helps share"] + table["harms share"]
    table["times"] = table["share"] / table["examples"] * len(shares)
    table.insert(0, "column", name)
    return table.sort_values("share", ascending=False, kind="stable", ignore_index=True)
