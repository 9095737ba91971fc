"""Reviews as something to read: escaped, cut into paragraphs, harmless on a terminal.

Reviews are data from strangers. Nothing of them reaches a page unescaped; of their markup only line
breaks are kept.
"""

import html
import re
from unicodedata import category

from IPython.display import HTML

INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Categories of characters that a terminal obeys: control, format (bidirectional marks), breaks."""

LINE_BREAK = re.compile(r"(?:<br\s*/?>\s*)+", re.IGNORECASE)


def paragraphs(text: str) -> list[str]:
    """The review cut at its line breaks, as plain text."""
    return [part.strip() for part in LINE_BREAK.split(text) if part.strip()]


def visible(text: str) -> str:
    """Text for a terminal: what it would obey rather than show, but for the end of a line, is written out,
    such as `\\x1b`, which begins an escape sequence."""
    return "".join(
        one.encode("unicode_escape").decode() if category(one) in INVISIBLE and one != "\n" else one
        for one in text
    )


def show_review(text: str, caption: str = "", longest: int | None = None) -> HTML:
    """A review set as a quotation under a caption; after `longest` words only how many follow."""
    kept, left_out = [paragraph.split() for paragraph in paragraphs(text)], 0
    if longest is not None:
        left_out = max(sum(map(len, kept)) - longest, 0)
        room = [longest - sum(map(len, kept[:number])) for number in range(len(kept))]
        kept = [words[:left] for words, left in zip(kept, room, strict=True) if left > 0]
    body = "".join(f"<p>{html.escape(' '.join(words))}</p>" for words in kept)
    if left_out:
        body += f"<p><em>… and {left_out} more words</em></p>"
    head = f"<figcaption><strong>{html.escape(caption)}</strong></figcaption>" if caption else ""
    return HTML(f"<figure>{head}<blockquote>{body}</blockquote></figure>")
