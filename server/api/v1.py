"""`/api/v1`: every route of the API, and the document that describes them."""

from fastapi import FastAPI, Request, Response
from starlette.responses import JSONResponse

from server.api import features, jobs, labels, lists, live, prompts, saes, search
from server.api.common import PREFIX, Document

ROUTERS = (
    *(saes.models, saes.router, saes.harvests, features.router, saes.heads, search.router),
    *(lists.router, labels.router, jobs.router, live.router, prompts.router),
)
"""In the order of the document and of its page."""
DOCUMENT = Document(ROUTERS)


def mount(app: FastAPI) -> None:
    """Add the API to the app."""
    app.state.api = DOCUMENT
    for router in ROUTERS:
        app.include_router(router)
    app.add_route(f"{PREFIX}/openapi.json", _document)


async def _document(request: Request) -> Response:
    prefix = request.app.state.settings.prefix
    beneath = {"servers": [{"url": prefix}]} if prefix else {}
    return JSONResponse({**DOCUMENT.openapi, **beneath}, headers={"Cache-Control": "no-cache"})
