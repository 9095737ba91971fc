"""Reviews as something to read: escaped, cut into paragraphs, compared by their words.

Reviews are data from strangers. Nothing of them reaches a page unescaped; of their markup only line
breaks are kept.
"""

import html
import re
from collections.abc import Iterable

from IPython.display import HTML
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

LINE_BREAK = re.compile(r"(?:<br\s*/?>\s*)+", re.IGNORECASE)


def paragraphs(text: str) -> list[str]:
    """The review cut at its line breaks, as plain text."""
    return [part.strip() for part in LINE_BREAK.split(text) if part.strip()]


def show_review(text: str, caption: str = "", longest: int | None = None) -> HTML:
    """A review set as a quotation under a caption; after `longest` words only how many follow."""
    kept, left_out = _first_words(paragraphs(text), longest)
    body = "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in kept)
    if left_out:
        body += f"<p><em>… and {left_out} more words</em></p>"
    head = f"<figcaption><strong>{html.escape(caption)}</strong></figcaption>" if caption else ""
    return HTML(f"<figure>{head}<blockquote>{body}</blockquote></figure>")


def _first_words(texts: list[str], longest: int | None) -> tuple[list[str], int]:
    total = sum(len(text.split()) for text in texts)
    if longest is None or total <= longest:
        return texts, 0
    kept, room = [], longest
    for text in texts:
        words = text.split()[:room]
        room -= len(words)
        if words:
            kept.append(" ".join(words))
    return kept, total - longest


def words_in_common(one: str, other: str) -> list[str]:
    """Words that both reviews use, stop words left out, in alphabetical order."""
    return sorted((_words(one) & _words(other)) - ENGLISH_STOP_WORDS)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z][a-z']{2,}", " ".join(paragraphs(text)).lower()))


def strip_layer_names(names: Iterable[str]) -> list[str]:
    """Layer or parameter names without the parts that all share, so that a plot has room for them."""
    return [name.removeprefix("model.").removeprefix("distilbert.transformer.") for name in names]
