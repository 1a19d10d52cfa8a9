"""Models, SAEs, harvests, heads and families under `/api/v1`."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from sae_core.errors import NotFound
from server.api.common import LONGEST_NAME, BriefRead, SaeName, api_router, facts, replies, respond
from server.pages.reply import etag, unchanged
from server.store import manage, registry
from server.store.heads import HeadLine, HeadPage, ModelHeads, head_page, head_summaries, model_heads
from server.store.home import SaeCard, sae_cards
from server.store.manage import HarvestLine
from server.store.saes import Count, SaeOverview, SaeRef, find_sae, sae_overview

models = api_router("Models")
router = api_router("SAEs")
harvests = api_router("Harvests")
heads = api_router("Heads and families")

ModelName = Annotated[str, Path(description="Name of the model.", max_length=LONGEST_NAME, examples=["smollm2-135m"])]


@dataclass(frozen=True)
class ModelInfo:
    """A registered model; its shape is null until a worker has loaded it."""

    name: str
    n_layers: int | None
    n_heads: int | None
    n_kv_heads: int | None
    """Heads of a layer, as keys and values count them."""
    d_head: int | None
    d_model: int | None
    """Width of the residual stream."""
    d_vocab: int | None
    """Tokens of its vocabulary."""


@dataclass(frozen=True)
class Models:
    """Every registered model, by name."""

    models: tuple[ModelInfo, ...]
    """By name."""


def _model(record: registry.ModelRecord) -> ModelInfo:
    return ModelInfo(*(getattr(record, name) for name in ModelInfo.__dataclass_fields__))


@models.get("/models", response_model=Models, summary="Every model")
def list_models(read: BriefRead) -> Response:
    """Registered models with their shapes."""
    return respond(Models(tuple(map(_model, registry.models(read)))))


@models.get("/models/{model:path}/heads", response_model=ModelHeads, responses=replies(404), summary="Every head of a model")
def read_model_heads(model: ModelName, read: BriefRead) -> Response:
    """What the features of the newest published SAE of each layer say of its heads."""
    return respond(model_heads(read, model))


@models.get("/models/{model:path}", response_model=ModelInfo, responses=replies(404), summary="One model")
def read_model(model: ModelName, read: BriefRead) -> Response:
    """A model's shape."""
    for record in registry.models(read):
        if record.name == model:
            return respond(_model(record))
    raise NotFound(f"No model is registered as {model}.", field="model")


class SaesQuery(BaseModel):
    """Which SAEs are listed."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    model: str | None = Field(None, max_length=LONGEST_NAME)
    """Only those of this model."""
    layer: int | None = Field(None, ge=0, le=10_000)
    """Only those of this layer."""
    archived: bool = False
    """Those that are archived, in place of the others."""
    after: str | None = Field(None, max_length=LONGEST_NAME)
    """Where the page before this one ended."""
    limit: int = Field(100, ge=1, le=500)
    """SAEs on a page."""


@dataclass(frozen=True)
class Saes:
    """SAEs by name, with their published harvest and what was measured of them."""

    saes: tuple[SaeCard, ...]
    """By name."""
    next: str | None
    """`after` of the next page; null on the last."""


@router.get("/saes", response_model=Saes, summary="Every SAE")
def list_saes(query: Annotated[SaesQuery, Query()], read: BriefRead) -> Response:
    """SAEs by name, those of sweeps too."""
    found = sae_cards(
        read, model=query.model, layer=query.layer, archived=query.archived, after=query.after, limit=query.limit + 1
    )
    shown = found[: query.limit]
    return respond(Saes(shown, shown[-1].sae.name if len(found) > query.limit else None))


@router.get("/saes/{sae}", response_model=SaeOverview, responses=replies(304, 404), summary="One SAE")
def read_sae(request: Request, sae: SaeName, read: BriefRead) -> Response:
    """How good it is, how it was trained, and what its features are like as a whole. A former name leads to the present one."""
    door = find_sae(read, sae)
    tag = etag(request, facts(door), door.metrics) if door.sae.harvest else None  # without one it tells how the running one goes
    return (tag and unchanged(request, tag)) or respond(sae_overview(read, door), tag=tag)


@dataclass(frozen=True)
class Harvests:
    """Harvests, newest first."""

    harvests: tuple[HarvestLine, ...]
    """Newest first."""


@harvests.get("/harvests", response_model=Harvests, summary="Every harvest")
def list_harvests(read: BriefRead) -> Response:
    """Harvests of all SAEs, newest first; of each SAE at most one is published, and its pages show that one."""
    return respond(Harvests(manage.harvest_lines(read)))


@harvests.get("/harvests/{harvest}", response_model=HarvestLine, responses=replies(404), summary="One harvest")
def read_harvest(
    harvest: Annotated[int, Path(description="Id of the harvest.", ge=0, le=2**31 - 1, examples=[1])], read: BriefRead
) -> Response:
    """What was swept, and what became of it."""
    return respond(manage.harvest_line(read, harvest))


@harvests.get("/saes/{sae}/harvests", response_model=Harvests, responses=replies(404), summary="The harvests of an SAE")
def list_harvests_of(sae: SaeName, read: BriefRead) -> Response:
    """Newest first."""
    return respond(Harvests(manage.harvest_lines(read, find_sae(read, sae))))


@dataclass(frozen=True)
class Heads:
    """What an SAE's features say of each head, in order; empty before a harvest is published."""

    sae: SaeRef
    """The SAE."""
    heads: tuple[HeadLine, ...]


@heads.get("/saes/{sae}/heads", response_model=Heads, responses=replies(304, 404), summary="The heads of an SAE's site")
def list_heads(request: Request, sae: SaeName, read: BriefRead) -> Response:
    """How many features each head leads, of which families, and how many things it seems to do."""
    door = find_sae(read, sae)
    tag = etag(request, facts(door))
    return unchanged(request, tag) or respond(Heads(door.sae, head_summaries(read, door)), tag=tag)


@heads.get("/saes/{sae}/heads/{head}", response_model=HeadPage, responses=replies(404), summary="One head")
def read_head(
    sae: SaeName, head: Annotated[int, Path(description="The head.", ge=0, le=10_000, examples=[4])], read: BriefRead
) -> Response:
    """Its features by both shares, where it looks, and what studies of the model found of it."""
    return respond(head_page(read, find_sae(read, sae), head))


@dataclass(frozen=True)
class FamilyCounts:
    """How many live features are of each family."""

    sae: SaeRef
    """The SAE."""
    families: tuple[Count, ...]
    """Most first; `unclear` for those of none. `key` is what the filter `family` of the feature table takes."""
    dead: int
    """Features that never fired."""


@heads.get("/saes/{sae}/families", response_model=FamilyCounts, responses=replies(304, 404), summary="The families of an SAE")
def list_families(request: Request, sae: SaeName, read: BriefRead) -> Response:
    """What the features of an SAE do, counted."""
    door = find_sae(read, sae)
    tag = etag(request, facts(door))
    if known := unchanged(request, tag):
        return known
    overview = sae_overview(read, door)
    return respond(FamilyCounts(door.sae, overview.families, overview.dead), tag=tag)
