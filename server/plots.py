"""Plots of studies: lines with bands, histograms back to back, a map of heads by score. As `rendering`: escaped, no styles."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from server.rendering import MARKS, count, figure, level, num, percent, round_steps, tick


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
        f"<tr><th scope=row>{escape(line.name)}<td>{num(point.x)}<td>{said(point.y)}{_bounds(point, said)}"
        for line in drawn
        for point in line.points
    )
    table = f"<table><thead><tr><th>line<th>{escape(across)}<th>{escape(title)}</thead><tbody>{rows}</table>"
    return figure(title, desc, "".join(parts), width, height, table, kind="scatter")


def _empty(title: str) -> Markup:
    return Markup(
        '<figure class="scatter"><figcaption>{}</figcaption><p class="quiet">Nothing to draw.</p></figure>'
    ).format(title)  # fmt: skip


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
        text = escape(f"{line.name}, {num(point.x)}: {said(point.y)}{_bounds(point, said)}")
        yield f"<g><title>{text}</title>{shape}</g>"


def _path(points: "Iterator[tuple[float, float]] | list[tuple[float, float]]") -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _bounds(point: Point, said: Callable[[float], str]) -> str:
    return "" if point.low is None or point.high is None else f" ({said(point.low)} to {said(point.high)})"


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
    return figure(title, desc, "".join(parts), width, height, f"<table>{heads}<tbody>{rows}</table>", kind="scatter two-sided")


def _levels(largest: float, log: bool) -> list[float]:
    """Values that get a line: powers of ten, or two round ones."""
    if log:
        return [10.0**power for power in range(math.floor(math.log10(max(largest, 1))) + 1)]
    fit = [value for value in round_steps(0, largest) if 0 < value <= largest]
    return sorted({fit[(len(fit) - 1) // 2], fit[-1]}) if fit else []


class HeadCell(NamedTuple):
    """A head on the map."""

    layer: int
    head: int
    value: float
    """0 to 1."""
    role: str
    mark: int | None
    """Shape drawn on the cell; None draws none."""
    link: str
    chosen: bool


def heads_map(title: str, cells: Sequence[HeadCell], n_layers: int, n_heads: int, *, desc: str) -> Markup:
    """Layers from left to right, heads from top to bottom, coloured by value, marked by role; empty where none was studied."""
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
        text = escape(f"head {cell.layer}.{cell.head}: {num(cell.value)}, {cell.role}{', shown' if cell.chosen else ''}")
        mark = f'<path class="mark s{cell.mark}" d="{MARKS[cell.mark]}" transform="{middle}"/>' if cell.mark is not None else ""
        parts.append(
            f'<a href="{escape(cell.link)}"{" class=chosen" if cell.chosen else ""}><title>{text}</title>'
            f'<rect class="c{level(cell.value, 1)}" x="{x}" y="{y}" {side}/>{mark}</a>'
        )
    rows = "".join(
        f'<tr><th scope=row><a href="{escape(cell.link)}">{cell.layer}.{cell.head}</a>'
        f"<td>{num(cell.value)}<td>{escape(cell.role)}"
        for cell in sorted(cells, key=lambda cell: -cell.value)
    )
    table = f"<table><thead><tr><th>head<th>best score<th>role</thead><tbody>{rows}</table>"
    return figure(title, desc, "".join(parts), width, height, table, kind="map")
