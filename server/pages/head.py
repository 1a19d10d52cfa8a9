"""`/saes/{sae}/heads/{head}` and `/models/{model}/heads`: what a head's features say it does, and every head side by side."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict

from server.pages.reply import Read, csv_reply, etag, reply, unchanged
from server.store.heads import HeadLine, HeadPage, ModelHead, ModelHeads, head_page, model_heads
from server.store.saes import find_sae

router = APIRouter()


class HeadsQuery(BaseModel):
    """How the table of every head is sorted; its address is exactly this."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    sort: Literal["head", "data", "weights", "family", "directions", "polysemantic", "spread"] = "head"
    """Column to sort by; numbers come largest first, and what is not known comes last."""


@router.get("/saes/{sae}/heads/{head:int}", include_in_schema=False)
@router.get("/saes/{sae}/heads/{head:int}.json", response_model=HeadPage)
def show_head(request: Request, sae: str, head: int, read: Read) -> Response:
    """One head, next to the others of its layer."""
    door = find_sae(read, sae)
    page = head_page(read, door, head)
    tag = etag(request, door.sae.sha256, door.sae.harvest and door.sae.harvest.id, page.studied and page.studied.study)
    return unchanged(request, tag) or reply(request, page, "head.html", tag=tag)


@router.get("/models/{model:path}/heads.csv", include_in_schema=False)
def every_head_csv(model: str, read: Read) -> Response:
    """Every head of the model, a line each."""
    page = model_heads(read, model)
    return csv_reply(
        f"{model.rsplit('/', 1)[-1]}-heads", list(COLUMNS), [[of(one) for of in COLUMNS.values()] for one in page.heads]
    )


@router.get("/models/{model:path}/heads", include_in_schema=False)
@router.get("/models/{model:path}/heads.json", response_model=ModelHeads)
def every_head(request: Request, model: str, query: Annotated[HeadsQuery, Query()], read: Read) -> Response:
    """The paper's table of every head, over the newest published SAE of each layer."""
    page = model_heads(read, model)
    return reply(request, page, "heads.html", query=query, lines=in_order(page.heads, query))


def in_order(heads: Sequence[ModelHead], query: HeadsQuery) -> list[ModelHead]:
    """The heads as the query sorts them."""
    value = SORTS.get(query.sort)
    if value is None:
        return list(heads)
    return sorted(heads, key=lambda one: (found := value(one.line)) is None or -found)


SORTS: Mapping[str, Callable[[HeadLine], float | None]] = {
    "data": lambda line: line.n_led,
    "weights": lambda line: line.n_led_norm,
    "family": lambda line: line.family.features if line.family else 0,
    "directions": lambda line: line.diversity,
    "polysemantic": lambda line: line.polysemantic,
    "spread": lambda line: line.detail.get("participation"),
}
COLUMNS: Mapping[str, Callable[[ModelHead], Any]] = {
    "layer": lambda one: one.layer,
    "head": lambda one: one.line.head,
    "sae": lambda one: one.sae,
    "leads_by_data": lambda one: one.line.n_led,
    "leads_by_weights": lambda one: one.line.n_led_norm,
    "main_family": lambda one: one.line.family and one.line.family.key,
    "families": lambda one: " ".join(f"{count.key}={count.features}" for count in one.line.families),
    "directions": lambda one: one.line.diversity,
    "polysemantic": lambda one: one.line.polysemantic,
    "polysemantic_of_fifty": lambda one: one.line.detail.get("polysemantic_of_many"),
    "spread_over_heads": lambda one: one.line.detail.get("participation"),
    "top_features": lambda one: " ".join(str(feature.index) for feature in one.line.top),
}
"""Columns of the CSV, by name."""
