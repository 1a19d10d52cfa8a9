"""`/saes/{sae}`: how good an SAE is, what its features are like, and the table to find one."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import RedirectResponse

from sae_core.errors import UsageError
from server.pages.reply import Read, etag, link, reply, sae_path, unchanged, wants_part
from server.store.features import FeatureQuery, FeatureTable, check_index, feature_table, random_feature
from server.store.heads import HeadLine, head_summaries
from server.store.saes import SaeOverview, find_sae, sae_overview

router = APIRouter()


@dataclass(frozen=True)
class SaePage:
    """An SAE's page: the overview, what its heads do, and a page of its feature table."""

    overview: SaeOverview
    heads: tuple[HeadLine, ...]
    table: FeatureTable


@router.get("/saes/{sae}", include_in_schema=False)
@router.get("/saes/{sae}.json", response_model=SaePage)
def sae_page(request: Request, sae: str, query: Annotated[FeatureQuery, Query()], read: Read) -> Response:
    """The overview and the part of the feature table that the address asks for."""
    door = find_sae(read, sae)
    # Without a published harvest the page tells how the running one goes, which no tag can follow.
    tag = etag(request, door.sae.harvest.id, door.sae.sha256, door.metrics, door.revision) if door.sae.harvest else None
    if tag and (known := unchanged(request, tag)):
        return known
    table = feature_table(read, door, query)
    if wants_part(request):
        address = link(sae_path(sae), **query.asked())
        return reply(request, table, "_features.html", tag=tag, headers={"HX-Push-Url": address}, sae=door.sae)
    return reply(request, SaePage(sae_overview(read, door), head_summaries(read, door), table), "sae.html", tag=tag)


@router.get("/saes/{sae}/random", include_in_schema=False)
def random_page(sae: str, read: Read) -> Response:
    """On to some live feature."""
    index = random_feature(read, find_sae(read, sae))
    return RedirectResponse(f"{sae_path(sae)}/features/{index}", 303, {"Cache-Control": "no-store"})


@router.get("/saes/{sae}/jump", include_in_schema=False)
def jump(sae: str, read: Read, q: str = "") -> Response:
    """On to the feature whose index was typed."""
    door = find_sae(read, sae)
    typed = q.strip().removeprefix("#")
    if not (typed.isascii() and typed.isdigit()):
        raise UsageError(f"'{q}' is no feature; type an index from 0 to {door.sae.d_sae - 1}.", field="q")
    check_index(door, int(typed))
    return RedirectResponse(f"{sae_path(sae)}/features/{int(typed)}", 303)
