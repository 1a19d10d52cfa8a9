"""Texts that people share, under `/api/v1`."""

from typing import Annotated, Literal

from fastapi import Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from server.api.common import LONGEST_NAME, BriefRead, api_router, replies, respond
from server.live import FeatureAt
from server.pages.writing import reading, writing
from server.store import prompts as store
from server.store.features import check_index
from server.store.prompts import LONGEST, LONGEST_DAYS, SharedPrompt

router = api_router("Shared prompts")

PromptId = Annotated[
    str,
    Path(min_length=1, max_length=32, description="The random id of the shared prompt.", examples=["u0yQm2J1c6mVnKq5bR8sTzXa"]),
]


class NewPrompt(BaseModel):
    """A text to share, with what is looked at in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    text: str = Field(min_length=1, max_length=LONGEST, examples=["The tide came back before dark."])
    """The text, which is stored."""
    against: str | None = Field(None, max_length=LONGEST)
    """A second text that it is compared with."""
    saes: list[Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]] = Field(
        min_length=1, max_length=100, examples=[["smollm2-l17"]]
    )
    """Names of the SAEs that it is put through."""
    at: int | None = Field(None, ge=0, le=1_000_000)
    """A token of the text."""
    feature: FeatureAt | None = None
    """A feature at a token."""
    visibility: Literal["private", "shared", "public"] = "shared"
    """Who sees it, where there are accounts: its owner and admins, everybody with one, or everybody who has the address."""
    days: int | None = Field(30, ge=1, le=LONGEST_DAYS)
    """After how many days it is deleted; null for never."""


@router.post(
    "/prompts", status_code=201, response_model=SharedPrompt, responses=replies(403, 404, 413, 415), summary="Share a text"
)
def share_prompt(request: Request, body: NewPrompt, read: BriefRead) -> Response:
    """Store a text under a random id. The header `Location` is its address."""
    doors = store.asked_doors(read, body.saes)
    feature = body.feature
    if feature is not None:
        door = store.asked_doors(read, [feature.sae])[0]
        check_index(door, feature.index)
        doors = doors if feature.sae in body.saes else [*doors, door]
    view = {"at": body.at, "against_at": None, "feature": feature and feature.model_dump(include={"sae", "index", "dest"})}
    with writing(request) as session:
        made = store.share(
            session, body.text, body.against, model=None, doors=doors, view=view, visibility=body.visibility, days=body.days
        )
    with reading(request) as fresh:
        return respond(store.shared(fresh, made), status=201, headers={"Location": f"/api/v1/prompts/{made}"})


@router.get("/prompts/{prompt_id}", response_model=SharedPrompt, responses=replies(404), summary="A shared text")
def read_prompt(prompt_id: PromptId, read: BriefRead) -> Response:
    """The text, and what was looked at in it. SAEs that you do not see are not named."""
    return respond(store.shared(read, prompt_id))


@router.delete("/prompts/{prompt_id}", response_model=SharedPrompt, responses=replies(403, 404), summary="Delete a shared text")
def delete_prompt(request: Request, prompt_id: PromptId) -> Response:
    """For good; the answer is what it was. Only its owner and admins may."""
    with writing(request) as session:
        was = store.shared(session, prompt_id)
        store.unshare(session, prompt_id)
    return respond(was)
