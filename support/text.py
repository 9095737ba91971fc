"""Reviews as something to read: escaped, cut into paragraphs.

Reviews are data from strangers. Nothing of them reaches a page unescaped; of their markup only line
breaks are kept.
"""

import html
import re

from IPython.display import HTML

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
