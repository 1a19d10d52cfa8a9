"""Figures as files: while a page is made its charts are collected, so that each has an address of its own.

The address of a figure is its page's, with `figure=<name>.svg` or `.csv` added; the page is made again and the figure taken
out of it, so a chart needs nothing but its title, its drawing and its numbers. A file stands alone: its colours are the
style sheet's, resolved for one scheme, since programs that read SVG know neither `var()` nor `light-dark()`.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

from markupsafe import Markup, escape

from sae_core.errors import NotFound
from server.markup import made
from server.resources import resource_path

SCHEMES = ("light", "dark")
KINDS = ("svg", "csv")


class Data(NamedTuple):
    """The numbers behind a figure, in full."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Figure(NamedTuple):
    """A chart of a page."""

    name: str
    title: str
    desc: str
    body: str
    """What is inside the svg element, escaped by its maker."""
    width: int
    height: int
    data: Data | None


class _Page:
    """The page that is being made."""

    def __init__(self, query: str) -> None:
        kept = [(key, value) for key, value in parse_qsl(query, keep_blank_values=True) if key not in ("figure", "scheme")]
        self.address = escape(f"?{urlencode(kept)}&" if kept else "?")
        """The page's own query, ready for what is added to it."""
        self.figures: dict[str, Figure] = {}


_page: ContextVar[_Page | None] = ContextVar("page", default=None)


@contextmanager
def collecting(query: str = "") -> Iterator[dict[str, Figure]]:
    """Charts drawn inside know the page's query, so that they link to their files; they are in the mapping afterwards."""
    page = _Page(query)
    token = _page.set(page)
    try:
        yield page.figures
    finally:
        _page.reset(token)


def keep(title: str, desc: str, body: str, width: int, height: int, data: Data | None) -> Markup:
    """Collect a figure; the links to its files, or nothing outside a page."""
    page = _page.get()
    if page is None:
        return Markup("")
    base = slug(title)
    name = next(n for i in range(1, 10_000) if (n := base if i == 1 else f"{base}-{i}") not in page.figures)
    page.figures[name] = Figure(name, title, desc, body, width, height, data)
    kinds = KINDS if data else KINDS[:1]
    links = " ".join(
        f'<a href="{page.address}figure={name}.{kind}" download>{kind.upper()}</a>'
        for kind in kinds  # a slug needs no quoting
    )
    return made(f'<p class="files">{links}</p>')


@lru_cache(maxsize=4096)
def slug(title: str) -> str:
    """A title as a part of an address."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60].strip("-") or "figure"


def pick(figures: dict[str, Figure], asked: str) -> tuple[Figure, str]:
    """The figure called `name.kind`, and its kind; NotFound says which there are."""
    name, _, kind = asked.rpartition(".")
    found = figures.get(name)
    if found is None or kind not in KINDS or (kind == "csv" and found.data is None):
        there_are = ", ".join(f"{one}.svg" for one in figures) or "none"
        raise NotFound(f"This page has no figure called '{asked}'. There are: {there_are}.", field="figure")
    return found, kind


def standalone(figure: Figure, scheme: str = "light") -> str:
    """The figure as an SVG file, title above, with its colours."""
    top, side = 26, 8
    width, height = figure.width + 2 * side, figure.height + top + side
    size = f'viewBox="0 0 {width} {height}" width="{2 * width}" height="{2 * height}"'
    title = escape(figure.title)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}><title>{title}</title><desc>{escape(figure.desc)}</desc>'
        f'<style>{style(scheme)}</style><rect class="card" width="{width}" height="{height}"/>'
        f'<text class="head" x="{side}" y="17">{title}</text><g transform="translate({side} {top})">{figure.body}</g></svg>'
    )


@lru_cache
def palette(scheme: str) -> dict[str, str]:
    """The style sheet's colours by name, for one scheme."""
    text = (resource_path("static") / "app.css").read_text()
    root = text[text.index(":root") : text.index("}", text.index(":root"))]
    place = SCHEMES.index(scheme)
    return {name: pair[place] for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", root)}


@lru_cache
def marks(scheme: str) -> list[str]:
    """The colours of the series, `s0` to `s5`."""
    text = (resource_path("static") / "app.css").read_text()
    place = SCHEMES.index(scheme)
    return [pair[place] for _, *pair in sorted(re.findall(r"\.s(\d) \{ --mark: light-dark\((#\w+), (#\w+)\)", text))]


def mixed(one: str, other: str, share: float) -> str:
    """`share` of one colour, the rest of the other."""
    sums = [round(share * int(one[i : i + 2], 16) + (1 - share) * int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{value:02x}" for value in sums)


@lru_cache
def style(scheme: str) -> str:
    """What the style sheet says of charts, for programs that know no custom properties."""
    c = palette(scheme)
    levels = "".join(
        f"a .c{i},.c{i}{{fill:{mixed(c['accent-fill'], c['sunk'], (10 + 6 * i) / 100)}}}" for i in range(1, 16)
    )  # as `--c` of the classes c1 to c15
    series = "".join(
        f".s{i} .mark,.mark.s{i}{{fill:{colour}}}.s{i} .edge,.s{i} .bounds{{stroke:{colour}}}"
        f".s{i} .band{{fill:{colour};fill-opacity:.16}}"
        for i, colour in enumerate(marks(scheme))
    )
    return (
        f"text{{font:10px 'Noto Sans','DejaVu Sans',Arial,sans-serif;fill:{c['soft']}}}.head{{font-size:12px;fill:{c['ink']}}}"
        f".card{{fill:{c['card']}}}.now,.top{{fill:{c['ink']}}}.axis{{stroke:{c['line']}}}.grid{{stroke:{c['hair']}}}"
        f".line{{fill:none;stroke:{c['accent']};stroke-width:1.6}}.hit{{fill:none}}.void{{fill:none;stroke:{c['line']}}}"
        f".track{{fill:{c['sunk']}}}.share{{fill:{c['bar']}}}.chosen{{fill:{c['accent']}}}"
        f".pos,.up{{fill:{c['pos']}}}.neg,.down{{fill:{c['neg']}}}.spread{{stroke:{c['ink']}}}"
        f".mark{{stroke:{c['card']};stroke-width:1}}.edge,.bounds{{fill:none;stroke-width:1.4}}.c0{{fill:{c['sunk']}}}"
        f"{levels}{series}.band{{stroke:none}}"
    )
