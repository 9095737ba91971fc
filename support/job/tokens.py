"""Influences spread over tokens: those that a query asks about, and those that a training text is made of."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from support.job.examples import NOT, Sequences
from support.job.work import Job
from support.language import IGNORED, inputs_and_labels, one_token_each

CONTEXT = 8
"""Tokens before one with which it is read: enough for a space or a character that two of them share."""


def by_token(job: Job, pairs: pd.DataFrame) -> pd.DataFrame:
    """For each pair of a `query` and a `training_row`: what each `token`, by its place, adds, as `score`, and
    how it is `said`. The `side` is training, where a token's part is what flows through its position, and for
    a model that writes also query, where it is that of the token's loss. Each side adds up to the score of
    the pair, but for what a low rank leaves out. The engine has to know the curvature.
    """
    job.engine.query_rank = job.question.query_rank or None
    sides = {"query": _of_query, "training": _of_training}
    if not isinstance(job.queries, Sequences):
        del sides["query"]
    found: list[tuple] = []
    for query, rows in pairs.groupby("query")["training_row"]:
        numbers = np.searchsorted(job.training.rows, rows).tolist()
        for side, tokens in sides.items():
            for row, own in zip(rows, tokens(job, query, numbers), strict=True):
                found += [(query, row, side, *one) for one in own]
    return pd.DataFrame(found, columns=["query", "training_row", "side", "token", "said", "score"])


def _of_training(job: Job, query: int, numbers: list[int]) -> Iterator[Iterator[tuple[int, str, float]]]:
    """Place, text and score of each token, by training example."""
    training, device = job.training, job.engine.passes.device
    asked = job.queries.batch([query], device)
    found = job.engine.token_influences(*asked, *training.batch(numbers, device))
    weights = job.queries.weights([query])
    found = found[0] if weights is None else torch.tensordot(weights[0].to(found), found, 1)
    ids = training.tokens[numbers]["input_ids"]
    for own, scores in zip(ids, training.of_tokens(found.numpy(force=True), numbers), strict=True):
        yield zip(range(len(own)), said(job.task.tokenizer, own), scores.tolist(), strict=True)


def _of_query(job: Job, query: int, numbers: list[int]) -> Iterator[Iterator[tuple[int, str, float]]]:
    """The same of the query, and of its contrast. Its loss is a sum over its targets, so its influence is
    one, too."""
    device = job.engine.passes.device
    inputs, labels = job.queries.batch([query], device)
    places, words, scores = [], [], []
    for piece, (*_, ids, _, sign) in enumerate(job.queries.pieces([query])):
        own = {name: part[piece : piece + 1] for name, part in (inputs | {"labels": labels}).items()}
        asked = ((own["labels"][0, 1:] != IGNORED).nonzero()[:, 0] + 1).tolist()
        one_each = inputs_and_labels(one_token_each(own))
        scores.append(sign * job.engine.score([one_each], [job.training.batch(numbers, device)]))
        read = said(job.task.tokenizer, ids)
        words += [
            f"{NOT}{read[asked[0]]}" if sign < 0 and place == asked[0] else read[place] for place in asked
        ]
        places += asked
    for own in job.training.added_up(torch.cat(scores), numbers).T.tolist():
        yield zip(places, words, own, strict=True)


def said(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Tokens as text, each as it reads after those before it."""
    before = [ids[max(0, place - CONTEXT) : place] for place in range(len(ids))]
    return [
        tokenizer.decode([*some, own])[len(tokenizer.decode(some)) :]
        for some, own in zip(before, ids, strict=True)
    ]
