"""Influences spread over tokens: those that a query asks about, and those that a training text is made of."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from support.ekfac.memory import queries_at_a_time
from support.job.examples import Sequences
from support.job.store import in_blocks
from support.job.work import Job
from support.language import IGNORED, inputs_and_labels, one_token_each

CONTEXT = 8
"""Tokens before one with which it is read: enough for a space or a character that two of them share."""


def by_token(job: Job, pairs: pd.DataFrame) -> pd.DataFrame:
    """For each pair of a `query` and a `training_row`, and each `side` of it, query and training: what each
    `token`, by its place, adds, as `score`, and how it is `said`. Each side adds up to the score of the pair,
    but for what a low rank leaves out.

    Of a query to a model that writes, a token's part is that of its loss; else what flows through its
    position. The engine has to know the curvature. Raises what the engine raises.
    """
    job.engine.query_rank = job.question.query_rank or None
    tables: list[pd.DataFrame] = []
    for query, rows in pairs.groupby("query")["training_row"]:
        numbers = np.searchsorted(job.training.rows, rows).tolist()
        for side, tokens in zip(("query", "training"), _both_sides(job, query, numbers), strict=True):
            for row, (places, said, scores) in zip(rows, tokens, strict=True):
                about = {"query": query, "training_row": row, "side": side}
                tables.append(pd.DataFrame({**about, "token": places, "said": said, "score": scores}))
    return pd.concat(tables, ignore_index=True)


def _both_sides(job: Job, query: int, numbers: list[int]) -> tuple[list, list]:
    """Places, texts and scores of a query's tokens, and of those of each training example."""
    device, tokenizer, training = job.engine.passes.device, job.task.tokenizer, job.training
    asked = job.queries.batch([query], device)
    flowing = job.engine.token_influences(*asked, *training.batch(numbers, device))[0]
    ids = training.tokens[numbers]["input_ids"]
    scores = training.of_tokens(flowing.numpy(force=True), numbers)
    theirs = [(range(len(own)), said(tokenizer, own), one) for own, one in zip(ids, scores, strict=True)]
    own = job.queries.tokens[query]["input_ids"]
    if isinstance(job.queries, Sequences):
        # The loss of a query is a sum over its targets, so its influence is one, too.
        inputs, labels = asked
        places = ((labels[0, 1:] != IGNORED).nonzero()[:, 0] + 1).tolist()
        one_each = inputs_and_labels(one_token_each(inputs | {"labels": labels}))
        found = job.engine.score([one_each], [training.batch(numbers, device)])
        found = training.added_up(found, numbers).T
    else:
        # Influence is symmetric: the query's tokens are those of a training example asked about these.
        places, at_a_time = range(len(own)), queries_at_a_time(job.engine.layers, None, job.engine.query_rank)
        parts = [numbers[part.start : part.stop] for part in in_blocks(len(numbers), max(1, at_a_time))]
        batches = (training.batch(part, device) for part in parts)
        found = torch.cat([job.engine.token_influences(*batch, *asked)[:, 0] for batch in batches])
    words = said(tokenizer, own)
    ours = [(places, [words[place] for place in places], one) for one in found.numpy(force=True)]
    return ours, theirs


def said(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Tokens as text, each as it reads after those before it."""
    ends = ((ids[max(0, place - CONTEXT) : place], ids[place]) for place in range(len(ids)))
    return [tokenizer.decode([*before, own])[len(tokenizer.decode(before)) :] for before, own in ends]
