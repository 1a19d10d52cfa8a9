"""Search under `/api/v1`: features by text, by token, by what they promote or suppress, by label."""

from typing import Annotated, Literal

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field

from sae_core.errors import UsageError
from server.api.common import BriefRead, SaeName, api_router, replies, respond
from server.store.saes import find_sae
from server.store.search import Found, Overall, check_kind, search, search_all

router = api_router("Search")

LONGEST = 200
LOGIT = "logit"
"""What a feature does to a token's logit; `promotes` is meant."""


class Everywhere(BaseModel):
    """What is looked for everywhere."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    q: str = Field(min_length=1, max_length=LONGEST, examples=["the"])
    """What to look for."""


class Within(Everywhere):
    """What is looked for in one SAE, and how."""

    kind: Literal["text", "token", "logit", "promotes", "suppresses", "label"] = "text"
    """`text`: examples with these words, one after another; `token`: features that fire on the token; `logit` or `promotes`,
    and `suppresses`: features that promote or suppress it; `label`: features with such a label."""
    after: str | None = Field(None, max_length=LONGEST)
    """Where the page before this one ended."""


@router.get("/search", response_model=Overall, summary="Search everything")
def search_everywhere(query: Annotated[Everywhere, Query()], read: BriefRead) -> Response:
    """Models and SAEs by name, features of every SAE by token, SAEs by text; of the 40 newest published harvests."""
    found = search_all(read, query.q)
    return _found(found)


@router.get("/saes/{sae}/search", response_model=Found, responses=replies(404), summary="Search one SAE")
def search_within(sae: SaeName, query: Annotated[Within, Query()], read: BriefRead) -> Response:
    """Features of one SAE, best first. `next` is `after` of the next page; texts have one page."""
    kind = check_kind("promotes" if query.kind == LOGIT else query.kind)
    return _found(search(read, find_sae(read, sae), query.q, kind, query.after))


def _found(found: Found | Overall) -> Response:
    if found.trouble:
        raise UsageError(found.trouble, field="q")
    return respond(found)
