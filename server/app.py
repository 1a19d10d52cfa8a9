"""The whole web product on one screen: `create_app(settings)`. No torch."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import sqlalchemy as sa
from anyio import to_thread
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Scope

from sae_core.errors import DatabaseAway, HeadscopeError, NotFound, Unfitting, UsageError
from server.access import Limits, guard
from server.api import neuronpedia, v1
from server.api import page as api_page
from server.db import Database
from server.oidc import Oidc
from server.overload import Overload
from server.pages import (
    circuit,
    compare,
    components,
    embed,
    feature,
    head,
    health,
    home,
    interventions,
    jobs,
    keys,
    labels,
    lists,
    login,
    manage,
    people,
    prompt,
    ratings,
    sae,
    search,
    start,
    status,
    study,
    sweep,
    writing,
)  # fmt: skip
from server.pages.errors import InternalError, MethodNotAllowed, TooLarge, error_response
from server.proxied import Proxied
from server.resources import resource_path
from server.security import SecurityHeaders, refuse_cross_origin
from server.settings import Settings
from server.transport import Compressed, Heads
from server.watch import Watch, Watched

log = logging.getLogger(__name__)

AWAY = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)
"""What SQLAlchemy raises where the database is away, or has no connection left."""
LARGEST_BODY = 1_000_000
"""Bytes of a request; forms and questions are far smaller."""


def create_app(settings: Settings, shared: Path | None = None) -> FastAPI:
    """The web process. It starts whether or not the database answers; until it does, pages say so. `shared` is a folder in which
    it counts together with others that are forked from it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        to_thread.current_default_thread_limiter().total_tokens = settings.web_threads
        yield
        app.state.db.close()
        if app.state.live is not None:
            app.state.live.close()

    app = FastAPI(
        title="Headscope",
        docs_url=None,  # Swagger's page loads a CDN; /openapi.json is there for tools
        redoc_url=None,
        lifespan=lifespan,
        dependencies=[Depends(refuse_cross_origin), Depends(guard)],
        max_body_size=LARGEST_BODY,
    )
    app.state.settings = settings
    app.state.db = Database(settings.url, connections=settings.web_threads)
    app.state.live = None
    app.state.limits = Limits(settings, shared)
    app.state.oidc = Oidc(settings) if settings.oidc_issuer else None
    app.state.watch = Watch(settings, app.state.db, "web", shared=shared)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=settings.trusted_hosts)
    app.add_middleware(Watched, watch=app.state.watch, on_fault=on_error)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(Compressed)
    app.add_middleware(Heads)
    app.add_middleware(Overload, most=settings.web_waiting, refuse=error_response)
    app.add_middleware(Proxied, settings=settings)  # outermost: nothing else knows of a prefix
    for kind in (Exception, HTTPException, RequestValidationError, HeadscopeError, *AWAY):
        app.add_exception_handler(kind, on_error)
    app.mount("/static", Assets(directory=resource_path("static")))
    about_saes = (manage, head, embed, components, circuit, labels, lists, ratings)
    pages = (home, search, prompt, interventions, *about_saes, compare, start, jobs, sweep, study, status)
    # Routes are tried one after another. The pages of a feature and of an SAE first, since most of what is asked for is one; then
    # the API, which costs others next to nothing.
    for page in (feature, sae):
        app.include_router(page.router)
    v1.mount(app)
    for page in (health, login, keys, people, writing, *pages):
        app.include_router(page.router)
    app.include_router(neuronpedia.router)
    app.include_router(api_page.router)
    return app


def on_error(request: Request, error: Exception) -> Response:
    """Every error becomes one sentence, on a page or in JSON."""
    if isinstance(error, HTTPException) and error.status_code == 405:
        methods = {"Allow": allowed(request, error)}
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=methods)
        response = error_response(request, as_sentence(request, error))
        response.headers.update(methods)
        return response
    return error_response(request, as_sentence(request, error))


def allowed(request: Request, error: HTTPException) -> str:
    """The methods that an address takes. The framework knows those of one route, and the API has a route for each."""
    methods = request.app.state.api.methods(getattr(request.scope.get("route"), "path_format", ""))
    known = methods or tuple((error.headers or {}).get("Allow", "GET").split(", "))
    return ", ".join([*known, *(("HEAD",) if "GET" in known and "HEAD" not in known else ()), "OPTIONS"])


def as_sentence(request: Request, error: Exception) -> HeadscopeError:
    """The error of ours that says what `error` means to a person."""
    if isinstance(error, HeadscopeError):
        return error
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        # Of what may be one thing or another, the last part says which was tried: `constrained-str`, `list[constrained-str]`.
        places = [str(part) for part in first["loc"][1:]]
        field = next((part for part in reversed(places) if part.isidentifier()), places[-1] if places else None)
        what, told = first["msg"].removeprefix("Value error, "), first.get("ctx", {})
        if isinstance(told.get("error"), Unfitting):  # a rule over several fields, which says what to change
            return UsageError(f"{what[:1].upper()}{what[1:]}.", field=told["error"].field)
        if "discriminator" in told:  # what kind of thing it is was not said, or is none
            field = told["discriminator"].strip("'")
        if first["type"] == "json_invalid" or field is None:  # the place is then one in the text, or there is none
            return UsageError(f"The {first['loc'][0]} cannot be read: {what}.", field=str(first["loc"][0]))
        return UsageError(f"{field}: {what}.", field=field)
    if isinstance(error, HTTPException) and error.status_code == 404:
        return NotFound(f"There is no page at {request.url.path}.")
    if isinstance(error, AWAY):
        log.error("the database failed", exc_info=error)
        why = str(error.orig).strip().partition("\n")[0] if isinstance(error, sa.exc.DBAPIError) else "no connection is free"
        return DatabaseAway(f"The database does not answer ({why}). Try again in a moment.")
    if isinstance(error, HTTPException) and error.status_code == 405:
        return MethodNotAllowed(f"{request.method} is not possible at {request.url.path}; possible: {allowed(request, error)}.")
    if isinstance(error, HTTPException) and error.status_code == 413:
        return TooLarge(f"The body has more than {LARGEST_BODY:,} bytes, which is the most that is read.")
    if isinstance(error, HTTPException):
        return with_status(f"{error.detail}.", error.status_code)
    return InternalError("Something went wrong here; the server's log says what.")


def with_status(message: str, status: int) -> HeadscopeError:
    """An error that has no class of its own."""
    error = HeadscopeError(message)
    error.status = status
    return error


class Assets(StaticFiles):
    """Static files. An address with the file's digest may be kept for good."""

    def file_response(self, full_path, stat_result, scope: Scope, status_code: int = 200) -> Response:  # type: ignore[no-untyped-def]
        response = super().file_response(full_path, stat_result, scope, status_code)
        kept = b"v=" in scope["query_string"]
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if kept else "no-cache"
        return response
