"""What `top` found: as text, as tables, and as one page of HTML that needs nothing else.

Texts are data from strangers: the template escapes all of them; of their markup only line breaks are
kept, as line breaks.
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader

from support.job.examples import Examples
from support.job.store import disk_full_is_told
from support.job.top import Top
from support.text import paragraphs


def page(top: Top, queries: Examples, class_names: Mapping[int, str], facts: Mapping) -> str:
    """The page: facts of the job, the strongest training examples over all queries and for each."""
    environment = Environment(
        loader=PackageLoader("support.job", ""), autoescape=True, trim_blocks=True
    )
    labels = queries.labels.tolist()
    shown = []
    for number in range(len(queries)):
        rows = top.by_query[top.by_query["query"] == number]
        shown.append(
            {
                "number": number,
                "row": queries.rows[number],
                "class_name": _class_name(labels[number], class_names),
                "text": _plain(queries.texts[number]["text"]),
                "largest": rows["share"].max(),
                **{
                    effect: _rows(rows[rows["effect"] == effect], class_names)
                    for effect in ("helps", "harms")
                },
            }
        )
    return environment.get_template("page.html.jinja").render(
        title="Which training examples made the model say that?",
        introduction=(
            "Blue: more weight on this training example would lower the loss on the query. Red: it "
            "would raise it. The share is the size of a score over that of all scores of the query."
        ),
        facts=facts,
        overall=_rows(top.overall, class_names),
        queries=shown,
    )


def _rows(frame: pd.DataFrame, class_names: Mapping[int, str]) -> list[dict]:
    return [
        row | {"text": _plain(row["text"]), "class_name": _class_name(row["label"], class_names)}
        for row in frame.to_dict("records")
    ]


def _class_name(label: int, class_names: Mapping[int, str]) -> str:
    return class_names.get(label, f"label {label}")


def _plain(text: str) -> str:
    return "\n\n".join(paragraphs(text))


def write_top(folder: Path, top: Top, html: str) -> None:
    """`top.parquet`, `top_overall.parquet` and `top.html` in a folder. Raises `DiskFull`."""
    with disk_full_is_told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        top.by_query.to_parquet(folder / "top.parquet")
        top.overall.to_parquet(folder / "top_overall.parquet")
        (folder / "top.html").write_text(html, encoding="utf-8")


def as_text(top: Top) -> str:
    """Tables for a terminal: over all queries, then helpful and harmful ones for each."""
    parts = ["Over all queries:", _aligned(top.overall)]
    for (query, effect), rows in top.by_query.groupby(["query", "effect"], sort=False):
        parts.append(f"\nQuery {query} (row {rows['query_row'].iloc[0]}), {effect}:")
        parts.append(_aligned(rows.drop(columns=["query", "query_row", "effect"])))
    return "\n".join(parts)


def _aligned(frame: pd.DataFrame) -> str:
    """Numbers with the digits that people read, texts in one line."""
    shares = frame["share"].map("{:.2%}".format)
    texts = frame["text"].str.replace(r"\s+", " ", regex=True).str.slice(0, 60)
    frame = frame.assign(share=shares, text=texts)
    if "score" in frame:
        frame["score"] = frame["score"].map("{:+.4g}".format)
    with pd.option_context("display.width", 120, "display.max_colwidth", 60):
        return frame.to_string(index=False)
