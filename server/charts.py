"""Every chart, as SVG with a title, a description, and its numbers as text beside it. As `rendering`: escaped, no styles.

Colours come from classes: `c1`..`c15` how much there is, `s0`..`s5` series, `pos` and `neg` signs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from markupsafe import Markup, escape

from server.figures import Data, keep
from server.markup import escaped, made
from server.rendering import NARROW, count, level, num, percent

# --- what all have ---

LETTER = 5.7
"""Pixels of a digit in a chart's labels, about."""


def figure(
    title: str, desc: str, body: str, width: int, height: int, twin: str, kind: str = "chart", data: Data | None = None
) -> Markup:
    """A chart with its title and description, its numbers as text beside it, and its files. `body` and `twin` are escaped by
    their maker; `data` has the numbers in full."""
    files = keep(title, desc, body, width, height, data)
    role = "group" if "<a " in body else "img"  # an image has nothing in it that could be reached
    return made(
        f'<figure class="{kind}"><figcaption>{escape(title)}</figcaption>'
        f'<svg role="{role}" viewBox="0 0 {width} {height}" preserveAspectRatio="xMidYMid meet">'
        f"<title>{escape(title)}</title><desc>{escape(desc)}</desc>{body}</svg>"
        f"<details><summary>as text</summary><p>{escape(desc)}</p>{files}{twin}</details></figure>"
    )


def _bounds(low: float | None, high: float | None, said: Callable[[float], str]) -> str:
    return "" if low is None or high is None else f" ({said(low)} to {said(high)})"


def _empty(title: str) -> Markup:
    return Markup('<figure class="scatter"><figcaption>{}</figcaption><p class="quiet">Nothing to draw yet.</p></figure>').format(
        title
    )


# --- bars ---


def share_bar(value: float, top: float, width: int = 90) -> Markup:
    """A bar from the left: `value` of `top`. The number stands beside it, so this says nothing to a screen reader."""
    length = width * min(1.0, max(0.0, value / top)) if top > 0 and math.isfinite(value) else 0.0
    return made(
        f'<svg class="bar" aria-hidden="true" viewBox="0 0 {width} 10" width="{width}" height="10">'
        f'<rect class="track" width="{width}" height="10"/><rect class="share" width="{length:.1f}" height="10"/></svg>'
    )


def signed_bar(value: float, spread: float, top: float, width: int = 90) -> Markup:
    """A bar from the middle, right for positive, left for negative, with a line for the spread on both sides of its end."""
    if not math.isfinite(value):  # not known: nothing is drawn, and the number beside it is a dash
        value, spread = 0.0, 0.0
    middle = width / 2
    per = 0.0 if top <= 0 else middle / top
    end = middle + per * value
    left, right = (max(0.0, min(float(width), x)) for x in (end - per * spread, end + per * spread))
    whisker = f'<line class="spread" x1="{left:.1f}" x2="{right:.1f}" y1="5" y2="5"/>' if spread else ""
    return made(
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
    """Vertical bars. `ticks` are (edge between bars, label); without them the bars' own labels are written, as many as fit."""
    names, values = [bar.label for bar in bars], [bar.value for bar in bars]
    top = max(values, default=0.0)
    full = (height - 28) / (math.log1p(top) if log else top) if top > 0 else 0.0
    scaled = [full * (math.log1p(value) if log else value) if value > 0 else 0.0 for value in values]
    step = width / max(1, len(bars))
    base = height - 16
    parts = [f'<line class="axis" x1="0" x2="{width}" y1="{base}" y2="{base}"/>']
    linked = any(bar.link for bar in bars)
    if linked:
        for i, (bar, size) in enumerate(zip(bars, scaled, strict=True)):
            text = escape(f"{bar.label}: {num(bar.value) if bar.value % 1 else count(bar.value)}{unit}")
            rects = (
                f'<title>{text}</title><rect class="hit" x="{i * step:.1f}" y="0" width="{step:.1f}" height="{base}"/>'
                f'<rect class="{bar.kind}" x="{i * step + 0.75:.1f}" y="{base - size:.1f}" '
                f'width="{max(0.5, step - 1.5):.1f}" height="{size:.1f}"/>'
            )
            parts.append(f'<a href="{escape(bar.link)}">{rects}</a>' if bar.link else f"<g>{rects}</g>")
    else:
        # One path: the numbers stand once, in the table, from which a script says the bar that is pointed at.
        across = f"h{max(0.5, step - 1.5):.1f}v"
        drawn: dict[str, list[str]] = {}
        for left, bar, size in zip(_lefts(len(bars), width), bars, scaled, strict=True):
            if size > 0:
                high = f"{size:.1f}"
                drawn.setdefault(bar.kind, []).append(f"M{left} {base}v-{high}{across}{high}")
        parts += [f'<path class="{kind}" d="{"".join(path)}"/>' for kind, path in drawn.items()]
    every = math.ceil((LETTER * max(map(len, names), default=0) + 3) / step)
    labels = ticks or ([(i + 0.5, bar.label) for i, bar in enumerate(bars)][::every] if len(bars) <= width / 18 else [])
    for at, label in labels:
        x = at * step
        anchor = "start" if x < 8 else "end" if x > width - 8 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{height - 4}" text-anchor="{anchor}">{escape(label)}</text>')
    if top > 0:
        largest = num(top) if top % 1 else count(top)
        parts.append(f'<text class="top" x="{width}" y="9" text-anchor="end">{largest}{escape(unit)}</text>')
    said = escape(unit)
    rows = "".join(
        f"<tr><th scope=row>{label}<td>{num(value, 4) if value % 1 else count(value)}{said}"
        for label, value in zip(escaped(names), values, strict=True)
    )
    data = Data(("what", f"value{unit}"), list(zip(names, values, strict=True)))
    kind = "chart" if linked else "chart bars"
    return figure(title, desc, "".join(parts), width, height, f"<table><tbody>{rows}</table>", kind, data=data)


@lru_cache(maxsize=64)
def _lefts(n: int, width: int) -> tuple[str, ...]:
    """Where each of `n` bars begins."""
    return tuple(f"{i * width / n + 0.75:.1f}" for i in range(n))


# --- a line over steps ---


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
    data = Data(("step", curve.name), curve.points)
    return figure(title, desc, body, width, height, f"<table><tbody>{rows}</table>", data=data)


# --- points ---


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
    "M-4.7,0L-2.35,-4.1H2.35L4.7,0L2.35,4.1H-2.35Z",
)
"""Circle, square, triangle, diamond, triangle on its tip, cross, hexagon: told apart without their colours."""


def scatter(
    title: str, series: Sequence[Series], *, desc: str, better: str, share: bool = True, width: int = 480, height: int = 280
) -> Markup:
    """Points over a logarithmic x; for each series a line through its frontier, where `better` (`low` or `high`) is y."""
    every = [spot for one in series for spot in one.spots if spot.x > 0 and math.isfinite(spot.y)]
    if not every:
        return _empty(title)
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
        f"<tr><th scope=row>{escape(spot.label)}<td>{num(spot.x)}<td>{said(spot.y)}{_bounds(spot.low, spot.high, said)}"
        for one in series
        for spot in sorted(one.spots)
    )
    table = f"<table><thead><tr><th>run<th>L0<th>{escape(title)}</thead><tbody>{rows}</table>"
    points = [(one.name, spot.label, spot.x, spot.y, spot.low, spot.high) for one in series for spot in sorted(one.spots)]
    data = Data(("series", "run", "l0", "value", "low", "high"), points)
    return figure(title, desc, "".join(parts), width, height, table, kind="scatter", data=data)


def _spot(spot: Spot, series: Series, at: Callable[[float, float], tuple[float, float]], said: Callable[[float], str]) -> str:
    x, y = at(spot.x, spot.y)
    text = escape(f"{spot.label}: L0 {num(spot.x)}, {said(spot.y)}{_bounds(spot.low, spot.high, said)}")
    line = ""
    if spot.low is not None and spot.high is not None and math.isfinite(spot.low) and math.isfinite(spot.high):
        ends = (at(spot.x, bound)[1] for bound in (spot.low, spot.high))
        line = '<line class="bounds" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>'.format(x, *ends)
    mark = f'<title>{text}</title>{line}<path class="mark" d="{MARKS[series.mark]}" transform="translate({x:.1f} {y:.1f})"/>'
    return f'<a href="{escape(spot.link)}">{mark}</a>' if spot.link else f"<g>{mark}</g>"


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
    return made(f'<p class="marks">{items}</p>')


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


def histogram_bars(edges: Sequence[float], counts: Sequence[int]) -> list[Bar]:
    """The bars of a histogram, each labelled with its range."""
    said = [num(edge) for edge in edges]
    return [Bar(f"{low} to {high}", n) for low, high, n in zip(said, said[1:], counts, strict=False)]


def edge_ticks(edges: Sequence[float]) -> list[tuple[float, str]]:
    """Labels for the first, middle and last edge of a histogram."""
    last = len(edges) - 1
    return [(at, num(edges[at], 2)) for at in sorted({0, last // 2, last})] if last > 0 else []


def few_ticks(edges: Sequence[float], n: int = 5) -> list[tuple[float, str]]:
    """About `n` labels along the edges of bars of equal width."""
    step = max(1, (len(edges) - 1) // (n - 1))
    return [(float(at), num(edges[at], 2)) for at in range(0, len(edges), step)]


# --- lines ---


class Point(NamedTuple):
    """A point of a line, with the bounds of its y where they are known."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Line(NamedTuple):
    """A line with a mark of its own; points are in the order of x."""

    name: str
    mark: int
    points: Sequence[Point]


def lines(
    title: str,
    drawn: Sequence[Line],
    *,
    desc: str,
    across: str,
    share: bool = False,
    marked: bool = True,
    floor: float | None = 0.0,
    width: int = 480,
    height: int = 250,
) -> Markup:
    """Lines over a linear x called `across`; bounds as a band. `marked` puts a mark on every point, for lines of few points;
    `floor` is a value that the y axis must show."""
    every = [point for line in drawn for point in line.points]
    if not every:
        return _empty(title)
    said = percent if share else num
    left, right, top, base = 42, width - 12, 12, height - 30
    ends = [v for p in every for v in (p.y, p.low, p.high, floor) if v is not None]
    steps = round_steps(min(ends), max(ends))
    x0, x1 = min(p.x for p in every), max(p.x for p in every)
    pad = 0.04 * (x1 - x0) or 0.5

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (right - left) * (x - x0 + pad) / (x1 - x0 + 2 * pad),
            base - (base - top) * (y - steps[0]) / (steps[-1] - steps[0]),
        )

    parts = []
    for y in steps:
        height_of = at(x0, y)[1]
        parts.append(
            f'<line class="{"axis" if y == steps[0] or y == 0 else "grid"}" x1="{left}" x2="{right}" y1="{height_of:.1f}" '
            f'y2="{height_of:.1f}"/><text x="{left - 5}" y="{height_of + 3:.1f}" text-anchor="end">{tick(y, share)}</text>'
        )
    parts += [f'<text x="{at(x, 0)[0]:.1f}" y="{base + 13}" text-anchor="middle">{tick(x, False)}</text>' for x in _ticks(x0, x1)]
    parts.append(f'<text x="{right}" y="{height - 4}" text-anchor="end">{escape(across)}</text>')
    parts += [f'<g class="s{line.mark}">{"".join(_line(line, at, said, marked))}</g>' for line in drawn]
    rows = "".join(
        f"<tr><th scope=row>{escape(line.name)}<td>{num(point.x)}<td>{said(point.y)}{_bounds(point.low, point.high, said)}"
        for line in drawn
        for point in line.points
    )
    table = f"<table><thead><tr><th>line<th>{escape(across)}<th>{escape(title)}</thead><tbody>{rows}</table>"
    data = Data(("line", across, "value", "low", "high"), [(line.name, *point) for line in drawn for point in line.points])
    return figure(title, desc, "".join(parts), width, height, table, kind="scatter", data=data)


class Dot(NamedTuple):
    """A value of a row in a dot plot, with its bounds where they are known."""

    row: str
    value: float
    low: float | None = None
    high: float | None = None


class Dots(NamedTuple):
    """Values of one kind, with a mark of their own."""

    name: str
    mark: int
    points: Sequence[Dot]


def dots(
    title: str, drawn: Sequence[Dots], *, desc: str, across: str, share: bool = False, at: float = 0.0, width: int = 480
) -> Markup:
    """Rows with a dot for each kind over a linear axis called `across`, bounds as lines; a line stands at the value `at`."""
    rows = list(dict.fromkeys(dot.row for kind in drawn for dot in kind.points))
    if not rows:
        return _empty(title)
    said, each = percent if share else num, 13 + 5 * len(drawn)
    left = min(0.5 * width, LETTER * max(map(len, rows)) + 14)
    ends = [v for kind in drawn for dot in kind.points for v in (dot.value, dot.low, dot.high, at, 0.0) if v is not None]
    steps, height = round_steps(min(ends), max(ends)), each * len(rows) + 36
    right, base = width - 14, height - 28

    def x_of(value: float) -> float:
        return left + (right - left) * (value - steps[0]) / (steps[-1] - steps[0])

    parts = [
        f'<path class="{"axis" if value in (0, at) else "grid"}" d="M{x_of(value):.1f} 4V{base}"/>'
        f'<text x="{x_of(value):.1f}" y="{base + 12}" text-anchor="middle">{tick(value, share)}</text>'
        for value in steps
    ]
    parts.append(f'<text x="{right}" y="{height - 3}" text-anchor="end">{escape(across)}</text>')
    places = {row: 4 + each * (i + 0.5) for i, row in enumerate(rows)}
    parts += [f'<text x="{left - 8:.1f}" y="{y + 3:.1f}" text-anchor="end">{escape(row)}</text>' for row, y in places.items()]
    for i, kind in enumerate(drawn):
        off = 6 * (i - (len(drawn) - 1) / 2)
        marks = []
        for dot in kind.points:
            x, y = x_of(dot.value), places[dot.row] + off
            if dot.low is not None and dot.high is not None:
                marks.append(f'<path class="edge" d="M{x_of(dot.low):.1f} {y:.1f}H{x_of(dot.high):.1f}"/>')
            label = escape(f"{dot.row}, {kind.name}: {said(dot.value)}{_bounds(dot.low, dot.high, said)}")
            marks.append(
                f'<path class="mark" d="{MARKS[kind.mark]}" transform="translate({x:.1f} {y:.1f})"><title>{label}</title></path>'
            )
        parts.append(f'<g class="s{kind.mark}">{"".join(marks)}</g>')
    every = [(dot.row, kind.name, dot.value, dot.low, dot.high) for kind in drawn for dot in kind.points]
    twin = "".join(
        f"<tr><th scope=row>{escape(row)}<td>{escape(name)}<td>{said(value)}{_bounds(low, high, said)}"
        for row, name, value, low, high in every
    )
    table = f"<table><thead><tr><th>what<th>of<th>{escape(across)}</thead><tbody>{twin}</table>"
    data = Data(("what", "of", "value", "low", "high"), every)
    return figure(title, desc, "".join(parts), width, height, table, kind="scatter", data=data)


def _line(
    line: Line, at: Callable[[float, float], tuple[float, float]], said: Callable[[float], str], marked: bool
) -> Iterator[str]:
    bounded = [(p.x, p.low, p.high) for p in line.points if p.low is not None and p.high is not None]
    if len(bounded) > 1:
        around = [at(x, low) for x, low, _ in bounded] + [at(x, high) for x, _, high in reversed(bounded)]
        yield f'<polygon class="band" points="{_path(around)}"/>'
    yield f'<polyline class="edge" points="{_path(at(p.x, p.y) for p in line.points)}"/>'
    for point in line.points:
        x, y = at(point.x, point.y)
        shape = (
            f'<path class="mark" d="{MARKS[line.mark]}" transform="translate({x:.1f} {y:.1f})"/>'
            if marked
            else f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        )
        text = escape(f"{line.name}, {num(point.x)}: {said(point.y)}{_bounds(point.low, point.high, said)}")
        yield f"<g><title>{text}</title>{shape}</g>"


def _path(points: "Iterator[tuple[float, float]] | list[tuple[float, float]]") -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the ends, all whole ones where these are few."""
    if low == int(low) and high == int(high) and high - low <= 12:
        return [float(x) for x in range(int(low), int(high) + 1)]
    return [x for x in round_steps(low, high) if low <= x <= high]


def back_to_back(
    title: str,
    edges: Sequence[float],
    above: Sequence[float],
    below: Sequence[float],
    *,
    names: tuple[str, str],
    across: str,
    desc: str,
    log: bool = False,
    width: int = 480,
    height: int = 230,
) -> Markup:
    """Two histograms on the same bars, one upward and one downward, to one scale."""
    if not above:
        return _empty(title)
    left, right, top, base = 42, width - 12, 16, height - 30
    middle, room = (top + base) / 2, (base - top) / 2 - 2
    largest = max(*above, *below)
    step = (right - left) / len(above)

    def size(value: float) -> float:
        if value <= 0 or largest <= 0:
            return 0.0
        return room * (math.log1p(value) / math.log1p(largest) if log else value / largest)

    def said(value: float) -> str:
        return num(value) if value % 1 else count(value)

    parts = []
    for i, (up, down) in enumerate(zip(above, below, strict=True)):
        x, wide = left + i * step, max(0.6, step - 0.5)
        text = escape(f"{num(edges[i])} to {num(edges[i + 1])}: {names[0]} {said(up)}, {names[1]} {said(down)}")
        parts.append(
            f'<g><title>{text}</title><rect class="hit" x="{x:.2f}" y="{top}" width="{step:.2f}" height="{base - top}"/>'
            f'<rect class="up" x="{x:.2f}" y="{middle - size(up):.1f}" width="{wide:.2f}" height="{size(up):.1f}"/>'
            f'<rect class="down" x="{x:.2f}" y="{middle:.1f}" width="{wide:.2f}" height="{size(down):.1f}"/></g>'
        )
    parts += [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{left - 5}" y="{y + 3:.1f}" text-anchor="end">{num(value, 2) if value % 1 else count(value)}</text>'
        for value in _levels(largest, log)
        for y in (middle - size(value), middle + size(value))
    ]
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{middle}" y2="{middle}"/>')
    for x in [0.0, *(x for x in round_steps(0, edges[-1]) if 0 < x <= edges[-1])]:
        place = left + (right - left) * x / edges[-1]
        parts.append(f'<text x="{place:.1f}" y="{base + 13}" text-anchor="middle">{tick(x, False)}</text>')
    parts.append(f'<text x="{right}" y="{height - 4}" text-anchor="end">{escape(across)}</text>')
    parts.append(
        f'<text x="{left}" y="{height - 4}"><tspan class="up">▲ {escape(names[0])}</tspan>'
        f'<tspan class="down" dx="10">▼ {escape(names[1])}</tspan></text>'
    )
    rows = "".join(
        f"<tr><th scope=row>{num(edges[i])} to {num(edges[i + 1])}<td>{said(up)}<td>{said(down)}"
        for i, (up, down) in enumerate(zip(above, below, strict=True))
        if up or down
    )
    heads = f"<thead><tr><th>{escape(across)}<th>{escape(names[0])}<th>{escape(names[1])}</thead>"
    bars = [(edges[i], edges[i + 1], up, down) for i, (up, down) in enumerate(zip(above, below, strict=True))]
    data = Data(("from", "to", *names), bars)
    table = f"<table>{heads}<tbody>{rows}</table>"
    return figure(title, desc, "".join(parts), width, height, table, kind="scatter two-sided", data=data)


def _levels(largest: float, log: bool) -> list[float]:
    """Values that get a line: powers of ten, or two round ones."""
    if log:
        return [10.0**power for power in range(math.floor(math.log10(max(largest, 1))) + 1)]
    fit = [value for value in round_steps(0, largest) if 0 < value <= largest]
    return sorted({fit[(len(fit) - 1) // 2], fit[-1]}) if fit else []


# --- a map of heads ---


class HeadCell(NamedTuple):
    """A head of a map."""

    layer: int
    head: int
    value: float
    says: tuple[str, ...]
    """What is known of the head, as text: a column of the table each."""
    link: str
    mark: int | None = None
    """Shape drawn on the cell; None draws none."""
    chosen: bool = False


def head_map(
    title: str, cells: Sequence[HeadCell], n_layers: int, n_heads: int, *, columns: Sequence[str], highest: float, desc: str
) -> Markup:
    """Layers from left to right, heads from top to bottom, coloured by value up to `highest`; empty where nothing is known.

    `columns` name what the cells say.
    """
    size, left, top = 22, 26, 4
    # A model of few layers is not drawn larger than one of many.
    width, height = max(left + size * n_layers, 460), top + size * n_heads + 16
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
    known = {(cell.layer, cell.head) for cell in cells}
    parts += [
        f'<rect class="void" x="{left + size * layer + 1}" y="{top + size * head + 1}" {side}/>'
        for layer in range(n_layers)
        for head in range(n_heads)
        if (layer, head) not in known
    ]
    for cell in cells:
        x, y = left + size * cell.layer + 1, top + size * cell.head + 1
        middle = f"translate({x + size / 2 - 1} {y + size / 2 - 1})"
        mark = f'<path class="mark s{cell.mark}" d="{MARKS[cell.mark]}" transform="{middle}"/>' if cell.mark is not None else ""
        text = escape(f"head {cell.layer}.{cell.head}: {', '.join(cell.says)}{', shown' if cell.chosen else ''}")
        chosen = ' class="chosen"' if cell.chosen else ""
        parts.append(
            f'<a href="{escape(cell.link)}"{chosen}><title>{text}</title>'
            f'<rect class="c{level(cell.value, highest)}" x="{x}" y="{y}" {side}/>{mark}</a>'
        )
    rows = "".join(
        f'<tr><th scope=row><a href="{escape(cell.link)}">{cell.layer}.{cell.head}</a>'
        + "".join(f"<td>{escape(said)}" for said in cell.says)
        for cell in sorted(cells, key=lambda cell: -cell.value)
    )
    names = "".join(f"<th>{escape(name)}" for name in columns)
    table = f"<table><thead><tr><th>head{names}</thead><tbody>{rows}</table>"
    data = Data(("layer", "head", "value", *columns), [(cell.layer, cell.head, cell.value, *cell.says) for cell in cells])
    return figure(title, desc, "".join(parts), width, height, table, kind="map", data=data)


def map_key(cells: Sequence[HeadCell]) -> Markup:
    """The colours of a map from none to most."""
    steps = "".join(f'<rect class="c{at}" x="{10 * i}" width="9" height="10"/>' for i, at in enumerate((1, 4, 8, 12, 15)))
    most = count(max((cell.value for cell in cells), default=0))
    return made(f'0 <svg class="bar map-key" aria-hidden="true" viewBox="0 0 49 10" width="49" height="10">{steps}</svg> {most}')
