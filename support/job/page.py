"""What `top` found as one page of HTML that needs nothing else.

Texts are data from strangers: the page's template escapes all of them; of their markup only line breaks are
kept, as line breaks. And the page itself forbids whatever isn't its own: it asks no one for anything, and no
script runs but the one whose digest it names. Without that one it lacks search and sort only.
"""

import base64
import hashlib
from collections.abc import Mapping

import pandas as pd
from jinja2 import Environment, PackageLoader

from support.job.top import EFFECTS, SAID, Top, in_short
from support.text import paragraphs

FAINTEST = 0.05
"""Tokens below this share of the strongest are left without a colour."""

Tokens = Mapping[tuple[int, int, str], list[dict]]


def page(found: Mapping[str, Top], facts: Mapping) -> str:
    """The page: facts of the job, the strongest training examples over all queries and for each, by each
    kind of score, plain or relative, the first of which is the one that was asked for."""
    first = next(iter(found.values()))
    tokens = _tokens(first.by_token)
    largest = {name: one.overall["share"].max() for name, one in found.items()}
    overall = {
        name: [_example(row, f"all-{name}", largest[name]) for row in one.overall.to_dict("records")]
        for name, one in found.items()
    }
    queries = [
        {
            **_readable(about),
            "number": number,
            "in_short": in_short(about),
            "lists": {
                (effect, name): _list(one.by_query, number, effect, name, tokens)
                for effect in EFFECTS
                for name, one in found.items()
            },
        }
        for number, about in first.queries.to_dict("index").items()
    ]
    by_column = [] if first.by_column is None else first.by_column[:50].to_dict("records")
    environment = Environment(
        loader=PackageLoader("support.job", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    script, _, _ = environment.loader.get_source(environment, "page.js")
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.jinja").render(
        facts=facts,
        overall=overall,
        queries=queries,
        by_column=by_column,
        by_token=bool(tokens),
        labels=sorted(
            {row["class_name"] for rows in overall.values() for row in rows if "class_name" in row}
        ),
        script=script,
        own=own,
    )


def _list(by_query: pd.DataFrame, query: int, effect: str, name: str, tokens: Tokens) -> list[dict]:
    """What helps a query, or harms it, by one kind of score."""
    of_query = by_query[by_query["query"] == query]
    rows = of_query[of_query["effect"] == effect].to_dict("records")
    examples = [_example(row, f"query-{query}-{name}", of_query["share"].max()) for row in rows]
    for row in examples:
        row["said"] = {
            side: tokens.get((query, row["training_row"], side), []) for side in ("query", "training")
        }
    return examples


def _example(row: Mapping, place: str, largest: float) -> dict:
    """A training example with its anchor, the width of its bar, and the fields that one sorts and saves."""
    fields = {name: value for name, value in row.items() if name not in ("label", "text", "prompt")}
    more = {"anchor": f"{place}-row-{row['training_row']}", "width": 100 * row["share"] / largest}
    return {**_readable(row), **more, "fields": fields}


def _readable(row: Mapping) -> dict:
    """With the paragraphs of its text, and the reader's own columns apart."""
    known = {
        "query",
        "query_row",
        "effect",
        "place",
        "training_row",
        "score",
        "share",
        "helps",
        "label",
        "text",
    }
    own = {name: value for name, value in row.items() if name not in known | {"prompt", *SAID} and value}
    return {**row, "text": "\n\n".join(paragraphs(row["text"])), "own": own}


def _tokens(by_token: pd.DataFrame | None) -> Tokens:
    """By query, training row and side: stretches of text, each with what it adds and how strong its colour
    is, 0 for what adds next to nothing."""
    found: dict[tuple, list[dict]] = {}
    for pair, rows in () if by_token is None else by_token.groupby(["query", "training_row", "side"]):
        largest = rows["score"].abs().max() or 1
        stretches = found.setdefault(pair, [])
        for said, score in zip(rows["said"], rows["score"].tolist(), strict=True):
            weight = abs(score) / largest
            if weight < FAINTEST and stretches and not stretches[-1]["weight"]:
                stretches[-1]["said"] += said
            else:
                stretches.append({"said": said, "score": score, "weight": weight * (weight >= FAINTEST)})
    return found
