"""Reviews as something to read. They are data from strangers: nothing of them reaches a page unescaped,
and of their markup only line breaks are kept.
"""

import html
import re
import sys

from IPython.display import HTML

LINE_BREAK = re.compile(r"(?:<br\s*/?>\s*)+", re.IGNORECASE)


def paragraphs(text: str) -> list[str]:
    """The review cut at its line breaks, as plain text."""
    return [part.strip() for part in LINE_BREAK.split(text) if part.strip()]


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
