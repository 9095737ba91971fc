"""A page read as a browser reads it, to see what is on it."""

from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "input"}


class Page(HTMLParser):
    """Tags with their attributes, the text of all and of each kind of tag; every tag must be closed in
    order, and none may run anything."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.texts, self.text, self.open = [], {}, "", []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert not [name for name, _ in attributes if name.startswith("on")]
        self.tags.append((tag, dict(attributes)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        for tag in set(self.open):
            self.texts[tag][-1] += data

    @property
    def kinds(self) -> set[str]:
        return {tag for tag, _ in self.tags}

    def having(self, name: str) -> list[str]:
        """Values of an attribute, wherever it is."""
        return [attributes[name] for _, attributes in self.tags if name in attributes]
