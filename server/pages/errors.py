"""Errors as people and scripts meet them: one sentence on a page, or one shape of JSON; and as Neuronpedia's scripts do."""

import re

from fastapi import Request, Response
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse

from sae_core.errors import HeadscopeError, LoginNeeded, Renamed, TooOften
from server.access import shown
from server.pages.reply import VARY, link, render, sae_path, wants_json, wants_part


class MethodNotAllowed(HeadscopeError):
    """The address is right, and what was asked of it cannot be."""

    status = 405


class TooLarge(HeadscopeError):
    """The body has more bytes than are read."""

    status = 413


class InternalError(HeadscopeError):
    """A fault of ours; the log says which."""

    status = 500


TITLES = {
    401: "Who are you?",
    403: "Refused",
    404: "Not found",
    405: "Not possible",
    422: "That cannot be",
    429: "Too often",
    500: "Something went wrong",
    503: "Not now",
}


AGAIN = "5"
"""Seconds after which one may ask again what could not be answered now."""


def error_response(request: Request, error: HeadscopeError) -> Response:
    """The sentence of `error` in the form that the request wants."""
    headers = {"Vary": VARY, "Cache-Control": "no-store"}
    if isinstance(error, Renamed) and (address := renamed(request, error)):
        return RedirectResponse(address, 307, headers)
    if isinstance(error, TooOften):
        headers["Retry-After"] = str(error.wait)
    elif error.status == 503:
        headers["Retry-After"] = AGAIN
    if speaks_neuronpedia(request):
        status = 400 if error.status == 422 else error.status
        return JSONResponse({"error": str(error), "message": str(error)}, status, headers)
    if wants_json(request) or "application/json" in request.headers.get("accept", ""):
        body = {"error": {"code": error.code, "message": str(error), "field": error.field}}
        return JSONResponse(body, error.status, headers)
    if (
        isinstance(error, LoginNeeded)
        and request.app.state.settings.accounts
        and request.method == "GET"
        and not wants_part(request)
    ):
        return RedirectResponse(link("/login", back=request.url.path), 303, headers)
    template = "_error.html" if wants_part(request) else "error.html"
    html = render(
        template, title=TITLES.get(error.status, "Not done"), message=str(error), status=error.status, viewer=shown(request)
    )
    return HTMLResponse(html, error.status, headers)


def speaks_neuronpedia(request: Request) -> bool:
    """Is this one of the addresses that answer as Neuronpedia's do? Our own API has its version in each of its."""
    path = request.url.path
    return path.startswith("/api/") and re.match(r"/api/v\d+(/|$)", path) is None


def renamed(request: Request, error: Renamed) -> str | None:
    """The same address with the SAE's present name, where the former one stood in the path."""
    path, query = request.url.path, request.url.query
    for before in ("", "/api/v1"):
        for end in ("", "/", ".json"):
            old = f"{before}/saes/{error.old}{end}"
            if path == old or (end == "/" and path.startswith(old)):
                return f"{before}{sae_path(error.new)}{end}{path.removeprefix(old)}{f'?{query}' if query else ''}"
    return None
