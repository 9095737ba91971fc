"""10: what the taught language model writes, the words on both sides, and its scorers before the judge."""

from collections.abc import Sequence

import bm25s
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from support.chapters.words import Word, word_influences
from support.ekfac.batches import IGNORED
from support.language import Batch
from support.writing import Text, in_chat


def written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: str, new_tokens: int) -> str:
    """What the model says to this request, the likeliest token each time, until its end or so many."""
    read = tokenizer(in_chat(tokenizer, asked), return_tensors="pt")
    how = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    said = model.generate(**read, generation_config=how)[0, read["input_ids"].shape[1] :]
    return tokenizer.decode(said, skip_special_tokens=True)


def said_words(
    tokenizer: PreTrainedTokenizerBase, said: str, sequence: Batch, token_influences: Float[Tensor, " tokens"]
) -> list[Word]:
    """The words of what is said, each with the influences of the positions that say it, one before each of
    its tokens; first the rest, under the name of the prompt. Raises as `word_influences`."""
    (asked,) = (sequence["labels"][0] != IGNORED).nonzero(as_tuple=True)
    first, end = int(asked[0]), int(asked[-1]) + 1
    saying = token_influences[first - 1 : end - 1]
    prompt = token_influences.sum() - saying.sum()
    words = word_influences(tokenizer, said, saying.numpy(), max_tokens=end - first)
    return [Word("prompt", 0, 0, prompt.item()), *words]


def strongest_texts(
    scores: Float[Tensor, " train"], texts: Sequence[Text], count: int, longest: int = 70
) -> pd.DataFrame:
    """The texts that help most and those that harm most, with their influence and how they begin."""
    order = scores.argsort(descending=True, stable=True).tolist()
    rows = [*order[:count], *order[-count:]]
    table = {
        "influence": [round(score, 1) for score in scores[rows].tolist()],
        "asked": [texts[row].asked.split()[2] for row in rows],
        "kind": [texts[row].kind for row in rows],
        "begins": [texts[row].said[:longest] for row in rows],
    }
    return pd.DataFrame(table, index=pd.Index(rows, name="text"))


def shared_words(queries: Sequence[str], texts: Sequence[str]) -> Float[Tensor, "queries texts"]:
    """Okapi BM25 of each text for the words of each query."""
    told, asked = (
        bm25s.tokenize(list(side), stopwords="en", return_ids=False, show_progress=False)
        for side in (texts, queries)
    )
    index = bm25s.BM25()
    index.index(told, show_progress=False)
    return torch.stack([torch.from_numpy(index.get_scores(words)) for words in asked]).float()


NAMES = {"tf_idf": "TF-IDF", "bm25": "BM25", "representation_cosine": "representation cosine"}
NAMES |= {"training_loss": "training loss", "gradients": "gradients alone"}
PLACES = {"0%": "before training", "20%": "early", "100%": "at the end", "both": "early and at the end"}
PLACES |= {"20-percent": "early", "final": "at the end", "all": "early and at the end"}
JUDGED, CUSTOMARY = ("EK-FAC, weighted covariances", "0.1"), "0.1 × mean"
"""Scorer and λ of the chapter, which its judge prefers, and the λ that most take."""


def best_of_each(table: pd.DataFrame) -> pd.DataFrame:
    """Of each scorer and place the row that is best on the queries to choose by, and the customary λ whatever
    it reaches, each with a `name`."""
    table = table[table["scorer"] != "ceiling"].reset_index(drop=True)
    best = table.loc[table.groupby(["scorer", "where"])["choice"].idxmax()]
    plain_at_the_end = (table["where"] == "100%") & (table["normalisation"] == "plain")
    rows = pd.concat([best, table[(table["regularization"] == CUSTOMARY) & plain_at_the_end]])
    return rows.assign(name=rows.apply(_name, axis=1)).drop_duplicates("name", ignore_index=True)


def _name(row: pd.Series) -> str:
    name, where = NAMES.get(row["scorer"], row["scorer"]), row["where"]
    parts = [f"{name} {PLACES.get(where, f'at {where}')}" if where else name]
    if row["regularization"] and row["scorer"] != "gradients":
        parts.append(f"λ = {row['regularization']}")
    if row["normalisation"] not in ("", "plain"):
        parts.append(row["normalisation"])
    return ", ".join(parts)


def recalls(table: pd.DataFrame) -> pd.DataFrame:
    """Of each scorer of planted facts, and each snapshot of the model, the setting that is best on half
    of the facts; and EK-FAC with the λ of the chapter. How often the first text is a teacher; of three
    teachers, how many are among the first three, with the interval over facts, and among the first ten;
    decoys among the first three; and, on the other half, teachers among the first
    three."""
    best = table.loc[table.groupby(["scorer", "where"])["choice"].idxmax()]
    ours = table[(table[["scorer", "regularization", "normalisation"]] == (*JUDGED, "plain")).all(axis=1)]
    table = pd.concat([ours, best]).drop_duplicates()
    columns = {
        "a teacher is first": table["teachers_1"],
        "teachers in first 3": table["teachers_3"],
        "95 % from": table["low_3"],
        "to": table["high_3"],
        "teachers in first 10": table["teachers_10"],
        "decoys in first 3": table["decoys_3"],
        "teachers in first 3, other facts": table["report"],
    }
    found = pd.DataFrame(columns).set_index(pd.Index(table.apply(_name, axis=1), name=""))
    return found.sort_values("teachers in first 3", ascending=False).round(2)
