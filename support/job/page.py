"""What `top` found as one page of HTML that needs nothing else.

Texts are data from strangers: the page's template escapes all of them; of their markup only line breaks are
kept, as line breaks. And the page itself forbids whatever isn't its own: it asks no one for anything, and no
script runs but the one whose digest it names. Without that one it lacks search, sort and csv only.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader

from support.job.top import EFFECTS, Top, in_short
from support.text import paragraphs

FAINTEST = 0.05
"""Tokens below this share of the strongest are left without a colour."""
NO_FIELD = {"query_row", "label", "text", "prompt"}
"""What a row is not sorted or saved by."""


def page(found: Mapping[str, Top], keep: Sequence[str], facts: Mapping) -> str:
    """The page: facts of the job, the strongest training examples over all queries and for each, by each
    kind of score, plain or relative, the first of which is the one that was asked for, with the reader's own
    columns that are to be kept."""
    first = next(iter(found.values()))
    tokens = () if first.by_token is None else first.by_token.groupby(["query", "training_row", "side"])
    overall = {name: one.overall.to_dict("records") for name, one in found.items()}
    environment = Environment(
        loader=PackageLoader("support.job", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.filters |= {
        "paragraphs": lambda text: "\n\n".join(paragraphs(text)),
        "fields": lambda row: {name: value for name, value in row.items() if name not in NO_FIELD},
        "in_short": in_short,
    }
    script, *_ = environment.loader.get_source(environment, "page.js")
    return environment.get_template("page.html.jinja").render(
        facts=facts,
        keep=keep,
        overall=overall,
        labels=sorted(
            {row["class_name"] for rows in overall.values() for row in rows if "class_name" in row}
        ),
        by_column=[] if first.by_column is None else first.by_column[:50].to_dict("records"),
        queries=first.queries.to_dict("index"),
        effects=EFFECTS,
        lists={
            (name, *which): rows.to_dict("records")
            for name, one in found.items()
            for which, rows in one.by_query.groupby(["query", "effect"])
        },
        tokens={which: rows.to_dict("records") for which, rows in tokens},
        faintest=FAINTEST,
        script=script,
        own=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
