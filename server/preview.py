"""A feature as a picture of the size that chats show: drawn as SVG, made a PNG by resvg, with a font that comes along."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from textwrap import shorten

from markupsafe import Markup, escape

from server.figures import palette
from server.markup import visible
from server.rendering import num, percent
from server.store.features import FeatureExample, FeaturePage

WIDTH, HEIGHT, SIDE = 1200, 630, 56
LINE = 74
"""Characters of an example in a line, at the size it is drawn."""
LINES = 4
AROUND = 28
"""Tokens of an example before the destination."""
PAINTED = 0.3
"""A source that gave this share of what the strongest gave, or more, is coloured."""


@lru_cache
def font_files() -> list[str]:
    """The font that comes as a package: what the machine has is only used where it lacks a sign."""
    return [str(path) for path in Path(str(files("fontpkg_noto_sans") / "files")).glob("*.ttf")]


def png(svg: str) -> bytes:
    """The drawing as a PNG."""
    import resvg_py  # here, since a web process that shows no picture need not load it

    return bytes(resvg_py.svg_to_bytes(svg_string=svg, font_files=font_files(), font_family="Noto Sans", skip_system_fonts=False))


def feature_svg(page: FeaturePage) -> str:
    """The card: what it is, what family, which heads, what it promotes, its strongest example."""
    c = palette("light")
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{c["paper"]}"/><rect width="{WIDTH}" height="10" fill="{c["warm"]}"/>',
        _text(SIDE, 92, f"Feature {page.index}", 54, c["ink"], "700"),
        _text(SIDE, 134, f"{page.sae.name} · layer {page.sae.layer} of {page.sae.model}", 24, c["soft"]),
    ]
    facts = (
        ("family", page.family or page.sae.no_family),
        ("strongest", num(page.max_act)),
        ("fires on", percent(page.density)),
    )
    for x, (name, value) in zip((640, 890, 1020), facts, strict=True):
        parts += [_text(x, 72, name, 20, c["soft"]), _text(x, 106, shorten(value, 18, placeholder="…"), 28, c["ink"], "700")]
    if page.verdict:
        parts.append(_text(SIDE, 190, shorten(visible(page.verdict), 84, placeholder="…"), 27, c["ink"]))
    parts += _heads(page, c)
    promoted = " · ".join(visible(token.text).strip() or "space" for token in page.promoted[:6])
    parts += [
        _text(640, 254, "promotes", 20, c["soft"]),
        _text(640, 290, shorten(promoted, 44, placeholder="…"), 26, c["pos"], "700"),
    ]
    if page.n_fired == 0:
        parts.append(_text(SIDE, 440, "It never fired: a dead feature.", 30, c["soft"]))
    elif page.examples:
        parts += _example(page.examples[0], c)
    parts.append(_text(WIDTH - SIDE, HEIGHT - 30, "Headscope", 22, c["soft"], anchor="end"))
    body = "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">{body}</svg>'
    )


def _text(x: float, y: float, text: str, size: int, colour: str, weight: str = "400", anchor: str = "start") -> Markup:
    return Markup('<text x="{}" y="{}" font-size="{}" fill="{}" font-weight="{}" text-anchor="{}">{}</text>').format(
        x, y, size, colour, weight, anchor, text
    )


def _heads(page: FeaturePage, c: dict[str, str]) -> Iterator[str]:
    """A bar per head, by data: above the line for what speaks for the feature, below for what speaks against it."""
    yield _text(SIDE, 254, "heads, by mean DFA", 20, c["soft"])
    top = max((abs(head.dfa) for head in page.heads if math.isfinite(head.dfa)), default=0.0) or 1.0
    wide = min(46.0, 500 / max(1, len(page.heads)))
    for place, head in enumerate(page.heads):
        if not math.isfinite(head.dfa):  # an imported harvest may not say it
            continue
        size = 52 * abs(head.dfa) / top
        x, y = SIDE + wide * place, 318 - size if head.dfa > 0 else 318
        colour = c["pos"] if head.dfa > 0 else c["neg"]
        yield f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide - 5:.1f}" height="{size:.1f}" fill="{colour}"/>'
        if len(page.heads) <= 16:
            yield _text(x + wide / 2 - 2.5, 344, str(head.head), 17, c["soft"], anchor="middle")
    yield f'<rect x="{SIDE}" y="317.5" width="{wide * len(page.heads):.1f}" height="1" fill="{c["line"]}"/>'


def _example(example: FeatureExample, c: dict[str, str]) -> Iterator[str]:
    """The strongest example: its destination framed in bold, its strongest sources coloured."""
    gave: dict[int, float] = {}
    for entry in example.dfa:
        gave[entry.src] = gave.get(entry.src, 0.0) + entry.value
    top = max((abs(value) for value in gave.values()), default=0.0)
    sources = {position: value for position, value in gave.items() if top and abs(value) >= PAINTED * top}
    first = max(example.start, min([example.dest - 12, *(s for s in sources if s >= example.dest - AROUND)]))
    said = f"strongest example, activation {num(example.act)}"
    if sources and (strongest := max(sources, key=lambda position: abs(sources[position]))) < first:
        text = visible(example.texts[strongest - example.start]).strip()
        said += f"; its strongest source stands {example.dest - strongest} tokens back: “{shorten(text, 24, placeholder='…')}”"
    yield _text(SIDE, 400, said, 20, c["soft"])
    lines = _lines([(position, example.texts[position - example.start]) for position in range(first, _end(example))])
    for place, line in enumerate(lines[:LINES]):
        spans = []
        for position, text in line:
            if position == example.dest:
                look = f'font-weight="700" text-decoration="underline" fill="{c["ink"]}"'
            elif position in sources:
                look = f'font-weight="700" fill="{c["pos"] if sources[position] > 0 else c["neg"]}"'
            else:
                look = f'fill="{c["soft"]}"'
            spans.append(f"<tspan {look}>{escape(text)}</tspan>")
        yield f'<text x="{SIDE}" y="{442 + 38 * place}" font-size="27" xml:space="preserve">{"".join(spans)}</text>'


def _end(example: FeatureExample) -> int:
    return min(example.start + len(example.texts), example.dest + 14)


def _lines(tokens: Sequence[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """Tokens in lines of about LINE characters, broken where a word begins."""
    lines: list[list[tuple[int, str]]] = [[]]
    used = 0
    for position, raw in tokens:
        text = shorten(visible(raw), 40, placeholder="…") if len(raw) > 40 else visible(raw)
        if lines[-1] and used + len(text) > LINE and (text.startswith(" ") or used > LINE):
            lines.append([])
            used, text = 0, text.lstrip()
        lines[-1].append((position, text))
        used += len(text)
    return lines
