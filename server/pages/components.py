"""`/saes/{sae}/features/{index}/components`: what embedding and earlier blocks gave to an example, asked of the engine."""

from dataclasses import dataclass
from typing import Annotated, Self

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sae_core.errors import EngineAway, Unfitting, UsageError
from server.access import needs
from server.live import ComponentsQuestion, LiveComponents
from server.pages.feature import engine
from server.pages.reply import Read, reply
from server.store.examples import example_row
from server.store.features import check_index
from server.store.heads import check_head
from server.store.saes import Door, SaeRef, find_sae

router = APIRouter()

TOP_SOURCES = 3
"""Of each component."""


class Asked(BaseModel):
    """Which example, and how it is split; the address is exactly this."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    band: int | None = Field(None, ge=0)
    """Band of a stored example ..."""
    rank: int | None = Field(None, ge=0)
    """... and its rank there."""
    tokens: str | None = Field(None, max_length=20_000, pattern=r"^\d+(,\d+)*$")
    """Or the token ids of a row, row start included, parted by commas ..."""
    dest: int | None = Field(None, ge=0)
    """... and the destination."""
    head: int | None = Field(None, ge=0)
    """Of this head alone; without it heads are summed."""

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        stored = self.band is not None and self.rank is not None
        if stored == (self.tokens is not None):
            raise Unfitting("give either band and rank of an example, or tokens", field="tokens")
        return self

    def asked(self, **changes: int | None) -> dict[str, int | str | None]:
        """The address's parameters, with changes."""
        return {**self.model_dump(), **changes}


@dataclass(frozen=True)
class SourcePart:
    """What a component gave by way of one source."""

    position: int
    offset: int
    """Its position less the destination's."""
    text: str
    value: float


@dataclass(frozen=True)
class ComponentPart:
    """What one component gave, sources summed."""

    name: str
    value: float
    share: float
    """|value| over the sum of all components' |values|."""
    by_head: tuple[float, ...]
    """By head, sources summed; of all heads, whichever is asked for."""
    sources: tuple[SourcePart, ...]
    """The sources by way of which it gave most, by size."""


@dataclass(frozen=True)
class ComponentsPage:
    """An example's DFA by component. parts + bias = the pre-activation, where no head is chosen."""

    sae: SaeRef
    index: int
    asked: Asked
    trouble: str
    """Why there is no answer: the engine is away, or the model cannot be split. Empty where there is one."""
    dest: int
    token: str
    """Text of the destination."""
    parts: tuple[ComponentPart, ...]
    """By size, largest first."""
    dfa: float
    """Sum of the DFA of the heads shown, from values and pattern alone."""
    total: float
    """Sum of the parts."""
    bias: float
    preact: float
    gap: float


@router.get("/saes/{sae}/features/{index:int}/components", include_in_schema=False)
@router.get("/saes/{sae}/features/{index:int}/components.json", response_model=ComponentsPage)
@needs("reader", live=True)
def show_components(request: Request, sae: str, index: int, asked: Annotated[Asked, Query()], read: Read) -> Response:
    """An example split by component; nothing of it is stored, so nothing is cached."""
    door = find_sae(read, sae)
    check_index(door, index)
    check_head(door, asked.head)
    question = _question(read, door, index, asked)
    try:
        page = _page(door, index, asked, engine(request).components(question))
    except (EngineAway, UsageError) as error:
        page = ComponentsPage(door.sae, index, asked, str(error), question.dest or 0, "", (), 0.0, 0.0, 0.0, 0.0, 0.0)
    return reply(request, page, "components.html", block="_components.html")


def _question(read: Read, door: Door, index: int, asked: Asked) -> ComponentsQuestion:
    if asked.tokens is not None:
        tokens, dest = [int(token) for token in asked.tokens.split(",")], asked.dest
    else:
        row = example_row(read, door, index, asked.band or 0, asked.rank or 0)
        tokens, dest = list(row.tokens), row.dest
    return ComponentsQuestion(sae=door.sae.name, index=index, tokens=tokens, dest=dest, head=asked.head)


def _page(door: Door, index: int, asked: Asked, answer: LiveComponents) -> ComponentsPage:
    sums = [sum(given) for given in answer.given]
    size = sum(map(abs, sums)) or 1.0
    order = sorted(range(len(sums)), key=lambda i: -abs(sums[i]))
    return ComponentsPage(
        sae=door.sae,
        index=index,
        asked=asked,
        trouble="",
        dest=answer.dest,
        token=answer.texts[answer.dest],
        parts=tuple(
            ComponentPart(answer.names[i], sums[i], abs(sums[i]) / size, tuple(answer.by_head[i]), _sources(answer, i))
            for i in order
        ),
        dfa=sum(answer.dfa),
        total=sum(sums),
        bias=answer.bias,
        preact=answer.preact,
        gap=answer.gap,
    )


def _sources(answer: LiveComponents, component: int) -> tuple[SourcePart, ...]:
    given = answer.given[component]
    largest = sorted((i for i, value in enumerate(given) if value), key=lambda i: -abs(given[i]))[:TOP_SOURCES]
    return tuple(SourcePart(i, i - answer.dest, answer.texts[i], given[i]) for i in largest)
