"""Reviews as something to read. They are data from strangers: nothing of them reaches a page unescaped, of
their markup only line breaks are kept, and what a terminal would obey is written out.
"""

import html
import re
import sys
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
    body, room = "", sys.maxsize if longest is None else longest
    for words in map(str.split, paragraphs(text)):
        if room > 0:
            body += f"<p>{html.escape(' '.join(words[:room]))}</p>"
        room -= len(words)
    if room < 0:
        body += f"<p><em>… and {-room} more words</em></p>"
    head = f"<figcaption><strong>{html.escape(caption)}</strong></figcaption>" if caption else ""
    return HTML(f"<figure>{head}<blockquote>{body}</blockquote></figure>")
