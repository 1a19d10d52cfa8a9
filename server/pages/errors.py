"""Errors as people and scripts meet them: one sentence on a page, or one shape of JSON."""

from fastapi import Request, Response
from starlette.responses import HTMLResponse, JSONResponse

from sae_core.errors import HeadscopeError
from server.pages.reply import VARY, render, wants_json, wants_part

TITLES = {
    403: "Refused",
    404: "Not found",
    405: "Not possible",
    422: "That cannot be",
    500: "Something went wrong",
    503: "Not now",
}


def error_response(request: Request, error: HeadscopeError) -> Response:
    """The sentence of `error` in the form that the request wants."""
    headers = {"Vary": VARY, "Cache-Control": "no-store"}
    if wants_json(request) or "application/json" in request.headers.get("accept", ""):
        body = {"error": {"code": error.code, "message": str(error), "field": error.field}}
        return JSONResponse(body, error.status, headers)
    template = "_error.html" if wants_part(request) else "error.html"
    html = render(template, title=TITLES.get(error.status, "Not done"), message=str(error), status=error.status)
    return HTMLResponse(html, error.status, headers)
