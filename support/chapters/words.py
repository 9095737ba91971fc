"""07: influence spread over words: word pieces merged, drawn as coloured text, listed in a table.

A word is a run of letters and digits with the apostrophes inside it (isn't), a line break, or a single
other character. Text is data from strangers: it reaches a page escaped. Colour, a veil over whatever
ground the page has, is never the only sign.
"""

import html
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

import numpy as np
import pandas as pd
from IPython.display import HTML
from transformers import PreTrainedTokenizerBase

from support.chapters.figures import readable

WORD = re.compile(r"<br\s*/?>|[^\W_]+(?:['’][^\W_]+)*|\S", re.IGNORECASE)
HELPS, HARMS = (76, 114, 176), (196, 78, 82)
DEEPEST = 0.45  # opacity of the strongest word's veil
FAINTEST = 0.1  # words below this share of the strongest are left without a mark


@dataclass(frozen=True)
class Word:
    """A word, where it stands in the review, and its part of an influence. A special token, which the
    tokenizer added, stands nowhere: `start` and `end` are 0."""

    text: str
    start: int
    end: int
    influence: float

    @property
    def is_special(self) -> bool:
        return self.start == self.end

    @property
    def is_line_break(self) -> bool:
        return self.text.startswith("<") and len(self.text) > 1

    @property
    def name(self) -> str:
        """How a table names it: upper and lower case are one."""
        if self.is_special:
            return self.text
        return "line break" if self.is_line_break else self.text.lower()


def word_influences(
    tokenizer: PreTrainedTokenizerBase, text: str, token_influences: np.ndarray, max_tokens: int = 512
) -> list[Word]:
    """The words of a review, each with the sum of the influences of the pieces that lie in it.

    `token_influences` has one number per token of the review, cut at `max_tokens`, and zeros for the
    padding behind them. Raises `ValueError` when that is not so: then they are another review's.
    """
    encoded = tokenizer(text, truncation=True, max_length=max_tokens, return_offsets_mapping=True)
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    real, padding = np.split(token_influences, [len(pieces)])
    if len(real) < len(pieces) or padding.any():
        raise ValueError(
            f"The review has {len(pieces)} tokens; of the {len(token_influences)} influences given, "
            f"{np.count_nonzero(padding)} behind the last token are not zero. Are they another review's?"
        )
    spans = [match.span() for match in WORD.finditer(text)]
    words: list[Word] = []
    for piece, (start, end), influence in zip(pieces, encoded["offset_mapping"], real.tolist(), strict=True):
        if start == end:
            words.append(Word(piece, 0, 0, influence))
            continue
        start += len(text[start:end]) - len(text[start:end].lstrip())  # a piece may begin with a space
        first, last = spans[bisect_right(spans, start, key=itemgetter(0)) - 1]
        if words and words[-1].end == last:
            influence += words.pop().influence
        words.append(Word(text[first:last], first, last, influence))
    return words


def strongest_words(words: Sequence[Word], count: int) -> pd.DataFrame:
    """The words with most influence, repetitions added up, strongest first: columns `word`, `times`,
    `influence`, `effect` (helps or harms) and `share` in the influence of the whole review, negative for
    a word that speaks against it."""
    frame = pd.DataFrame({"word": word.name, "influence": word.influence} for word in words)
    by_word = frame.groupby("word", sort=False)["influence"].agg(times="size", influence="sum")
    by_word["effect"] = np.where(by_word["influence"] > 0, "helps", "harms")
    by_word["share"] = by_word["influence"] / frame["influence"].sum()
    order = by_word["influence"].abs().sort_values(ascending=False, kind="stable").index
    return by_word.loc[order[:count]].reset_index()


def mean_shares(words: Sequence[Word]) -> pd.Series:
    """The mean share of each word's occurrences in the sum of all sizes, without special tokens and marks."""
    spoken = [word for word in words if not word.is_special and word.text[0].isalnum()]
    sizes = pd.Series([abs(word.influence) for word in spoken], [word.name for word in spoken])
    return (sizes / sizes.sum()).groupby(level=0).mean().rename_axis("word").rename("size")


def without(text: str, name: str) -> str:
    """The text with every occurrence of a word taken out, the word named as `Word.name` does."""
    return WORD.sub(lambda m: "" if Word(m.group(), *m.span(), 0.0).name == name else m.group(), text)


def show_words(
    words: Sequence[Word], text: str, caption: str, special_are: str = "Added by the tokenizer"
) -> HTML:
    """A review with every word under a veil as deep as its share of the strongest word's influence,
    special tokens named first. What was cut off is not shown."""
    special, written = ([word for word in words if word.is_special is told] for told in (True, False))
    largest = max((abs(word.influence) for word in written), default=0.0) or 1.0
    body, end = [], 0
    for word, following in pairwise([*written, None]):
        body += [html.escape(text[end : word.start]), _veiled(word, largest)]
        if word.is_line_break and not (following and following.is_line_break):
            body.append("<br>")
        end = word.end
    added = " ".join(f"{_veiled(word, largest)} <small>{_signed(word.influence)}</small>" for word in special)
    helps = _veiled(Word("helps", 0, 0, largest), largest)
    harms = _veiled(Word("harms", 0, 0, -largest), largest)
    legend = (
        f"{helps} blue, underlined · {harms} red, dotted · deepest colour {readable(largest)} · "
        f"no mark below {readable(FAINTEST * largest)} · ⏎ a line break · point at a word for its number"
    )
    return HTML(
        f'<figure role="group" aria-label="{html.escape(caption)}: words marked by influence">'
        f"<figcaption><strong>{html.escape(caption)}</strong></figcaption>"
        f"<p><small>{legend}</small><br>{special_are}: {added}</p>"
        f'<blockquote style="line-height: 1.9">{"".join(body)}</blockquote></figure>'
    )


def _veiled(word: Word, largest: float) -> str:
    share = min(abs(word.influence) / largest, 1.0)
    shown = "⏎" if word.is_line_break else html.escape(word.text)
    helps = word.influence > 0
    effect, color, line = ("helps", HELPS, "solid") if helps else ("harms", HARMS, "dotted")
    title = f"{html.escape(word.name)}: {_signed(word.influence)}, {effect}"
    rgb = ",".join(map(str, color))
    style = (
        f'style="background: rgba({rgb},{DEEPEST * share:.2f}); text-decoration: underline {line} '
        f'rgb({rgb}) 2px; text-underline-offset: 3px; color: inherit" '
    )
    return f'<span {style if share >= FAINTEST else ""}title="{title}">{shown}</span>'


def _signed(value: float) -> str:
    return f"{'−' if value < 0 else '+'}{readable(abs(value))}"
