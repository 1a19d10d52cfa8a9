"""How a circuit is looked at: what is picked, pinned, closed and grouped; and what of the graph is then drawn, with its strongest
paths. All of it is in the page's address, or in its form where the text is typed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from server.circuits.asked import FEATURES, CircuitNode, CircuitPlace, LiveCircuit

DRAWN = 70
"""Nodes that are drawn; pinned ones, those taken apart and the picked one are in any case."""
PATHS = 6
"""Ways that are told, of all and of those by way of another feature."""


class View(BaseModel):
    """What is looked at, and how much of it; part of the address."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True, hide_input_in_errors=True)

    root: str = Field("", max_length=300)
    """`index@position@SAE`, or `next@position` for the token after a position; empty for what the page is about."""
    token: str = Field("", max_length=200)
    """The next token whose logit it is, as typed or `#id`; empty for the likeliest."""
    against: str = Field("", max_length=200)
    """The token that it is compared with; empty for the mean over the vocabulary."""
    share: float = Field(0.005, ge=0.0005, le=1)
    """Features are followed from this share of the root."""
    depth: int | None = Field(None, ge=0, le=100)
    """How many edges from the root are followed; null for all."""
    mlps: bool = True
    """Go through MLPs where there are transcoders."""
    pins: str = Field("", max_length=2000)
    """Ids of pinned nodes, parted by commas."""
    closed: str = Field("", max_length=2000)
    """Ids of nodes whose sources are hidden."""
    groups: str = Field("", max_length=4000)
    """`name:id,id`, parted by semicolons."""
    pick: str = Field("", max_length=100)
    """Id of the node that is looked at; empty for the root."""
    edge: str = Field("", max_length=100)
    """Id of a source of it, whose edge is taken apart by head."""
    head: int | None = Field(None, ge=0)
    """The head whose score is taken apart; null for the one that carried most."""
    lead: bool = False
    """Take the score's lead over its mean apart."""

    @field_validator("depth", "head", mode="before")
    @classmethod
    def _none(cls, given: object) -> object:
        return None if given == "" else given  # as an empty choice of a form comes

    @property
    def pinned(self) -> tuple[str, ...]:
        """Ids of pinned nodes."""
        return _ids(self.pins)

    @property
    def shut(self) -> tuple[str, ...]:
        """Ids of closed nodes."""
        return _ids(self.closed)

    @property
    def grouped(self) -> dict[str, tuple[str, ...]]:
        """Ids of each group's nodes, by its name."""
        found = {}
        for one in self.groups.split(";"):
            name, _, members = one.partition(":")
            if name and _ids(members):
                found[name] = _ids(members)
        return found

    def asked(self, **changes: Any) -> dict[str, Any]:
        """The address's parameters, with changes; what is as it is without them is left out."""
        chosen = {**self.model_dump(), **changes}
        chosen["lead"] = "1" if chosen["lead"] else None
        chosen["mlps"] = None if chosen["mlps"] else "0"
        plain = {name: field.default for name, field in View.model_fields.items()}
        return {name: value for name, value in chosen.items() if value is not None and value != plain[name]}

    def picking(self, node: str) -> dict[str, Any]:
        """Look at a node."""
        return self.asked(pick=node, edge="", head=None, lead=False)

    def toggled(self, what: str, node: str) -> dict[str, Any]:
        """Pin, or close, a node; or let it go."""
        ids = _ids(getattr(self, what))
        now = [one for one in ids if one != node] if node in ids else [*ids, node]
        return self.asked(**{what: ",".join(now)})

    def regrouped(self, name: str, node: str) -> dict[str, Any]:
        """Put a node into a group; with no name, out of all."""
        name = "".join(" " if c in ":;," else c for c in name).strip()[:40]
        groups = {one: [id_ for id_ in members if id_ != node] for one, members in self.grouped.items()}
        if name:
            groups.setdefault(name, []).append(node)
        return self.asked(groups=";".join(f"{one}:{','.join(members)}" for one, members in groups.items() if members))


def _ids(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one for one in text.split(",") if one))


@dataclass(frozen=True)
class DrawnNode:
    """A node of the drawing, or a group of them."""

    id: str
    kind: str
    """As a node's; `group` for a group."""
    layer: int
    position: int
    label: str
    effect: float
    share: float
    members: tuple[str, ...]
    """Ids; of a node its own alone."""
    followed: bool
    pinned: bool
    closed: bool


@dataclass(frozen=True)
class DrawnEdge:
    """An edge of the drawing; between groups the sum of theirs."""

    source: str
    target: str
    effect: float
    share: float
    """Of the root."""


@dataclass(frozen=True)
class Drawn:
    """What is drawn."""

    nodes: tuple[DrawnNode, ...]
    edges: tuple[DrawnEdge, ...]
    hidden: int
    """Nodes that are not: too small, or behind a closed one."""


@dataclass(frozen=True)
class Path:
    """A way from the root down to a node that is not followed further."""

    ids: tuple[str, ...]
    """The root first."""
    share: float
    """Product of the edges' shares: this way's part of the root."""


def drawn(answer: LiveCircuit, view: View, most: int = DRAWN) -> Drawn:
    """What of the graph is drawn."""
    nodes = {node.id: node for node in answer.nodes}
    seen = _open(answer, view.shut)
    kept = {node.id for node in answer.nodes if node.id in seen and (node.followed or node.id in view.pinned)}
    kept |= {one for one in (answer.root, view.pick, view.edge) if one in nodes}
    by_size = sorted((node for node in answer.nodes if node.id in seen), key=lambda node: -abs(node.effect))
    for node in by_size:
        if len(kept) >= most:
            break
        kept.add(node.id)
    into = {one: f"g:{name}" for name, members in view.grouped.items() for one in members if one in nodes and one != answer.root}
    whole = nodes[answer.root].effect or 1.0
    together: dict[str, list[CircuitNode]] = {}
    for node in answer.nodes:
        if node.id in kept or node.id in into:
            together.setdefault(into.get(node.id, node.id), []).append(node)
    found = [_node(key, members, view, answer, whole) for key, members in together.items()]
    edges: dict[tuple[str, str], float] = {}
    for edge in answer.edges:
        ends = into.get(edge.source, edge.source), into.get(edge.target, edge.target)
        if ends[0] != ends[1] and ends[0] in together and ends[1] in together and edge.target not in view.shut:
            edges[ends] = edges.get(ends, 0.0) + edge.effect
    shown = sum(len(members) for members in together.values())
    drawn_edges = tuple(DrawnEdge(*ends, effect, effect / whole) for ends, effect in edges.items())
    return Drawn(tuple(found), drawn_edges, len(answer.nodes) - shown)


def _node(key: str, members: Sequence[CircuitNode], view: View, answer: LiveCircuit, whole: float) -> DrawnNode:
    first = max(members, key=lambda node: abs(node.effect))
    effect = sum(node.effect for node in members)
    group = key.startswith("g:")
    return DrawnNode(
        id=key,
        kind="group" if group else first.kind,
        layer=first.layer,
        position=first.position,
        label=key[2:] if group else short(first, answer),
        effect=effect,
        share=effect / whole,
        members=tuple(node.id for node in members),
        followed=any(node.followed for node in members),
        pinned=any(node.id in view.pinned for node in members),
        closed=any(node.id in view.shut for node in members),
    )


def _open(answer: LiveCircuit, closed: Iterable[str]) -> set[str]:
    """Ids of what can be reached from the root without going through a closed node."""
    shut, sources = set(closed), dict[str, list[str]]()
    for edge in answer.edges:
        sources.setdefault(edge.target, []).append(edge.source)
    seen, waiting = {answer.root}, [answer.root]
    while waiting:
        at = waiting.pop()
        for one in () if at in shut else sources.get(at, ()):
            if one not in seen:
                seen.add(one)
                waiting.append(one)
    return seen


def strongest_paths(answer: LiveCircuit, most: int = PATHS) -> tuple[Path, ...]:
    """The ways down with the largest products, exactly: from the first layer up, each node keeps its best ones. First those of
    any length, then those by way of at least one more feature."""
    edges: dict[str, list[tuple[str, float]]] = {}
    for edge in answer.edges:
        edges.setdefault(edge.target, []).append((edge.source, edge.share))
    best: dict[str, list[Path]] = {}
    for node in sorted((node for node in answer.nodes if node.followed), key=lambda node: (node.layer, node.kind != "feature")):
        found = [
            Path((node.id, *below.ids), share * below.share)
            for source, share in edges.get(node.id, ())
            # A followed node of which nothing is listed ends a way, as a leaf does.
            for below in best.get(source) or (Path((source,), 1.0),)
        ]
        found.sort(key=lambda path: -abs(path.share))
        longer = [path for path in found if len(path.ids) > 2] if node.id == answer.root else []
        best[node.id] = list(dict.fromkeys([*found[:most], *longer[:most]]))
    return tuple(best.get(answer.root, ()))


def short(node: CircuitNode, answer: LiveCircuit) -> str:
    """A word for a node where its layer and token are told beside it."""
    if node.kind in FEATURES:
        return str(node.index) if node.index >= 0 else "others"
    if node.kind == "logit":
        return token_of(node.index, answer)
    words = {"error": "error", "MLP error": "error", "attention": "att.", "MLP": "MLP", "embedding": "token", "position": "pos."}
    return words.get(node.kind, node.name)


def token_of(token: int, answer: LiveCircuit) -> str:
    """The text of a likely token."""
    return next((one.text for one in answer.likely if one.id == token), f"#{token}")


def said(node: CircuitPlace, answer: LiveCircuit) -> str:
    """What a node is, in words: for whoever does not see the drawing."""
    at = "" if node.position < 0 else f" at {node.position} {answer.texts[node.position]!r}"
    if node.kind in FEATURES:
        of = f"layer {node.layer}" if node.kind == "feature" else f"MLP {node.layer}"
        return (f"feature {node.index} of {of}" if node.index >= 0 else f"other features of {of}") + at
    if node.kind == "logit":
        against = "" if not node.name else f" less {token_of(int(node.name), answer)!r}"
        return f"logit of {token_of(node.index, answer)!r}{against}{at}"
    if node.kind == "bias":
        return node.name if "bias" in node.name else f"bias: {node.name}"
    words = {
        "error": "error of layer {}",
        "MLP error": "error of MLP {}",
        "attention": "attention {}",
        "MLP": "MLP {}",
        "embedding": "embedding",
        "position": "position",
    }
    return words[node.kind].format(node.layer) + at
