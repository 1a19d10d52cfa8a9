"""`/saes/{sae}/features/{index}`: one feature, its examples taken apart by head and source token."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from sae_core.errors import HeadscopeError, UsageError
from server.access import needs
from server.live import Live, LiveAttribution, LiveQuestion
from server.pages.reply import Read, etag, known_schema, link, made_quickly, reply, unchanged, wants_json
from server.pages.writing import Form
from server.rendering import Paint
from server.store.examples import ExamplePage, example_page
from server.store.features import DfaEntry, FeatureExample, FeaturePage, check_index, feature_page
from server.store.heads import check_head
from server.store.saes import Door, find_sae

router = APIRouter()

LONGEST_TEXT = 4000
"""Characters of typed text; a model's pass over more would keep everyone waiting."""


class View(BaseModel):
    """How the examples are shown; part of the address."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, populate_by_name=True)

    context: Literal["5", "16", "full"] = "16"
    """Tokens on each side of the destination."""
    head: int | None = Field(None, ge=0)
    """Paint this head's DFA alone."""
    came_from: str | None = Field(None, alias="from", max_length=1000)
    """What the feature table selected, in its order: previous, next and random keep to it."""

    mark: str | None = Field(None, max_length=200)
    """Mark this token, which a search has found."""
    all: bool = False
    """Every example, not the first ones only."""

    def paint(self, page: FeaturePage) -> Paint:
        """How one example of the page is painted."""
        return Paint(page.max_act, self.head, None if self.context == "full" else int(self.context), self.mark)

    def but(self, name: str) -> str:
        """The query of the page's address without `name`, so that a value of it can be put after it."""
        others = link("", **{**self.asked(), name: None})
        return f"{others}{'&' if others else '?'}{name}="

    def asked(self, **changes: Any) -> dict[str, Any]:
        """The address's parameters, with changes."""
        chosen = {**self.model_dump(), **changes}
        context = None if chosen["context"] == "16" else chosen["context"]
        every = "1" if chosen["all"] else None
        return {"context": context, "head": chosen["head"], "mark": chosen["mark"], "all": every, "from": chosen["came_from"]}


@router.get("/saes/{sae}/features/{index:int}", include_in_schema=False)
@router.get("/saes/{sae}/features/{index:int}.json", response_model=FeaturePage)
async def show_feature(request: Request, sae: str, index: int, view: Annotated[View, Query()]) -> Response:
    """The feature's page. A published harvest never changes, so its id names the answer, with what people wrote."""
    return await made_quickly(_feature, request, sae, index, view)


def _feature(request: Request, sae: str, index: int, view: View) -> Response:
    # With a session of its own: each of FastAPI's dependencies that reads would be two steps into a thread.
    with known_schema(request).read() as read:
        door = find_sae(read, sae)
        check_head(door, view.head)
        tag = _tag(request, door)
        known = unchanged(request, tag)
        if known:
            return known
        # What other features have to do with it comes as a block of its own, but where everything is asked for.
        page = feature_page(read, door, index, every=view.all, others=view.all or wants_json(request))
    return reply(request, page, "feature.html", block="_examples.html", tag=tag, **about(view))


def _tag(request: Request, door: Door) -> str:
    return etag(request, door.sae.sha256, door.sae.harvest and door.sae.harvest.id, door.revision)


@router.get("/saes/{sae}/features/{index:int}/related", include_in_schema=False)
def show_related(request: Request, sae: str, index: int, read: Read) -> Response:
    """The features that are like this one, or fire with it."""
    door = find_sae(read, sae)
    tag = _tag(request, door)
    return unchanged(request, tag) or reply(
        request, feature_page(read, door, index), "related.html", block="_related.html", tag=tag
    )


@router.get("/saes/{sae}/features/{index:int}/examples/{band:int}/{rank:int}", include_in_schema=False)
@router.get("/saes/{sae}/features/{index:int}/examples/{band:int}/{rank:int}.json", response_model=ExamplePage)
def show_example(
    request: Request, sae: str, index: int, band: int, rank: int, read: Read,
    source: Annotated[int | None, Query(ge=0)] = None,
) -> Response:  # fmt: skip
    """An example's exact numbers, and one source of it split by head: the one asked for, or the strongest."""
    door = find_sae(read, sae)
    check_index(door, index)
    tag = _tag(request, door)
    known = unchanged(request, tag)
    if known:
        return known
    page = example_page(read, door, index, band, rank)
    chosen = next((one for one in page.sources if one.position == source), None)
    if source is None and page.sources:
        chosen = page.sources[0]
    at = source if source is None or page.example.start <= source < page.example.start + len(page.example.texts) else None
    return reply(request, page, "example.html", block="_sources.html", tag=tag, chosen=chosen, at=at)


def about(
    view: View,
    text: str = "",
    answer: FeatureExample | None = None,
    tokens: Sequence[int] = (),
    trouble: str = "",
    *,
    split_bias: bool = False,
    value_bias: Sequence[float] | None = None,
) -> dict[str, Any]:
    """What the template needs beside the feature: the chosen view, and the typed text with its tokens and its answer, from
    which what the value bias gave through each head may have been taken out."""
    typed = {"text": text, "answer": answer, "tokens": ",".join(map(str, tokens)), "trouble": trouble}
    return {"view": view, "split_bias": split_bias, "value_bias": value_bias} | typed


@router.post("/saes/{sae}/features/{index:int}", include_in_schema=False)
@needs("reader", live=True)
def try_text(request: Request, sae: str, index: int, read: Read, form: Form) -> Response:
    """The typed text taken apart by the engine. Nothing of it is stored."""
    door = find_sae(read, sae)
    page = feature_page(read, door, index)
    text, split_bias = form.get("text", ""), "split_bias" in form
    answer, tokens, value_bias, trouble = None, [], None, ""
    try:
        found = ask(request, door, index, text, form.get("dest", ""), split_bias=split_bias)
        answer, tokens, value_bias = as_example(found), found.tokens, found.value_bias
    except HeadscopeError as error:
        # The page stays as it is: the sentence stands beside the box, and the text is kept.
        trouble = str(error)
    typed = about(View(context="full"), text, answer, tokens, trouble, split_bias=split_bias, value_bias=value_bias)
    return reply(request, page, "feature.html", block="_try.html", **typed)


def ask(request: Request, door: Door, index: int, text: str, dest: str, *, split_bias: bool = False) -> LiveAttribution:
    """The engine's answer."""
    if not text.strip():
        raise UsageError("Type some text first.", field="text")
    if len(text) > LONGEST_TEXT:
        raise UsageError(f"That is {len(text)} characters; at most {LONGEST_TEXT} can be tried at once.", field="text")
    if dest and not (dest.isascii() and dest.isdigit()):
        raise UsageError(f"'{dest}' is no token position; leave it empty for the strongest.", field="dest")
    at = int(dest) if dest else None
    question = LiveQuestion(sae=door.sae.name, index=index, text=text, dest=at, split_bias=split_bias)
    return engine(request).attribute(question)


def engine(request: Request) -> Live:
    """The app's one client of the engine, made when the first question is asked."""
    state = request.app.state
    if state.live is None:
        state.live = Live(state.settings)
    client: Live = state.live
    return client


def as_example(answer: LiveAttribution) -> FeatureExample:
    """A live answer holds the full matrix, so nothing is dropped and nothing lies before the window. What a value bias gave
    stands with the bias, where it was asked for apart."""
    entries = [DfaEntry(src, head, value) for head, row in enumerate(answer.dfa) for src, value in enumerate(row)]
    entries.sort(key=lambda entry: -abs(entry.value))
    total, size = sum(entry.value for entry in entries), sum(abs(entry.value) for entry in entries)
    none = (0.0,) * len(answer.dfa)
    preact, bias = answer.preacts[answer.dest], answer.bias + sum(answer.value_bias or ())
    return FeatureExample(
        band=0,
        rank=0,
        row=0,
        start=0,
        dest=answer.dest,
        texts=tuple(answer.texts),
        acts={position: act for position, act in enumerate(answer.activations) if act > 0},
        dfa=tuple(entries),
        dropped=none,
        before=none,
        abs_dfa=size,
        dfa_sum=total,
        bias=bias,
        preact=preact,
        act=answer.activations[answer.dest],
        gap=abs(total + bias - preact) / (size + abs(bias) or 1.0),
    )
