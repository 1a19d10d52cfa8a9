"""`/embed/saes/{sae}/features/{index}`: a feature as a card for a frame or a slide, and its picture for a link in a chat."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator

from server.pages.feature import View
from server.pages.reply import Read, etag, reply, unchanged
from server.preview import feature_svg, png
from server.security import EMBED_HEADERS
from server.store.features import feature_page
from server.store.heads import check_head
from server.store.saes import find_sae

router = APIRouter()

PANELS = ("family", "heads", "tokens", "activation", "distance", "examples")


class Card(BaseModel):
    """How a card looks; its address is exactly this."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    theme: Literal["light", "dark", "auto"] = "auto"
    """Colours; `auto` follows the reader's own choice."""
    panels: str = "family,heads,tokens,examples"
    """What is on it, with commas between: family, heads, tokens, activation, distance, examples."""
    n: int = Field(5, ge=1, le=20)
    """Examples, the strongest first."""
    context: Literal["5", "16", "full"] = "16"
    """Tokens on each side of the destination."""
    head: int | None = Field(None, ge=0)
    """Paint this head's DFA alone."""

    @field_validator("panels")
    @classmethod
    def _are_known(cls, panels: str) -> str:
        unknown = [part for part in panels.split(",") if part.strip() not in PANELS]
        if unknown:
            raise ValueError(f"'{unknown[0]}' is no panel; there are {', '.join(PANELS)}")
        return panels

    @property
    def chosen(self) -> frozenset[str]:
        """The panels on it."""
        return frozenset(part.strip() for part in self.panels.split(","))


@router.get("/embed/saes/{sae}/features/{index:int}", include_in_schema=False)
def embedded(request: Request, sae: str, index: int, card: Annotated[Card, Query()], read: Read) -> Response:
    """The card. It holds no script, so any site may frame it."""
    door = find_sae(read, sae)
    check_head(door, card.head)
    tag = etag(request, door.sae.sha256, door.sae.harvest and door.sae.harvest.id)
    view = View(context=card.context, head=card.head)
    return unchanged(request, tag) or reply(
        request, feature_page(read, door, index), "embed.html", tag=tag, headers=EMBED_HEADERS, card=card, view=view
    )


@router.get("/saes/{sae}/features/{index:int}/preview.png", include_in_schema=False)
def preview(request: Request, sae: str, index: int, read: Read) -> Response:
    """The picture that a chat shows beside a link to the feature."""
    door = find_sae(read, sae)
    tag = etag(request, door.sae.sha256, door.sae.harvest and door.sae.harvest.id)
    known = unchanged(request, tag)
    if known:
        return known
    headers = {"ETag": tag, "Cache-Control": "private, no-cache", "Cross-Origin-Resource-Policy": "cross-origin"}
    return Response(png(feature_svg(feature_page(read, door, index))), headers=headers, media_type="image/png")
