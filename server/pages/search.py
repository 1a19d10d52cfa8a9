"""`/search` and `/saes/{sae}/search`: features by token, by what they promote or suppress, and by the text of their examples."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from server.pages.reply import Read, reply
from server.store.saes import find_sae
from server.store.search import Found, Overall, check_kind, search, search_all

router = APIRouter()

Typed = Annotated[str, Query(max_length=20_000)]


@router.get("/search", include_in_schema=False)
@router.get("/search.json", response_model=Overall)
def search_everything(request: Request, read: Read, q: Typed = "") -> Response:
    """Models and SAEs by name, features of every SAE by token, texts."""
    return reply(request, search_all(read, q), "search.html")


@router.get("/saes/{sae}/search", include_in_schema=False)
@router.get("/saes/{sae}/search.json", response_model=Found)
def search_sae(request: Request, sae: str, read: Read, q: Typed = "", kind: str = "text", after: str | None = None) -> Response:
    """Features of one SAE."""
    return reply(request, search(read, find_sae(read, sae), q, check_kind(kind), after), "sae_search.html", block="_found.html")
