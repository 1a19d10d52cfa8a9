"""Features under `/api/v1`: the table with its filters, one feature or a hundred in the parts that are asked for, and exports."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated

from fastapi import Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from sae_core.errors import NotFound
from server.access import needs
from server.api import parts
from server.api.common import LONGEST_NAME, BriefRead, Index, SaeName, api_router, facts, quick, replies, respond
from server.api.export import MEDIA, Selection, Source, exported
from server.api.parts import FeatureParts, Include
from server.pages.reply import etag, known_schema, unchanged
from server.store.features import FeatureTable, TablePart, check_index, feature_pages, feature_table, walk_of
from server.store.saes import Door, find_sae

router = api_router("Features")

MOST = 100
"""Features of one batch."""


@router.get(
    "/saes/{sae}/features",
    response_model=FeatureTable,
    responses=replies(304, 404),
    summary="A page of the feature table",
)
def list_features(request: Request, sae: SaeName, query: Annotated[TablePart, Query()], read: BriefRead) -> Response:
    """Features in the order and with the filters of the SAE's page. `next` is the cursor of the page after this one: give it
    as `after`, with everything else as it was; it is null on the last page. `n_matching` counts all that the filters select."""
    door = find_sae(read, sae)
    tag = etag(request, facts(door), request.url.query)
    return unchanged(request, tag) or respond(feature_table(read, door, query), tag=tag)


@router.get(
    "/saes/{sae}/features/export",
    response_class=Response,
    responses={
        200: {
            "description": "One feature a line (JSON lines, CSV), or a row (Parquet).",
            "content": {media: {"schema": {"type": "string", "format": "binary"}} for media in MEDIA.values()},
            "headers": {"X-Headscope-Features": {"description": "How many features come.", "schema": {"type": "integer"}}},
        },
        **replies(404),
    },
    summary="All features of a selection, as a file",
)
def export_features(request: Request, sae: SaeName, query: Annotated[Selection, Query()], read: BriefRead) -> Response:
    """All that the filters select, in the order asked for, streamed: memory stays small however many there are. JSON lines hold
    what `GET .../features/{index}` answers; CSV and Parquet have the same columns, where CSV writes lists as JSON and Parquet has
    them as nested columns. The header `X-Headscope-Features` says how many come; a stream that breaks off is not complete."""
    door = find_sae(read, sae)
    if door.sae.harvest is None:
        raise NotFound(f"{door.sae.name} has no published harvest yet, so there is nothing to export.", field="sae")
    count = walk_of(door, query).count(read)
    return exported(Source(known_schema(request), door, query, count))


@router.get(
    "/saes/{sae}/features/{index}",
    response_model=FeatureParts,
    responses=replies(304, 404),
    summary="One feature",
)
@quick
def read_feature(request: Request, sae: SaeName, index: Index, query: Annotated[Include, Query()], read: BriefRead) -> Response:
    """A feature's numbers, and the parts that `include` names; parts that are not asked for are null. Without `all_examples`
    the strongest examples and some of each band of activation come; `kept` says how many there are."""
    door = find_sae(read, sae)
    check_index(door, index)
    tag = etag(request, facts(door), index, query)
    if known := unchanged(request, tag):
        return known
    found = read_parts(read, door, [index], query)
    if not found:
        raise NotFound(f"{door.sae.name} has no published harvest with feature {index} yet.", field="index")
    return respond(found[0], tag=tag, write=parts.to_json)


class FeatureKey(BaseModel):
    """Which feature."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    sae: str = Field(min_length=1, max_length=LONGEST_NAME)
    """Name of the SAE."""
    index: int = Field(ge=0)
    """Index of the feature."""


class Batch(Include):
    """Which features are wanted, and what of each."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    features: list[FeatureKey] = Field(min_length=1, max_length=MOST)
    """At most 100, of one SAE or of several."""


@dataclass(frozen=True)
class Features:
    """Features in the order in which they were asked for."""

    features: tuple[FeatureParts, ...]
    """One for each that was asked for; one that is named twice comes twice."""


@router.post(
    "/features/batch",
    response_model=Features,
    responses=replies(403, 404, 413, 415),
    summary="Up to 100 features at once",
    openapi_extra={
        "requestBody": {
            "content": {
                "application/json": {
                    "example": {"features": [{"sae": "smollm2-l17", "index": 3}], "include": "heads,logits"},
                }
            }
        }
    },
)
@needs("anonymous")
def read_batch(batch: Batch, read: BriefRead) -> Response:
    """The features named, in their order, with the parts that `include` names. It reads only; POST is for the size of the
    question. A feature that is not there makes the whole answer a 404 that says which."""
    doors: dict[str, Door] = {}
    wanted: defaultdict[str, list[int]] = defaultdict(list)
    for key in batch.features:
        if key.sae not in doors:
            doors[key.sae] = find_sae(read, key.sae)
        check_index(doors[key.sae], key.index)
        wanted[key.sae].append(key.index)
    found = {
        (name, one.index): one
        for name, indices in wanted.items()
        for one in read_parts(read, doors[name], list(dict.fromkeys(indices)), batch)
    }
    for key in batch.features:
        if (key.sae, key.index) not in found:
            raise NotFound(f"{key.sae} has no published harvest with feature {key.index} yet.", field="features")
    return respond(Features(tuple(found[key.sae, key.index] for key in batch.features)), write=parts.to_json)


def read_parts(read: Session, door: Door, indices: list[int], query: Include) -> list[FeatureParts]:
    """The features that are there, each with the parts asked for."""
    asked = query.parts
    pages = feature_pages(
        read,
        door,
        indices,
        every=query.all_examples,
        others="others" in asked,
        examples=not asked.isdisjoint(parts.OF_EXAMPLES),
        parts=asked,
    )
    return [parts.of_page(page, asked) for page in pages]
