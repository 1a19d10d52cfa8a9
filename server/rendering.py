"""Numbers, token texts and charts as HTML. Everything is escaped here; nothing carries a style, so a strict CSP holds.

Charts are SVG with a title, a description, and their numbers as text beside them. Colours come from classes: `a1`..`a15`
activation, `p1`..`p15` positive and `n1`..`n15` negative DFA, `c1`..`c15` how much there is.
"""

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from markupsafe import Markup, escape

from server.store.features import FeatureExample, HeadShare

NARROW = "\N{NARROW NO-BREAK SPACE}"
LEVELS = 15
FAINTEST = 0.03
"""A DFA below this share of the example's largest is not painted; its number is still there."""
FAR_SOURCE = 5
"""A source painted at this level or above stays in view however short the context is."""


# --- numbers -----------------------------------------------------------------


def num(value: float | None, digits: int = 3) -> str:
    """`value` to so many significant digits, with a real minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{value:.{max(0, digits - 1 - size)}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """`num` with a plus where the value is positive."""
    return ("+" if value is not None and value > 0 else "") + num(value, digits)


def fixed(value: float | None, places: int = 2) -> str:
    """`value` to so many decimal places, so that a column lines up."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{places}f}".replace("-", "−")


def percent(share: float | None, digits: int = 3) -> str:
    """A share as a percentage."""
    return "–" if share is None or not math.isfinite(share) else f"{num(100 * share, digits)}{NARROW}%"


def count(n: int | float | None) -> str:
    """A whole number with its thousands set apart."""
    return "–" if n is None else f"{round(n):,}".replace(",", NARROW).replace("-", "−")


def duration(seconds: float | None) -> str:
    """About how long, in the two largest units."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def moment(at: datetime | None) -> str:
    """A time in UTC. SQLite gives times without their zone; ours are all in UTC."""
    return "–" if at is None else f"{at.replace(tzinfo=at.tzinfo or UTC).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def level(value: float, scale: float) -> int:
    """0 to 15: how strongly `value` is painted when `scale` is painted fully."""
    if scale <= 0 or value <= 0:
        return 0
    return min(LEVELS, max(1, math.ceil(LEVELS * value / scale)))


# --- token texts -------------------------------------------------------------

_SIGNS = {"\n": "↵", "\r": "␍", "\t": "⇥", "\x00": "␀"}


@lru_cache(maxsize=65536)
def token_text(text: str) -> Markup:
    """A token as people see it: escaped, and no character invisible or able to turn the text around it."""
    return _visible(text).replace("↵", Markup('<i class="nl">↵</i>'))


def token_chip(text: str) -> Markup:
    """A token standing alone, its spaces made visible."""
    spaced = _visible(text).replace(" ", Markup('<i class="sp">·</i>')).replace("↵", Markup('<i class="nl">↵</i>'))
    return Markup('<span class="chip">{}</span>').format(spaced)


def _visible(text: str) -> Markup:
    return escape("".join(_SIGNS.get(c) or (f"⟨{ord(c):X}⟩" if _hidden(c) else c) for c in text))


def _hidden(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


class Paint(NamedTuple):
    """How an example is shown."""

    scale: float
    """The activation painted fully: the feature's maximum."""
    head: int | None = None
    """Paint this head's DFA alone."""
    context: int | None = 16
    """Tokens on each side of the destination; None shows the whole window."""


def example_tokens(example: FeatureExample, paint: Paint) -> Markup:
    """The example's text: activation as warmth, DFA as a bar beneath, the destination framed.

    A token with numbers carries them for the panel: `data-a` activation, `data-d` its DFA as `head:value` pairs. Sources
    that matter stay in view however far back they are.
    """
    by_source, entries = _by_source(example, paint.head)
    scale = max((abs(value) for value in _by_source(example, None)[0].values()), default=0.0)
    levels = {src: level(abs(v), scale) if abs(v) >= FAINTEST * scale else 0 for src, v in by_source.items()}
    end = example.start + len(example.texts)
    shown = _in_view(example, levels, paint.context, end)
    parts: list[str] = []
    last = example.start - 1
    for position in shown:
        if position - last > 1:
            parts.append(_left_out(position - last - 1))
        parts.append(_token(example, position, levels.get(position, 0), by_source.get(position, 0.0), entries, paint.scale))
        last = position
    if end - last > 1:
        parts.append(_left_out(end - last - 1))
    return Markup("".join(parts))  # noqa: S704 - every part is escaped above


def _by_source(example: FeatureExample, head: int | None) -> tuple[dict[int, float], dict[int, list[str]]]:
    sums: dict[int, float] = {}
    entries: dict[int, list[str]] = {}
    for src, at, value in ((entry.src, entry.head, entry.value) for entry in example.dfa):
        entries.setdefault(src, []).append(f"{at}:{value:.4g}")
        if head is None or at == head:
            sums[src] = sums.get(src, 0.0) + value
    return sums, entries


def _in_view(example: FeatureExample, levels: Mapping[int, int], context: int | None, end: int) -> Sequence[int]:
    if context is None:
        return range(example.start, end)
    near = set(range(max(example.start, example.dest - context), min(end, example.dest + context + 1)))
    for src, strength in levels.items():
        if strength >= FAR_SOURCE:
            near.update(range(max(example.start, src - 2), min(end, src + 2)))
    shown: list[int] = []
    for position in sorted(near):
        # An ellipsis for one or two tokens would be no shorter than the tokens.
        if shown and 1 < position - shown[-1] <= 3:
            shown.extend(range(shown[-1] + 1, position))
        shown.append(position)
    return shown


def _left_out(n: int) -> str:
    return f'<i class="gap" title="{n} more">⋯</i>'


def _token(
    example: FeatureExample, position: int, strength: int, dfa: float, entries: Mapping[int, list[str]], scale: float
) -> str:
    raw = example.texts[position - example.start]
    text = token_text(raw)
    # The sign of a line end stays inside the token; the line itself ends after it.
    tail = "<wbr>" if "\n" in raw else ""
    act = example.acts.get(position, 0.0)
    classes = []
    if act > 0:
        classes.append(f"a{level(act, scale)}")
    if strength:
        classes.append(f"{'p' if dfa > 0 else 'n'}{strength}")
    if position == example.dest:
        classes.append("dest")
    data = f' data-a="{act:.4g}"' if act > 0 else ""
    if position in entries:
        data += f' data-d="{" ".join(entries[position])}"'
    if not data and not classes:
        return f"{text}{tail}"
    space = " " if text.startswith(" ") else ""
    # The leading space stands outside, so that a mark hugs its word and lines still break at spaces.
    word = text[1:] if space and len(text) > 1 else text
    space = space if len(text) > 1 else ""
    return f'{space}<span class="{" ".join(["t", *classes])}" data-p="{position}"{data}>{word}</span>{tail}'


def head_strip(example: FeatureExample) -> Markup:
    """A bar per head: the DFA of this example, sources summed, drawn up for positive and down for negative."""
    sums = example.by_head
    top = max((abs(value) for value in sums), default=0.0) or 1.0
    width = 6 * len(sums)
    bars = []
    for head, value in enumerate(sums):
        height = max(0.5, 10 * abs(value) / top)
        y = 11 - height if value > 0 else 11
        sign = "pos" if value > 0 else "neg"
        bars.append(
            f'<g><title>head {head}: {signed(value)}</title><rect class="hit" x="{6 * head}" y="0" width="6" height="22"/>'
            f'<rect class="{sign}" x="{6 * head + 1}" y="{y:.1f}" width="4" height="{height:.1f}"/></g>'
        )
    label = ", ".join(f"head {head} {signed(value, 2)}" for head, value in enumerate(sums))
    return Markup(  # noqa: S704 - numbers only
        f'<svg class="strip" role="img" aria-label="DFA by head: {label}" viewBox="0 0 {width} 22" width="{width}" height="22">'
        f'<line class="axis" x1="0" x2="{width}" y1="11" y2="11"/>{"".join(bars)}</svg>'
    )


# --- charts ------------------------------------------------------------------


def share_bar(value: float, top: float, width: int = 90) -> Markup:
    """A bar from the left: `value` of `top`. The number stands beside it, so this says nothing to a screen reader."""
    length = 0.0 if top <= 0 else width * min(1.0, max(0.0, value / top))
    return Markup(  # noqa: S704 - numbers only
        f'<svg class="bar" aria-hidden="true" viewBox="0 0 {width} 10" width="{width}" height="10">'
        f'<rect class="track" width="{width}" height="10"/><rect class="share" width="{length:.1f}" height="10"/></svg>'
    )


def signed_bar(value: float, spread: float, top: float, width: int = 90) -> Markup:
    """A bar from the middle, right for positive, left for negative, with a line for the spread on both sides of its end."""
    middle = width / 2
    per = 0.0 if top <= 0 else middle / top
    end = middle + per * value
    left, right = (max(0.0, min(float(width), x)) for x in (end - per * spread, end + per * spread))
    whisker = f'<line class="spread" x1="{left:.1f}" x2="{right:.1f}" y1="5" y2="5"/>' if spread else ""
    return Markup(  # noqa: S704 - numbers only
        f'<svg class="bar" aria-hidden="true" viewBox="0 0 {width} 10" width="{width}" height="10">'
        f'<rect class="track" width="{width}" height="10"/><rect class="{"pos" if value >= 0 else "neg"}" '
        f'x="{min(middle, end):.1f}" width="{abs(end - middle):.1f}" height="10"/>{whisker}'
        f'<line class="axis" x1="{middle}" x2="{middle}" y1="0" y2="10"/></svg>'
    )


class Bar(NamedTuple):
    """A bar of a chart."""

    label: str
    value: float
    link: str | None = None
    kind: str = "share"


def heads_top(heads: Sequence[HeadShare]) -> float:
    """The largest |mean DFA| with its spread, so that every head's bar is drawn to one scale."""
    return max((abs(head.dfa) + head.dfa_std for head in heads), default=0.0)


def bar_chart(
    title: str,
    bars: Sequence[Bar],
    *,
    desc: str,
    unit: str = "",
    log: bool = False,
    ticks: Sequence[tuple[float, str]] = (),
    width: int = 300,
    height: int = 96,
) -> Markup:
    """Vertical bars. `ticks` are (edge between bars, label); without them every bar's own label is written when it fits."""
    top = max((bar.value for bar in bars), default=0.0)
    scaled = [_height(bar.value, top, log) * (height - 28) for bar in bars]
    step = width / max(1, len(bars))
    base = height - 16
    parts = [f'<line class="axis" x1="0" x2="{width}" y1="{base}" y2="{base}"/>']
    for i, (bar, size) in enumerate(zip(bars, scaled, strict=True)):
        text = escape(f"{bar.label}: {num(bar.value) if bar.value % 1 else count(bar.value)}{unit}")
        rects = (
            f'<title>{text}</title><rect class="hit" x="{i * step:.1f}" y="0" width="{step:.1f}" height="{base}"/>'
            f'<rect class="{bar.kind}" x="{i * step + 0.75:.1f}" y="{base - size:.1f}" '
            f'width="{max(0.5, step - 1.5):.1f}" height="{size:.1f}"/>'
        )
        parts.append(f'<a href="{escape(bar.link)}">{rects}</a>' if bar.link else f"<g>{rects}</g>")
    labels = ticks or ([(i + 0.5, bar.label) for i, bar in enumerate(bars)] if len(bars) <= width / 18 else [])
    for at, label in labels:
        x = at * step
        anchor = "start" if x < 8 else "end" if x > width - 8 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{height - 4}" text-anchor="{anchor}">{escape(label)}</text>')
    if top > 0:
        largest = num(top) if top % 1 else count(top)
        parts.append(f'<text class="top" x="{width}" y="9" text-anchor="end">{largest}{escape(unit)}</text>')
    rows = "".join(
        f"<tr><th scope=row>{escape(bar.label)}<td>{num(bar.value, 4) if bar.value % 1 else count(bar.value)}{escape(unit)}"
        for bar in bars
    )
    return figure(title, desc, "".join(parts), width, height, f"<table><tbody>{rows}</table>")


def _height(value: float, top: float, log: bool) -> float:
    if top <= 0 or value <= 0:
        return 0.0
    return math.log1p(value) / math.log1p(top) if log else value / top


class Curve(NamedTuple):
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, curve: Curve, *, desc: str, width: int = 300, height: int = 110) -> Markup:
    """A line over steps, on its own scale from the smallest to the largest value (the first tenth may run off the top)."""
    points = [(x, y) for x, y in curve.points if math.isfinite(y)]
    if len(points) < 2:
        return Markup('<p class="quiet">{}: nothing to draw yet.</p>').format(title)
    settled = [y for _, y in points[len(points) // 20 :]]
    low, high = min(settled), max(settled)
    if high == low:
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    first, last = points[0][0], points[-1][0]
    left, base = 36, height - 16
    path = []
    for x, y in _thinned(points, 240):
        at = left + (width - left) * (x - first) / (last - first or 1)
        path.append(f"{at:.1f},{base - (base - 14) * min(1.04, (y - low) / (high - low)):.1f}")
    grid = "".join(f'<line class="grid" x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>' for y in (14, (14 + base) / 2))
    body = (
        f'{grid}<line class="axis" x1="{left}" x2="{width}" y1="{base}" y2="{base}"/>'
        f'<polyline class="line" points="{" ".join(path)}"/>'
        f'<text x="{left - 5}" y="17" text-anchor="end">{num(high)}</text>'
        f'<text x="{left - 5}" y="{base + 3}" text-anchor="end">{num(low)}</text>'
        f'<text x="{left}" y="{height - 4}">{count(first)}</text>'
        f'<text x="{width}" y="{height - 4}" text-anchor="end">step {count(last)}</text>'
        f'<text class="now" x="{width}" y="9" text-anchor="end">now {num(points[-1][1])}</text>'
    )
    rows = "".join(f"<tr><th scope=row>{count(x)}<td>{num(y, 4)}" for x, y in _thinned(points, 12))
    return figure(title, desc, body, width, height, f"<table><tbody>{rows}</table>")


class Spot(NamedTuple):
    """A point of a scatter plot."""

    x: float
    y: float
    label: str
    link: str | None = None
    low: float | None = None
    high: float | None = None
    """Bounds of `y`, drawn as a line."""
    group: int = 0
    """Only points of one group are compared with each other."""


class Series(NamedTuple):
    """Points of one kind: a shape and a colour, and a line in each group through those that no other beats."""

    name: str
    mark: int
    spots: Sequence[Spot]


MARKS = (
    "M-4,0A4,4 0 1 1 4,0A4,4 0 1 1 -4,0Z",
    "M-3.6,-3.6H3.6V3.6H-3.6Z",
    "M0,-4.9L4.5,3.4H-4.5Z",
    "M0,-5.2L5.2,0L0,5.2L-5.2,0Z",
    "M0,4.9L4.5,-3.4H-4.5Z",
    "M-1.5,-4.6H1.5V-1.5H4.6V1.5H1.5V4.6H-1.5V1.5H-4.6V-1.5H-1.5Z",
)
"""Circle, square, triangle, diamond, triangle on its tip, cross: told apart without their colours."""


def scatter(
    title: str, series: Sequence[Series], *, desc: str, better: str, share: bool = True, width: int = 480, height: int = 280
) -> Markup:
    """Points over a logarithmic x; for each series a line through its frontier, where `better` (`low` or `high`) is y."""
    every = [spot for one in series for spot in one.spots if spot.x > 0 and math.isfinite(spot.y)]
    if not every:
        return Markup(
            '<figure class="scatter"><figcaption>{}</figcaption><p class="quiet">Nothing to draw yet.</p></figure>'
        ).format(title)
    said = percent if share else num
    left, right, top, base = 42, width - 12, 12, height - 30
    x0, x1 = (math.log(min(s.x for s in every)), math.log(max(s.x for s in every)))
    pad = 0.06 * (x1 - x0) or 0.3
    x0, x1 = x0 - pad, x1 + pad
    ends = [v for s in every for v in (s.y, s.low, s.high) if v is not None and math.isfinite(v)]
    steps = round_steps(min(ends), max(ends))
    y0, y1 = steps[0], steps[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * (math.log(x) - x0) / (x1 - x0), base - (base - top) * (y - y0) / (y1 - y0)

    parts = []
    for y in steps:
        level_y = at(every[0].x, y)[1]
        parts.append(
            f'<line class="{"axis" if y == y0 else "grid"}" x1="{left}" x2="{right}" y1="{level_y:.1f}" y2="{level_y:.1f}"/>'
            f'<text x="{left - 5}" y="{level_y + 3:.1f}" text-anchor="end">{tick(y, share)}</text>'
        )
    for x in _log_ticks(math.exp(x0), math.exp(x1)):
        across = at(x, y0)[0]
        parts.append(
            f'<line class="grid" x1="{across:.1f}" x2="{across:.1f}" y1="{top}" y2="{base}"/>'
            f'<text x="{across:.1f}" y="{base + 13}" text-anchor="middle">{tick(x, False)}</text>'
        )
    parts.append(f'<text x="{right}" y="{height - 4}" text-anchor="end">L0, features active per token (log scale)</text>')
    for one in series:
        spots = [spot for spot in one.spots if spot.x > 0 and math.isfinite(spot.y)]
        parts.append(f'<g class="s{one.mark}">')
        for group in sorted({spot.group for spot in spots}):
            edge = frontier([spot for spot in spots if spot.group == group], better)
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(spot.x, spot.y) for spot in edge))
            parts.append(f'<polyline class="edge" points="{path}"/>')
        parts += [_spot(spot, one, at, said) for spot in spots]
        parts.append("</g>")
    rows = "".join(
        f"<tr><th scope=row>{escape(spot.label)}<td>{num(spot.x)}<td>{said(spot.y)}{_bounds(spot, said)}"
        for one in series
        for spot in sorted(one.spots)
    )
    table = f"<table><thead><tr><th>run<th>L0<th>{escape(title)}</thead><tbody>{rows}</table>"
    return figure(title, desc, "".join(parts), width, height, table, kind="scatter")


def _spot(spot: Spot, series: Series, at: Callable[[float, float], tuple[float, float]], said: Callable[[float], str]) -> str:
    x, y = at(spot.x, spot.y)
    text = escape(f"{spot.label}: L0 {num(spot.x)}, {said(spot.y)}{_bounds(spot, said)}")
    line = ""
    if spot.low is not None and spot.high is not None and math.isfinite(spot.low) and math.isfinite(spot.high):
        ends = (at(spot.x, bound)[1] for bound in (spot.low, spot.high))
        line = '<line class="bounds" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>'.format(x, *ends)
    mark = f'<title>{text}</title>{line}<path class="mark" d="{MARKS[series.mark]}" transform="translate({x:.1f} {y:.1f})"/>'
    return f'<a href="{escape(spot.link)}">{mark}</a>' if spot.link else f"<g>{mark}</g>"


def _bounds(spot: Spot, said: Callable[[float], str]) -> str:
    return "" if spot.low is None or spot.high is None else f" ({said(spot.low)} to {said(spot.high)})"


def frontier(spots: Sequence[Spot], better: str) -> list[Spot]:
    """Those that no other point of fewer or as many features beats, from left to right."""
    sign = 1.0 if better == "low" else -1.0
    kept: list[Spot] = []
    for spot in sorted(spots, key=lambda spot: (spot.x, sign * spot.y)):
        if not kept or sign * spot.y < sign * kept[-1].y:
            kept.append(spot)
    return kept


def marks_key(series: Sequence[Series]) -> Markup:
    """Which shape is which."""
    items = "".join(
        f'<span class="s{one.mark}"><svg class="mark-key" aria-hidden="true" viewBox="-7 -7 14 14" width="14" height="14">'
        f'<path class="mark" d="{MARKS[one.mark]}"/></svg>{escape(one.name)}</span>'
        for one in series
    )
    return Markup(f'<p class="marks">{items}</p>')  # noqa: S704 - names are escaped here


def round_steps(low: float, high: float) -> list[float]:
    """Round numbers, three to seven of them, that hold low and high between them."""
    if high <= low:
        low, high = low - 0.05 * abs(low or 1), high + 0.05 * abs(high or 1)
    size = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(size * m for m in (1, 2, 5, 10, 20) if (high - low) / (size * m) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def tick(value: float, share: bool) -> str:
    """A round number without the zeros that only a measured one needs."""
    text = f"{round(100 * value if share else value, 9):.6g}".replace("-", "−")
    return f"{text}{NARROW}%" if share else text


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20 ... between low and high; powers of two where these are fewer than two."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    if len(ticks) >= 2:
        return ticks
    span = math.log2(high / low)
    return [float(f"{low * 2 ** (span * part):.2g}") for part in (0.15, 0.5, 0.85)]


def _thinned(points: Sequence[tuple[float, float]], n: int) -> Sequence[tuple[float, float]]:
    if len(points) <= n:
        return points
    return [points[round(i * (len(points) - 1) / (n - 1))] for i in range(n)]


class Cell(NamedTuple):
    """A cell of the layer x head map."""

    layer: int
    head: int
    value: int
    link: str


def head_map(title: str, cells: Sequence[Cell], n_layers: int, n_heads: int, *, desc: str) -> Markup:
    """Layers from left to right, heads from top to bottom; a cell is coloured by its value, and empty where nothing was read."""
    size, left, top = 22, 26, 4
    width, height = left + size * n_layers, top + size * n_heads + 16
    highest = max((cell.value for cell in cells), default=0)
    parts = [
        f'<text x="{left - 6}" y="{top + size * head + 15}" text-anchor="end">{head}</text>'
        for head in range(n_heads)
        if n_heads <= 16 or head % 4 == 0
    ]
    parts += [
        f'<text x="{left + size * layer + size / 2}" y="{height - 3}" text-anchor="middle">{layer}</text>'
        for layer in range(n_layers)
        if n_layers <= 16 or layer % 2 == 0
    ]
    side = f'width="{size - 2}" height="{size - 2}" rx="2"'
    parts += [
        f'<rect class="void" x="{left + size * layer + 1}" y="{top + size * head + 1}" {side}/>'
        for layer in range(n_layers)
        for head in range(n_heads)
    ]
    for cell in cells:
        text = f"layer {cell.layer}, head {cell.head}: leads {count(cell.value)} features"
        x, y = left + size * cell.layer + 1, top + size * cell.head + 1
        parts.append(
            f'<a href="{escape(cell.link)}"><title>{text}</title><rect class="c{level(cell.value, highest)}" '
            f'x="{x}" y="{y}" {side}/></a>'
        )
    rows = "".join(
        f'<tr><th scope=row><a href="{escape(cell.link)}">layer {cell.layer} head {cell.head}</a><td>{count(cell.value)}'
        for cell in cells
    )
    return figure(title, desc, "".join(parts), width, height, f"<table><tbody>{rows}</table>", kind="map")


def map_key(cells: Sequence[Cell]) -> Markup:
    """The colours of a map from none to most."""
    steps = "".join(f'<rect class="c{at}" x="{10 * i}" width="9" height="10"/>' for i, at in enumerate((1, 4, 8, 12, 15)))
    most = count(max((cell.value for cell in cells), default=0))
    return Markup(  # noqa: S704 - numbers only
        f'0 <svg class="bar map-key" aria-hidden="true" viewBox="0 0 49 10" width="49" height="10">{steps}</svg> {most}'
    )


def figure(title: str, desc: str, body: str, width: int, height: int, twin: str, kind: str = "chart") -> Markup:
    """A chart with its title and description, and its numbers as text beside it. `body` and `twin` are escaped by their maker."""
    return Markup(  # noqa: S704 - title and desc are escaped here, the rest by its maker
        f'<figure class="{kind}"><figcaption>{escape(title)}</figcaption>'
        f'<svg role="img" viewBox="0 0 {width} {height}" preserveAspectRatio="xMidYMid meet">'
        f"<title>{escape(title)}</title><desc>{escape(desc)}</desc>{body}</svg>"
        f"<details><summary>as text</summary><p>{escape(desc)}</p>{twin}</details></figure>"
    )


def histogram_bars(edges: Sequence[float], counts: Sequence[int]) -> list[Bar]:
    """The bars of a histogram, each labelled with its range."""
    return [Bar(f"{num(edges[i])} to {num(edges[i + 1])}", n) for i, n in enumerate(counts)]


def edge_ticks(edges: Sequence[float]) -> list[tuple[float, str]]:
    """Labels for the first, middle and last edge of a histogram."""
    last = len(edges) - 1
    return [(at, num(edges[at], 2)) for at in sorted({0, last // 2, last})] if last > 0 else []


EVIDENCE = {
    "induction": "from tokens that followed an earlier copy of the destination",
    "previous": "from the token right before",
    "current": "from the destination itself",
    "duplicate": "from earlier copies of the destination",
    "near": "from at most 10 tokens back",
    "far": "from more than 32 tokens back",
    "top_share": "from the one strongest source",
    "row_start": "of everything, row starts included, from row starts",
    "next": "of the strongest examples read one and the same token by induction",
    "next_bands": "of the weaker examples have it after an earlier copy of the destination",
    "next_follows": "of the strongest examples have it as the next token of the text",
    "positional": "of all activation would have to move if the position in the row did not matter",
}
"""What the detectors' shares of positive DFA mean, in words."""
OTHER_EVIDENCE = {
    "distance": "tokens back on average",
    "source_logit": "standard deviations by which it lifts the strongest source's own token",
    "next_logit": "standard deviations by which it lifts the token that is next by induction",
    "examples": "examples looked at",
}


def evidence_lines(evidence: Mapping[str, float]) -> list[tuple[str, str]]:
    """The numbers behind a family as (how much, of what): shares first, the largest first, with what chance would give."""
    lines = []
    for name in sorted(EVIDENCE.keys() & evidence.keys(), key=lambda name: -evidence[name]):
        chance = evidence.get(f"{name}_chance")
        by_chance = "" if chance is None else f"; by chance {percent(chance, 2)}"
        lines.append((percent(evidence[name], 2), EVIDENCE[name] + by_chance))
    lines += [(num(evidence[name], 2), words) for name, words in OTHER_EVIDENCE.items() if name in evidence]
    known = EVIDENCE.keys() | OTHER_EVIDENCE.keys() | {f"{name}_chance" for name in EVIDENCE}
    return lines + [(str(value), name.replace("_", " ")) for name, value in evidence.items() if name not in known]


CURVES = {
    "loss": ("Loss", "Mean squared error with the auxiliary loss, by training step."),
    "fvu": ("Unexplained variance", "Fraction of the variance of z that the SAE does not explain, by training step."),
    "l0": ("L0", "Mean number of active features per token, by training step."),
    "dead": ("Dead features", "Share of features that have not fired for long, by training step."),
}


class Step(Protocol):
    """A point of a job's curves."""

    @property
    def step(self) -> int: ...
    @property
    def values(self) -> Mapping[str, float]: ...


def curves(points: Sequence[Step]) -> list[tuple[str, str, Curve]]:
    """The curves that the points hold, as (title, description, line), in the order of `CURVES`."""
    found = []
    for name, (title, words) in CURVES.items():
        line = [(point.step, float(point.values[name])) for point in points if name in point.values]
        if line:
            found.append((title, words, Curve(name, line)))
    return found


def clock(at: datetime) -> str:
    """The time of day in UTC."""
    return f"{at.replace(tzinfo=at.tzinfo or UTC).astimezone(UTC):%H:%M:%S}"


class HasCount(Protocol):
    """So many features have `key` in common."""

    @property
    def key(self) -> int | str: ...
    @property
    def features(self) -> int: ...


class HasRange(Protocol):
    """So many values lie between `low` and `high`."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def count(self) -> int: ...


def head_bars(counts: Sequence[HasCount], sae: str) -> list[Bar]:
    """A bar per head that leads to the features it leads."""
    return [Bar(str(entry.key), entry.features, f"{sae}?head={entry.key}&leads=true#features") for entry in counts]


def plain_bars(values: Sequence[float | None]) -> list[Bar]:
    """A bar per head; none stands where the value is not known."""
    return [Bar(str(head), value) for head, value in enumerate(values) if value is not None]


def position_bars(parts: Sequence[Mapping[str, Any]], name: str) -> list[Bar]:
    """A bar per group of positions in the row, for the measure `name`."""
    return [Bar(_positions(part), part[name]) for part in parts if part.get(name) is not None]


class HasFirings(Protocol):
    """So many firings on so many tokens, at the positions `low` to `high`."""

    @property
    def low(self) -> int: ...
    @property
    def high(self) -> int: ...
    @property
    def firings(self) -> int: ...
    @property
    def tokens(self) -> int: ...


def rate_bars(buckets: Sequence[HasFirings]) -> list[Bar]:
    """A bar per group of positions: percent of its tokens that fire."""
    return [Bar(_range(one.low, one.high), 100 * one.firings / one.tokens) for one in buckets if one.tokens]


def distance_bars(sample: Mapping[str, Any]) -> list[Bar]:
    """A bar per group of distances: percent of |DFA| that comes from there."""
    return [Bar(_range(low, beyond - 1), 100 * share) for low, beyond, share in sample["distance"]]


def few_ticks(edges: Sequence[float], n: int = 5) -> list[tuple[float, str]]:
    """About `n` labels along the edges of bars of equal width."""
    step = max(1, (len(edges) - 1) // (n - 1))
    return [(float(at), num(edges[at], 2)) for at in range(0, len(edges), step)]


def _positions(part: Mapping[str, Any]) -> str:
    return _range(part["low"], part["high"])


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}–{high}"


class Measure(NamedTuple):
    """A number of an evaluation, as a page shows it."""

    name: str
    value: str
    words: str
    """What it means."""


MEASURES: tuple[tuple[str, str, Callable[[float | None], str], str], ...] = (
    ("cosine", "cosine", num, "Mean cosine of z and its reconstruction: 1 if all directions are right."),
    ("mse", "squared error", num, "Mean of |z − ẑ|² over tokens: summed, not averaged, over the coordinates of z."),
    ("norm_ratio", "|ẑ| / |z|", num, "Mean length of the reconstruction over that of z."),
    (
        "gamma", "gamma", num,
        "Σ|ẑ|² / Σ ẑ·z: the factor by which ẑ would have to be divided to fit best. Below 1 the SAE shrinks what it rebuilds.",
    ),
    ("gamma_centred", "gamma, centred", num, "The same with the mean of z taken from both: b_dec gives the mean for nothing."),
    ("l1", "L1", num, "Sum of a token's activations, on average."),
    ("dense_1", "on > 1 %", percent, "Share of features that fire on more than 1 % of tokens."),
    ("dense_10", "on > 10 %", percent, "Share of features that fire on more than 10 % of tokens: seldom readable ones."),
    (
        "decoder_cosine", "decoder neighbour", num,
        "Mean over live features of the cosine with the nearest other decoder direction: high where features come twice.",
    ),
    ("encoder_cosine", "encoder neighbour", num, "The same of encoder directions."),
    (
        "encoder_decoder_cosine", "encoder · decoder", num,
        "Mean over live features of the cosine of their encoder and decoder direction: low where reading and writing differ.",
    ),
)  # fmt: skip
"""Measures of reconstruction that have no sentence of their own: key, name, form, meaning."""


def fit_measures(fit: Mapping[str, Any]) -> list[Measure]:
    """Those of `MEASURES` that were measured, then the density of the median feature."""
    found = [Measure(name, form(fit[key]), words) for key, name, form, words in MEASURES if fit.get(key) is not None]
    middle = next((q["density"] for q in fit.get("density_quantiles") or [] if q["share"] == 0.5), None)
    if middle is not None:
        spread = ", ".join(f"{percent(q['share'])} of features up to {percent(q['density'])}" for q in fit["density_quantiles"])
        found.append(Measure("median density", percent(middle), f"Half the features fire on fewer tokens. {spread}."))
    return found


def density_bars(bins: Sequence[HasRange]) -> list[Bar]:
    """The bars of the density histogram."""
    return [Bar(f"{percent(b.low)} to {percent(b.high)} of tokens", b.count) for b in bins]


def density_ticks(bins: Sequence[HasRange]) -> list[tuple[float, str]]:
    """A label at every second power of ten."""
    return [(at, percent(bins[at].low if at < len(bins) else bins[-1].high, 1)) for at in range(0, len(bins) + 1, 6)]
