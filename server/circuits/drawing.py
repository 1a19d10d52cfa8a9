"""A circuit as SVG: positions across, layers up; shapes by kind, sizes by share, colours by sign. As `charts`: a title, a
description, and the numbers as a table beside it. Widths are in the drawing itself, which scrolls where the window is narrow."""

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

from server.charts import MARKS
from server.circuits.asked import LiveCircuit
from server.circuits.view import Drawn, DrawnNode, said
from server.figures import Data, keep
from server.markup import made, visible
from server.rendering import percent

SHAPES = {
    "feature": 0, "MLP": 1, "embedding": 2, "error": 3, "MLP error": 3, "position": 4, "bias": 5, "MLP feature": 6, "logit": 0,
    "attention": 1, "group": 1,
}  # fmt: skip
LEFT, TOP, ROW, PITCH, LETTER = 58, 32, 44, 38, 5.6
MOST_EDGES = 160
NAMES = {
    "feature": "feature",
    "MLP feature": "feature of an MLP",
    "MLP": "MLP",
    "embedding": "embedding",
    "error": "error",
    "attention": "attention without an SAE",
    "bias": "bias",
}


def circuit(
    title: str, answer: LiveCircuit, shown: Drawn, picked: str, link: Callable[[str], str], *, desc: str, has_files: bool
) -> Markup:
    """The drawing; `link` gives the address that picks a node. It has files where its page has an address."""
    columns, rows, places, width, height = _layout(answer, shown)
    parts = [_frame(answer, columns, rows, width, height)]
    near = {picked}
    lines = sorted(shown.edges, key=lambda edge: abs(edge.share))[-MOST_EDGES:]
    for edge in lines:
        (x0, y0), (x1, y1) = places[edge.source], places[edge.target]
        touches = picked in (edge.source, edge.target)
        if touches:
            near |= {edge.source, edge.target}
        wide = 0.5 + 5 * min(1.0, math.sqrt(abs(edge.share)) * 0.9)
        bend = (y0 + y1) / 2
        parts.append(
            f'<path class="way {"up" if edge.effect >= 0 else "down"}{" near" if touches else ""}" stroke-width="{wide:.1f}" '
            f'data-from="{escape(edge.source)}" data-to="{escape(edge.target)}" '
            f'd="M{x0:.1f},{y0 - 6:.1f}C{x0:.1f},{bend:.1f} {x1:.1f},{bend:.1f} {x1:.1f},{y1 + 7:.1f}"/>'
        )
    parts += [_node(node, answer, places[node.id], picked, node.id in near, link) for node in _reading_order(shown, places)]
    body = "".join(parts)
    table = Data(
        ("id", "kind", "layer", "position", "effect", "share"),
        [(node.id, node.kind, node.layer, node.position, node.effect, node.share) for node in shown.nodes],
    )
    files = ""
    if has_files:
        files = f"<details><summary>files</summary>{keep(title, desc, body, width, height, table)}</details>"
    return made(
        f'<figure class="circuit"><figcaption>{escape(title)}</figcaption><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(title)}"><svg role="group" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f"<title>{escape(title)}</title><desc>{escape(desc)}</desc>{body}</svg></div>"
        f"{files}</figure>"
    )


def _layout(
    answer: LiveCircuit, shown: Drawn
) -> tuple[dict[int, tuple[float, float]], dict[tuple[int, int], float], dict[str, tuple[float, float]], int, int]:
    cells: dict[tuple[int, tuple[int, int]], list[DrawnNode]] = {}
    for node in shown.nodes:
        cells.setdefault((node.position, _row(node)), []).append(node)
    positions = sorted({position for position, _ in cells})
    order = sorted({row for _, row in cells}, reverse=True)
    rows = {row: TOP + ROW * (at + 0.5) for at, row in enumerate(order)}
    columns: dict[int, tuple[float, float]] = {}
    x = float(LEFT)
    for position in positions:
        most = max(len(those) for (at, _), those in cells.items() if at == position)
        words = "biases" if position < 0 else visible(answer.texts[position])
        wide = max(PITCH * most + 6, LETTER * min(len(words), 12) + 14)
        columns[position] = (x, x + wide)
        x += wide
    places = {}
    for (position, row), those in cells.items():
        left, right = columns[position]
        step = (right - left) / len(those)
        for at, node in enumerate(sorted(those, key=lambda node: -node.effect)):
            places[node.id] = (left + step * (at + 0.5), rows[row])
    return columns, rows, places, math.ceil(max(x + LEFT, 320)), TOP + ROW * len(order) + 32


def _row(node: DrawnNode) -> tuple[int, int]:
    """(layer, 1 for its MLP)."""
    if node.position < 0 or node.kind in ("embedding", "position"):
        return (-1, 0)
    return (node.layer, int(node.kind.startswith("MLP")))


def _frame(
    answer: LiveCircuit, columns: dict[int, tuple[float, float]], rows: dict[tuple[int, int], float], width: int, height: int
) -> str:
    parts = []
    for at, (position, (left, right)) in enumerate(columns.items()):
        if at % 2 == 0:
            parts.append(f'<rect class="lane" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{height - TOP - 32}"/>')
        words = "biases" if position < 0 else visible(answer.texts[position])
        words = words if len(words) <= 12 else words[:11] + "…"
        middle = (left + right) / 2
        for line in (13, height - 17):
            parts.append(f'<text class="now" x="{middle:.1f}" y="{line}" text-anchor="middle">{escape(words)}</text>')
            if position >= 0:
                parts.append(f'<text x="{middle:.1f}" y="{line + 13}" text-anchor="middle">{position}</text>')
    for (layer, mlp), y in rows.items():
        words = "input" if layer < 0 else "logit" if layer >= answer.n_layers else f"MLP {layer}" if mlp else f"attn. {layer}"
        # At both ends: one of them is in sight.
        parts.append(f'<text x="{LEFT - 8}" y="{y + 3:.1f}" text-anchor="end">{words}</text>')
        parts.append(f'<text x="{width - LEFT + 8}" y="{y + 3:.1f}">{words}</text>')
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - LEFT}" y1="{y + ROW / 2:.1f}" y2="{y + ROW / 2:.1f}"/>')
    return "".join(parts)


def _node(
    node: DrawnNode, answer: LiveCircuit, at: tuple[float, float], picked: str, near: bool, link: Callable[[str], str]
) -> str:
    size = 0.75 + 1.1 * min(1.0, math.sqrt(abs(node.share)))
    words = f"{told(node, answer)}: {percent(node.share)} of the root"
    states = [
        "node", node.kind.replace(" ", "-"), "up" if node.effect >= 0 else "down", *(["followed"] if node.followed else ()),
        *(["near"] if near else ()), *(["picked"] if node.id == picked else ()), *(["pinned"] if node.pinned else ()),
    ]  # fmt: skip
    place = f"translate({at[0]:.1f} {at[1] - 4:.1f}) scale({size:.2f})"
    shape = f'<path class="mark" d="{MARKS[SHAPES[node.kind]]}" transform="{place}"/>'
    more = f'<path class="shut" d="M{at[0] - 6:.1f},{at[1] + 7:.1f}h12"/>' if node.closed else ""
    pin = f'<circle class="pin" cx="{at[0] + 9:.1f}" cy="{at[1] - 12:.1f}" r="2.4"/>' if node.pinned else ""
    label = visible(node.label)
    label = label if len(label) <= 8 else label[:7] + "…"
    current = ' aria-current="true"' if node.id == picked else ""
    return (
        f'<a class="{" ".join(states)}" href="{escape(link(node.id))}" data-node="{escape(node.id)}"{current}>'
        f"<title>{escape(words)}</title>"
        f'<rect class="hit" x="{at[0] - 18:.1f}" y="{at[1] - 19:.1f}" width="36" height="38"/>{shape}{pin}{more}'
        f'<text x="{at[0]:.1f}" y="{at[1] + 15:.1f}" text-anchor="middle">{escape(label)}</text></a>'
    )


def told(node: DrawnNode, answer: LiveCircuit) -> str:
    """What a drawn node is, in words."""
    if node.kind == "group":
        return f"group {node.label} of {len(node.members)} nodes"
    whole = next(one for one in answer.nodes if one.id == node.id)
    return said(whole, answer)


def _reading_order(shown: Drawn, places: dict[str, tuple[float, float]]) -> Sequence[DrawnNode]:
    """From the root down and from left to right, as one tabs."""
    return sorted(shown.nodes, key=lambda node: (places[node.id][1], places[node.id][0]))


def key(answer: LiveCircuit) -> Markup:
    """Which shape is which."""
    items = "".join(
        f'<span><svg class="mark-key" aria-hidden="true" viewBox="-7 -7 14 14" width="14" height="14">'
        f'<path class="mark {kind.replace(" ", "-")}" d="{MARKS[SHAPES[kind]]}"/></svg>{escape(words)}</span>'
        for kind, words in NAMES.items()
        if answer.transcoders or kind != "MLP feature"
    )
    return made(f'<p class="marks circuit-key">{items}</p>')
