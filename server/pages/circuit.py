"""Circuits: what made a feature or a logit, as a graph, on a stored example, a shared prompt, or typed text.

Where the text has an address, so has every view of its graph: it is asked by GET, and whatever is picked, pinned, closed or
grouped is in the address. Typed text goes by POST and is not stored; the view then travels in the form.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError
from sqlalchemy.orm import Session

from sae_core.errors import HeadscopeError, NotFound, UsageError
from server.access import asks, needs
from server.circuits import drawing, tracer
from server.circuits.asked import (
    CircuitEdge,
    CircuitNode,
    CircuitPlace,
    CircuitQuestion,
    FeatureRoot,
    LiveCircuit,
    LogitRoot,
    ScoreAt,
)
from server.circuits.view import Drawn, Path, View, drawn, said, strongest_paths
from server.live import InLine
from server.pages import prompt
from server.pages.asking import WAIT, check_text, look, named_token, new_ticket
from server.pages.errors import SOON
from server.pages.feature import engine
from server.pages.reply import Read, file_name, link, reply, sae_path, to_json, wants_json, wants_part
from server.pages.writing import Form, see, writing
from server.store import prompts as store
from server.store import transcoders
from server.store.examples import example_row
from server.store.features import FeatureRow, check_index
from server.store.prompts import ModelChoice
from server.store.saes import Door, find_sae

router = APIRouter()

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
DEPTHS = (0, 1, 2, 3, 5)


@dataclass(frozen=True)
class Source:
    """Where the text is from."""

    text: str = ""
    """As typed; empty where it has an address."""
    saes: str = ""
    """`sae:` or `model:` and a name, as the prompt page has it."""
    address: str = ""
    """Of the graph's page; empty for typed text."""
    back: str = "/prompt"
    """Where the text itself is shown."""
    words: str = "own text"
    tokens: tuple[int, ...] = ()
    """Of a stored example, in place of text."""
    root: str = ""
    """Where it begins when nothing else is asked."""
    fields: tuple[tuple[str, str], ...] = ()
    """What names the source in a form."""


@dataclass(frozen=True)
class HeadLine:
    """A head's part of an edge, and why it looked there."""

    head: int
    value: float
    pattern: float | None
    """Here and below null where no score of this layer is known."""
    score: float | None
    lead: float | None
    """The score less its mean over all sources."""


@dataclass(frozen=True)
class EdgePart:
    """An edge by head."""

    edge: CircuitEdge
    heads: tuple[HeadLine, ...]
    """Largest first."""
    largest: float


@dataclass(frozen=True)
class CircuitPage:
    """A graph, and what is looked at in it."""

    source: str
    """Where the text is from, in words."""
    view: View
    trouble: str
    """Why there is no answer; empty where there is one."""
    answer: LiveCircuit | None
    drawn: Drawn | None
    paths: tuple[Path, ...]
    """The ways from the root with the largest products of shares."""


@dataclass(frozen=True)
class Shown:
    """What the template needs beside the page's facts."""

    source: Source
    nodes: dict[str, CircuitNode]
    picked: CircuitNode
    edges: tuple[CircuitEdge, ...]
    """Into the picked node."""
    readers: tuple[CircuitEdge, ...]
    """Out of it."""
    apart: EdgePart | None
    rows: dict[str, FeatureRow]
    """What is known of features, by their nodes."""
    addresses: dict[str, str]
    """Of features' pages, by their nodes."""
    mlps: bool
    """Whether there are transcoders to go through below the root."""


# ---- the pages ----


@router.get("/saes/{sae}/features/{index:int}/circuit", include_in_schema=False)
@router.get("/saes/{sae}/features/{index:int}/circuit.json", response_model=CircuitPage)
@needs("reader")
def show_of_example(
    request: Request, sae: str, index: int, read: Read, view: Annotated[View, Query()], band: Annotated[int, Query(ge=0)] = 0,
    rank: Annotated[int, Query(ge=0)] = 0,
) -> Response:  # fmt: skip
    """What made a feature fire in a stored example."""
    return _by_address(request, read, _of_example(read, sae, index, band, rank), view)


@router.get("/prompts/{prompt_id}/circuit", include_in_schema=False)
@router.get("/prompts/{prompt_id}/circuit.json", response_model=CircuitPage)
@needs("reader")
def show_of_prompt(request: Request, prompt_id: str, read: Read, view: Annotated[View, Query()]) -> Response:
    """What made a feature or a logit of a shared prompt."""
    return _by_address(request, read, _of_prompt(read, prompt_id), view)


@router.post("/circuit", include_in_schema=False)
@needs("reader", live=True)
def ask_circuit(request: Request, read: Read, form: Form) -> Response:
    """The graph on typed text, or on whatever the form names. Nothing of it is stored."""
    source = _typed(form)
    view = View()
    try:
        source, view = _source(read, form), _view(form)
        export = form.get("do") == "export"
        found = _ask(request, read, source, view, to_the_end=export)
    except HeadscopeError as error:
        return _trouble(request, source, view, error)
    return _answered(request, read, source, view, found, export=export)


@router.post("/circuit/look", include_in_schema=False)
@needs("reader")
def look_for_circuit(request: Request, read: Read, form: Form) -> Response:
    """Where a question is that waits in the engine's line, or its answer; `do=cancel` takes it out."""
    source, view = _source(read, form), _view(form)
    try:
        found = look(request, form, "circuit")
    except HeadscopeError as error:
        return _trouble(request, source, view, error)
    if source.address and found.circuit is not None:
        return see(link(source.address, **_with(source, view.asked())))  # the permalink; the engine has kept the answer
    return _answered(request, read, source, view, found, export=False)


@router.post("/circuit/share", include_in_schema=False)
def share_circuit(request: Request, read: Read, form: Form) -> Response:
    """Store the typed text, and on to the graph's address."""
    source, view = _source(read, form), _view(form)
    return _share(request, read, source, view, form)


def _by_address(request: Request, read: Session, source: Source, view: View) -> Response:
    params = dict(request.query_params)
    if "do" in params or "go" in params:
        # A step leads to the address of what it made, which is the permalink.
        return see(link(source.address, **_with(source, _view(params).asked())))
    asks(request)  # only now: a step on the way to an address is no question
    export = params.get("as") == "circuit-tracer"
    whole = export or "figure" in params or wants_json(request)
    try:
        found = _ask(request, read, source, view, to_the_end=whole)
    except HeadscopeError as error:
        if whole:
            raise  # a sentence must not be taken for the answer
        return _trouble(request, source, view, error)
    return _answered(request, read, source, view, found, export=export)


def _answered(request: Request, read: Session, source: Source, view: View, found: InLine, *, export: bool) -> Response:
    answer = found.circuit
    if answer is None:
        page = CircuitPage(source.words, view, "", None, None, ())
        return _shown(request, page, source, ticket=found.ticket, place=found.place)
    doors = {one.sae: find_sae(read, one.sae) for one in answer.saes}
    rows, addresses = _known(read, answer, doors)
    if export:
        slug = file_name(f"{answer.model} {said(answer.nodes[0], answer)}")
        labels = {one: row.label for one, row in rows.items() if row.label is not None}
        body = to_json(tracer.as_tracer(answer, view, slug=slug, labels=labels))
        headers = {"Content-Disposition": f'attachment; filename="{slug}.json"', "Cache-Control": "private, no-cache"}
        return Response(body, headers=headers, media_type="application/json")
    nodes = {node.id: node for node in answer.nodes}
    picked = nodes.get(view.pick, nodes[answer.root])
    edges = tuple(edge for edge in answer.edges if edge.target == picked.id)
    readers = tuple(sorted((edge for edge in answer.edges if edge.source == picked.id), key=lambda edge: -abs(edge.effect)))
    mlps = any(one.layer < answer.nodes[0].layer for one in transcoders.of_model(read, answer.model))
    shown = Shown(source, nodes, picked, edges, readers, _apart(answer, view), rows, addresses, mlps)
    page = CircuitPage(source.words, view, "", answer, drawn(answer, view), strongest_paths(answer))
    return _shown(request, page, source, shown=shown)


def _trouble(request: Request, source: Source, view: View, error: HeadscopeError) -> Response:
    page, status = CircuitPage(source.words, view, str(error), None, None, ()), 503 if error.status == 503 else 422
    return _shown(request, page, source, status=status)


def _shown(
    request: Request,
    page: CircuitPage,
    source: Source,
    *,
    shown: Shown | None = None,
    ticket: str = "",
    place: int | None = None,
    status: int = 200,
) -> Response:
    def go(**changes: Any) -> str:
        return link(source.address, **_with(source, changes)) if source.address else urlencode(changes)

    figure: Callable[[], str] = str
    if page.answer is not None and page.drawn is not None and shown is not None:
        root = said(page.answer.nodes[0], page.answer)
        figure = partial(
            drawing.circuit,
            f"What made {root}",
            page.answer,
            page.drawn,
            next(one.id for one in page.drawn.nodes if shown.picked.id in one.members),
            lambda one: go(**page.view.picking(one)) if source.address else "#nodes",
            desc=f"A graph of {len(page.drawn.nodes)} nodes and {len(page.drawn.edges)} edges; positions across, layers up. "
            "The table of nodes below it has the same.",
            has_files=bool(source.address),
        )
    status = 200 if wants_part(request) else status
    view: dict[str, Any] = {
        "source": source,
        "shown": shown,
        "ticket": ticket,
        "place": place,
        "go": go,
        "figure": figure,
        "look_id": secrets.token_hex(4),  # another one each time: what is morphed into itself would not ask again
        "shares": SHARES,
    }
    view |= {"depths": DEPTHS, "said": partial(_said, page), "key": drawing.key, "told": drawing.told, "back": source.back}
    headers = {"Retry-After": str(SOON)} if status == 503 else None
    return reply(request, page, "circuit.html", block="_circuit.html", status=status, headers=headers, **view)


def _said(page: CircuitPage, node: CircuitPlace) -> str:
    return said(node, page.answer) if page.answer is not None else ""


def _with(source: Source, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The view with what names an example in its own address."""
    return {**{name: value for name, value in source.fields if name in ("band", "rank")}, **asked}


# ---- the text ----


def _of_example(read: Session, sae: str, index: int, band: int, rank: int) -> Source:
    door = find_sae(read, sae)
    check_index(door, index)
    row = example_row(read, door, index, band, rank)
    feature = f"{sae_path(door.sae.name)}/features/{index}"
    return Source(
        saes=f"sae:{door.sae.name}",
        address=f"{feature}/circuit",
        back=feature,
        words=f"an example of feature {index}",
        tokens=tuple(row.tokens),
        root=f"{index}@{row.dest}@{door.sae.name}",
        fields=(("sae", door.sae.name), ("index", str(index)), ("band", str(band)), ("rank", str(rank))),
    )


def _of_prompt(read: Session, prompt_id: str) -> Source:
    found = prompt.of_shared(store.shared(read, prompt_id))
    feature = found.looked.feature
    root = f"next@{'' if found.looked.at is None else found.looked.at}"
    if feature is not None:
        root = f"{feature.index}@{feature.dest}@{feature.sae}"
    here = f"/prompts/{prompt_id}"
    return Source(found.text, found.saes, f"{here}/circuit", here, "a shared text", root=root, fields=(("prompt", prompt_id),))


def _typed(form: Mapping[str, str]) -> Source:
    text = form.get("text", "").replace("\r\n", "\n")[: store.LONGEST + 1]
    saes = form.get("saes", "")
    return Source(text, saes, root="next@", fields=(("text", text), ("saes", saes)))


def _source(read: Session, form: Mapping[str, str]) -> Source:
    if form.get("prompt"):
        return _of_prompt(read, form["prompt"])
    if form.get("sae"):
        numbers = [form.get(name, "0") for name in ("index", "band", "rank")]
        if not all(one.isascii() and one.isdigit() and len(one) < 9 for one in numbers):
            raise UsageError("That is no example: index, band and rank are numbers.", field="rank")
        return _of_example(read, form["sae"], *map(int, numbers))
    source = _typed(form)
    check_text(source.text)
    return source


def _view(form: Mapping[str, str]) -> View:
    """What the form says: a step that was taken is in `go`, else the fields are the view; `do` changes it."""
    if form.get("go"):
        return _viewed(dict(parse_qsl(form["go"])))
    view, does = _viewed({name: value for name, value in form.items() if value}), form.get("do", "")
    if does == "show":  # as Enter says in any field of the form: what was typed tells what is meant
        begins = form.get("after") or ((view.token or view.against) and view.root and not view.root.startswith("next"))
        does = "group" if form.get("name") else "logit" if begins else does
    if does == "group":
        return _viewed(view.regrouped(form.get("name", ""), form.get("pick") or form.get("at", "")))
    if does == "logit":
        at = form.get("after", "")
        if at and not (at.isascii() and at.isdigit() and len(at) < 7):
            raise UsageError(f"'{at[:20]}' is no token position; leave it empty for the last.", field="after")
        return _viewed({**view.asked(pick="", edge="", head=None, pins="", closed="", groups=""), "root": f"next@{at}"})
    return view


def _viewed(given: Mapping[str, Any]) -> View:
    """A View; UsageError where it cannot be one."""
    try:
        return View.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{first['loc'][0]}: {first['msg']}.", field=str(first["loc"][0])) from None


# ---- the question ----


def _ask(request: Request, read: Session, source: Source, view: View, *, to_the_end: bool) -> InLine:
    """The answer, or the question's place in the line; a file cannot say that it is not there yet, so it is waited for."""
    if to_the_end:
        return InLine(ticket="", place=None, answer=None, circuit=engine(request).circuit(question(read, source, view)))
    return engine(request).leave_circuit(new_ticket(), question(read, source, view), WAIT)


def question(read: Session, source: Source, view: View) -> CircuitQuestion:
    """What the engine is asked."""
    at = view.root or source.root
    root: FeatureRoot | LogitRoot
    first, _, rest = at.partition("@")
    if first == "next":
        if rest and not (rest.isascii() and rest.isdigit()):
            raise UsageError(f"'{at[:40]}' is no place to begin at.", field="root")
        token = named_token(view.token, "token", "text") | named_token(view.against, "against", "against_text")
        root = LogitRoot(kind="logit", dest=int(rest) if rest else None, **token)
        chosen = None
    else:
        dest, _, chosen = rest.partition("@")
        if not (first.isdigit() and dest.isdigit() and chosen and (first + dest).isascii() and len(first + dest) < 18):
            raise UsageError(f"'{at[:40]}' is no place to begin at.", field="root")
        check_index(find_sae(read, chosen), int(first))
        root = FeatureRoot(sae=chosen, index=int(first), dest=int(dest))
    saes = through(store.choices(read), source.saes, chosen)
    if chosen is not None and chosen not in saes:
        raise UsageError(f"'{chosen[:60]}' is no SAE of the model that read this text.", field="root")
    return CircuitQuestion(
        saes=saes,
        text=None if source.tokens else source.text,
        tokens=list(source.tokens) if source.tokens else None,
        root=root,
        share=view.share,
        depth=view.depth,
        transcoders=view.mlps,
        score=_score(view),
    )


def _score(view: View) -> ScoreAt | None:
    """The score behind the edge that is looked at, as far as ids tell: from a feature's position to that of its source."""
    reader, source = _place(view.pick), _place(view.edge)
    if reader is None or source is None or not view.pick.startswith("f"):
        return None
    return ScoreAt(layer=reader[0], head=view.head, dest=reader[1], src=source[1], against_mean=view.lead)


def _place(node: str) -> tuple[int, int] | None:
    """(layer, position) of a node by its id; None of what has none."""
    what, _, position = node.partition("@")
    layer = what[1:].partition(".")[0] or "0"
    is_one = (position + layer).isascii() and position.isdigit() and layer.isdigit() and len(position + layer) < 12
    return (int(layer), int(position)) if is_one else None


def through(models: Sequence[ModelChoice], saes: str, chosen: str | None) -> list[str]:
    """The SAEs that a circuit goes through: one of each layer of the model, the one that is asked about before others, then those
    that are harvested."""
    kind, _, name = saes.partition(":")
    if not name:
        raise NotFound(
            "The SAEs that this text was put to are gone, or not shared with you, so it has no circuit here.", field="saes"
        )
    first = {chosen, name if kind == "sae" else None}
    for model in models:
        if (kind == "model" and model.name == name) or any(sae.name in first for sae in model.saes):
            order = sorted(model.saes, key=lambda sae: (sae.name != chosen, sae.name not in first, not sae.harvested, sae.name))
            by_layer = {sae.layer: sae.name for sae in reversed(order)}
            return [by_layer[layer] for layer in sorted(by_layer)]
    raise NotFound(f"There is no SAE or model called '{name[:60]}' to go through.", field="saes")


# ---- the answer ----


def _known(read: Session, answer: LiveCircuit, doors: Mapping[str, Door]) -> tuple[dict[str, FeatureRow], dict[str, str]]:
    """What people and the harvest say of features, and where their pages are; by node."""
    rows: dict[str, FeatureRow] = {}
    addresses: dict[str, str] = {}
    for one in answer.saes:
        nodes = [node for node in answer.nodes if node.kind == "feature" and node.layer == one.layer]
        told = store.told(read, doors[one.sae], {node.index for node in nodes}) if nodes else {}
        for node in nodes:
            addresses[node.id] = f"{sae_path(one.sae)}/features/{node.index}"
            if node.index in told:
                rows[node.id] = told[node.index]
    return rows, addresses


def _apart(answer: LiveCircuit, view: View) -> EdgePart | None:
    score = answer.score
    edge = next((one for one in answer.edges if one.target == view.pick and one.source == view.edge), None)
    if edge is None or not edge.heads:
        return None
    lines = [
        HeadLine(head, value, score.patterns[head], score.scores[head], score.scores[head] - score.means[head])
        if score is not None
        else HeadLine(head, value, None, None, None)
        for head, value in enumerate(edge.heads)
    ]
    return EdgePart(edge, tuple(sorted(lines, key=lambda line: -abs(line.value))), max(abs(value) for value in edge.heads))


def _share(request: Request, read: Session, source: Source, view: View, form: Mapping[str, str]) -> Response:
    """Store the typed text, and on to the graph's address."""
    asked = prompt.Asked(text=source.text, saes=source.saes)
    doors = prompt.asked_doors(read, store.choices(read), source.saes)
    with writing(request) as session:
        made = prompt.share(session, asked, doors, form.get("visibility", "shared"), prompt.days_of(form.get("days", "")))
    chosen = replace(source, address=f"/prompts/{made}/circuit")
    return see(link(chosen.address, **view.asked(root=view.root or source.root)))
