"""Reads pages as a person or a browser would: texts, links, and what the CSP would refuse."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser

import sqlalchemy as sa

PART = {"HX-Request": "true", "HX-Request-Type": "partial"}
"""Headers with which htmx asks for a block."""


class Reader(HTMLParser):
    """Collects elements as (tag, attributes), all text, and the text inside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.code = ""
        self._inside = ""
        self.feed(str(html))  # not Markup, which would escape what is cut out of it

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._inside = tag

    def handle_endtag(self, _tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.code += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        """Attributes of every such element."""
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def refused(self) -> list[str]:
        """What a strict CSP would refuse: inline scripts and styles, handlers, other origins."""
        found = [f"inline code: {self.code.strip()[:60]}"] if self.code.strip() else []
        for tag, attrs in self.elements:
            found += [f"<{tag} {name}>" for name in attrs if name == "style" or name.startswith(("on", "hx-on"))]
            found += [f"<{tag}> from {attrs[name]}" for name in ("src", "href", "action") if "//" in attrs.get(name, "")]
            found += [f"<{tag}> runs {attrs[name]}" for name in ("src", "href") if attrs.get(name, "").startswith("javascript:")]
            if tag == "style":
                found.append("<style>")
        return found


def table_rows(html: str, kind: str) -> list[list[str]]:
    """The cells' texts of every row in the tables of class `kind` that has a cell of data; our templates end no row or cell."""
    rows = []
    for table in re.findall(rf'<table class="{kind}[" ].*?</table>', html, re.DOTALL):
        for row in re.split("<tr[ >]", table)[1:]:
            cells = re.split(r"<t[dh](?=[ >])[^>]*>", row)[1:]
            if "<td" in row:
                rows.append([" ".join(Reader(cell).text.split()) for cell in cells])
    return rows


@contextmanager
def counted(engine: sa.Engine) -> Iterator[list[str]]:
    """The queries that run inside; the BEGIN of a transaction is none."""
    statements: list[str] = []

    def note(_conn: object, _cursor: object, statement: str, *_rest: object) -> None:
        if statement != "BEGIN":
            statements.append(statement)

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)
