"""Which training examples matter most: as tables, as text, and as one page of HTML that needs nothing else.

Scores are read a column of chunks at a time. Texts are data from strangers: the page's template escapes all
of them; of their markup only line breaks are kept, as line breaks.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader

from support.ekfac.storage import replacing
from support.job.errors import BadSetting, StoreDamaged
from support.job.examples import NOT, Examples, Sequences
from support.job.store import Store, disk_full_is_told, in_blocks
from support.job.work import Job
from support.language import IGNORED, inputs_and_labels, one_token_each
from support.text import paragraphs

EFFECTS = {"helps": 1, "harms": -1}
FORMATS = {
    "share": "{:.2%}".format,
    "score": "{:+.4g}".format,
    "prompt": lambda text: " ".join(text.split())[:30],
    "text": lambda text: " ".join(text.split())[:60],
}


@dataclass(frozen=True)
class Top:
    """The strongest training examples of a scored store.

    `by_query`: `count` helping and as many harming ones for each query; `share` is the size of the score
    over the sum of the sizes of all scores of that query. `overall`: the `count` with the largest mean
    share over all queries; `helps` says how many of them. `asked`: what each query asks a model that writes.
    `by_token`, if wanted: what each adds to each token.
    """

    by_query: pd.DataFrame
    overall: pd.DataFrame
    asked: Sequence[str] = ()
    by_token: pd.DataFrame | None = None

    def __str__(self) -> str:
        """Tables for a terminal: over all queries, then helpful and harmful ones for each."""
        parts = ["Over all queries:", self.overall.to_string(index=False, formatters=FORMATS)]
        for (query, effect), rows in self.by_query.groupby(["query", "effect"], sort=False):
            asked = f" {self.asked[query]}" if self.asked else ""
            parts.append(f"\nQuery {query} (row {rows['query_row'].iloc[0]}), {effect}:{asked}")
            rows = rows.drop(columns=["query", "query_row", "effect"])
            parts.append(rows.to_string(index=False, formatters=FORMATS))
        return "\n".join(parts)

    def write(self, folder: Path, html: str) -> None:
        """`top.parquet`, `top_overall.parquet`, `top.html`, each whole or not at all. Raises `DiskFull`."""
        writers = {
            "top.parquet": self.by_query.to_parquet,
            "top_overall.parquet": self.overall.to_parquet,
            "top.html": lambda path: path.write_text(html, encoding="utf-8"),
        }
        if self.by_token is not None:
            writers["top_tokens.parquet"] = self.by_token.to_parquet
        for name, write in writers.items():
            with disk_full_is_told(folder), replacing(folder / name) as fresh:
                write(fresh)


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
    for block, scores in _columns(store, relative):
        totals += np.abs(scores).sum(axis=1)
        for effect, sign in EFFECTS.items():
            best[effect] = _largest(best[effect], sign * scores, block, count)
    totals = np.where(totals > 0, totals, 1)
    shares, helps = np.zeros(len(training)), np.zeros(len(training), int)
    for block, scores in _columns(store, relative):
        shares[block] = (np.abs(scores) / totals[:, None]).mean(axis=0)
        helps[block] = (scores > 0).sum(axis=0)
    tables = []
    for query, row in enumerate(queries.rows):
        for effect, (sizes, numbers) in best.items():
            sizes, numbers = sizes[query][sizes[query] > 0], numbers[query][sizes[query] > 0]
            about = {"query": query, "query_row": row, "effect": effect}
            scored = {"score": EFFECTS[effect] * sizes, "share": sizes / totals[query]}
            tables.append(_table(training, numbers, about, scored))
    numbers = np.argsort(-shares, kind="stable")[:count]
    numbers = numbers[shares[numbers] > 0]
    overall = _table(training, numbers, {}, {"share": shares[numbers], "helps": helps[numbers]})
    return Top(pd.concat(tables, ignore_index=True), overall, _asked(queries))


def _asked(queries: Examples) -> list[str]:
    """Prompt and completion of each query in short; none of texts that have labels."""
    about = queries.described(range(len(queries)))
    both = zip(about.get("prompt", []), about["text"], strict=False)
    shown = ((" ".join(prompt.split())[-40:], " ".join(text.split())[:60]) for prompt, text in both)
    return [" → ".join(part for part in parts if part) for parts in shown]


def _largest(
    before: tuple[np.ndarray, np.ndarray], values: np.ndarray, columns: range, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The largest positive values of each row, and their columns: of those before and of some more."""
    values = np.concatenate([before[0], np.maximum(values, 0)], axis=1)
    numbers = np.concatenate([before[1], np.tile(columns, (len(values), 1))], axis=1)
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(numbers, order, axis=1)


def _columns(store: Store, relative: bool) -> Iterator[tuple[range, np.ndarray]]:
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


def page(top: Top, queries: Examples, class_names: Mapping[str, int], facts: Mapping) -> str:
    """The page: facts of the job, the strongest training examples over all queries and for each."""
    names = {number: name for name, number in class_names.items()}

    def readable(row: Mapping) -> dict:
        own = {"text": "\n\n".join(paragraphs(row["text"])), "class_name": ""}
        if "label" in row:
            own["class_name"] = ", " + names.get(row["label"], f"label {row['label']}")
        return {**row, **own}

    said = () if top.by_token is None else top.by_token.groupby(["query", "training_row"])
    tokens = {place: rows.to_dict("records") for place, rows in said}
    shown = []
    for number, row in enumerate(queries.rows):
        rows = top.by_query[top.by_query["query"] == number]
        query = {"number": number, "row": row, "largest": rows["share"].max()}
        for effect, found in rows.groupby("effect"):
            found = found.to_dict("records")
            query[effect] = [
                readable(one | {"said": tokens.get((number, one["training_row"]))}) for one in found
            ]
        about = {name: column[0] for name, column in queries.described([number]).items()}
        shown.append(readable(query | about))
    overall = [readable(row) for row in top.overall.to_dict("records")]
    loader = PackageLoader("support.job", "")
    template = Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("page.html.jinja")
    return template.render(facts=facts, overall=overall, queries=shown, by_token=bool(tokens))


def by_token(job: Job, found: Top) -> pd.DataFrame:
    """For each query, each of its strongest training examples and each target: `score`, which adds up to
    that of the query (but for what a low rank leaves out), and the `token` as `said`.

    The engine has to know the curvature. Raises `BadSetting` for a classifier.
    """
    if not isinstance(job.queries, Sequences):
        raise BadSetting("--by-token: a classifier says no tokens. Leave it out.")
    job.engine.query_rank = job.question.query_rank or None
    tables = [_tokens_of(job, query, rows) for query, rows in found.by_query.groupby("query")]
    return pd.concat(tables, ignore_index=True)


def _tokens_of(job: Job, query: int, rows: pd.DataFrame) -> pd.DataFrame:
    """The loss of a query is a sum over its targets, so its influence is one, too."""
    device = job.engine.passes.device
    numbers = np.searchsorted(job.training.rows, rows["training_row"]).tolist()
    inputs, labels = job.queries.batch([query], device)
    tables = []
    for side, (_, ids, _, sign) in enumerate(job.queries.pieces([query])):  # its own, and a contrast's
        own = {name: part[side : side + 1] for name, part in {**inputs, "labels": labels}.items()}
        places = (own["labels"][0, 1:] != IGNORED).nonzero()[:, 0] + 1
        one_each = inputs_and_labels(one_token_each(own))
        scores = sign * job.engine.score([one_each], [job.training.batch(numbers, device)])
        scores = job.training.added_up(scores, numbers).T.numpy(force=True)
        said = job.queries.said(ids, places.tolist())
        said[0] = f"{NOT if sign < 0 else ''}{said[0]}"
        about = {
            "query": query,
            "training_row": rows["training_row"].repeat(len(places)).to_numpy(),
            "token": np.tile(places.numpy(force=True), len(rows)),
            "said": said * len(rows),
        }
        tables.append(pd.DataFrame(about | {"score": scores.flatten()}))
    return pd.concat(tables)
