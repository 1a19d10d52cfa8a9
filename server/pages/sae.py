"""`/saes/{sae}`: how good an SAE is, what its features are like, and the table to find one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse

from sae_core.errors import UsageError
from server.pages.csv_file import csv_stream
from server.pages.feature import View
from server.pages.reply import Read, etag, feature_path, known_schema, link, reply, sae_path, unchanged, wants_part
from server.store.features import FeatureQuery, FeatureTable, beside, check_index, feature_table, random_feature, walk_of
from server.store.heads import HeadLine, head_summaries
from server.store.labels import ListName, lists_of
from server.store.saes import Door, SaeOverview, find_sae, sae_overview

if TYPE_CHECKING:
    from server.db import Database

router = APIRouter()


@dataclass(frozen=True)
class SaePage:
    """An SAE's page: the overview, what its heads do, and a page of its feature table."""

    overview: SaeOverview
    heads: tuple[HeadLine, ...]
    table: FeatureTable
    lists: tuple[ListName, ...]
    """Those that hold features of it."""


@router.get("/saes/{sae}", include_in_schema=False)
@router.get("/saes/{sae}.json", response_model=SaePage)
async def sae_page(request: Request, sae: str, query: Annotated[FeatureQuery, Query()]) -> Response:
    """The overview and the part of the feature table that the address asks for."""
    return await run_in_threadpool(_sae, request, sae, query)


def _sae(request: Request, sae: str, query: FeatureQuery) -> Response:
    # One step into a thread, with a session of its own. A table is too long for the loop's thread: two hundred readers kept it
    # from requests that were there, until their connections counted as idle and were reset.
    with known_schema(request).read() as read:
        door = find_sae(read, sae)
        # Without a published harvest the page tells how the running one goes, which no tag can follow.
        tag = (
            etag(request, door.sae.harvest.id, door.sae.sha256, door.stored_metrics, door.revision) if door.sae.harvest else None
        )
        if tag and (known := unchanged(request, tag)):
            return known
        table = feature_table(read, door, query)
        if not wants_part(request):
            page = SaePage(sae_overview(read, door), head_summaries(read, door), table, lists_of(read, door.id))
    if wants_part(request):
        address = link(sae_path(sae), **query.asked())
        return reply(request, table, "_features.html", tag=tag, headers={"HX-Push-Url": address}, sae=door.sae)
    return reply(request, page, "sae.html", tag=tag)


@router.get("/saes/{sae}/random", include_in_schema=False)
def random_page(sae: str, view: Annotated[View, Query()], read: Read) -> Response:
    """On to some live feature, of those that `from` selects."""
    index = random_feature(read, find_sae(read, sae), FeatureQuery.of_selection(view.came_from))
    return RedirectResponse(link(feature_path(sae, index), **view.asked()), 303, {"Cache-Control": "no-store"})


@router.get("/saes/{sae}/features/{index:int}/next", include_in_schema=False)
@router.get("/saes/{sae}/features/{index:int}/previous", include_in_schema=False)
def beside_page(request: Request, sae: str, index: int, view: Annotated[View, Query()], read: Read) -> Response:
    """On to the feature after or before this one, in what `from` selects and in its order."""
    door, query = find_sae(read, sae), FeatureQuery.of_selection(view.came_from)
    there = beside(read, door, index, query, backward=request.url.path.endswith("/previous"))
    return RedirectResponse(link(feature_path(sae, there), **view.asked()), 303)


@router.get("/saes/{sae}/features.csv", include_in_schema=False)
def features_csv(request: Request, sae: str, query: Annotated[FeatureQuery, Query()], read: Read) -> Response:
    """All that the filter selects, in the table's order, as a file."""
    door = find_sae(read, sae)
    walk_of(door, query)  # a wrong question is answered before the file begins
    return csv_stream(f"{sae} features", COLUMNS, _csv_rows(known_schema(request), door, query))


COLUMNS = (
    "index", "text before", "strongest on", "text after", "strongest source", "source offset", "strongest", "mean", "firings",
    "fires on", "head", "head share by weights", "head by data", "head share by data", "mean dfa of the head", "looks back",
    "family", "verdict", "promotes",
)  # fmt: skip


def _csv_rows(db: "Database", door: Door, query: FeatureQuery) -> Iterator[tuple[object, ...]]:
    # The request's own session ends with the handler, and the file is made after it: a short one for each part.
    at: str | None = query.after
    while True:
        with db.read() as session:
            part = feature_table(session, door, query.model_copy(update={"limit": 200, "after": at, "before": None}))
        for row in part.rows:
            shown = row.snippet
            yield (
                row.index,
                *((shown.before, shown.token, shown.after, shown.source, shown.source_offset) if shown else (None,) * 5),
                *(row.max_act, row.mean_act, row.n_fired, row.density, row.head, row.head_share, row.dfa_head, row.dfa_share),
                *(row.dfa, row.distance, row.family, row.verdict, "|".join(row.promoted)),
            )
        at = part.next
        if at is None:
            return


@router.get("/saes/{sae}/jump", include_in_schema=False)
def jump(sae: str, read: Read, q: str = "") -> Response:
    """On to the feature whose index was typed."""
    door = find_sae(read, sae)
    typed = q.strip().removeprefix("#")
    if not (typed.isascii() and typed.isdigit()):
        raise UsageError(f"'{q}' is no feature; type an index from 0 to {door.sae.d_sae - 1}.", field="q")
    check_index(door, int(typed))
    return RedirectResponse(feature_path(sae, int(typed)), 303)
