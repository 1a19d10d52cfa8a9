"""What every route of `/api/v1` shares: its router, its errors, its tags, who writes, and the document that describes it all."""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi import Path as InPath
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import Field, TypeAdapter
from sqlalchemy.orm import Session
from starlette._utils import get_route_path
from starlette.concurrency import run_in_threadpool
from starlette.routing import Match
from starlette.types import Scope

from sae_core.config import AS_USUAL, Wishes
from sae_core.errors import HeadscopeError, LoginNeeded, UsageError
from server.access import shown
from server.api.described import describe
from server.jobs import Jobs
from server.pages.reply import VERSION, known_schema, to_json
from server.pages.writing import author as typed_author
from server.store.people import author_name
from server.store.saes import Door

PREFIX = "/api/v1"
LONGEST_NAME = 200


class UnknownParameter(UsageError):
    """The address has a parameter that the route does not know."""


class NoJson(HeadscopeError):
    """A body came that is not marked as JSON; a form of another site could have sent it."""

    status = 415


@dataclass(frozen=True)
class ErrorDetail:
    """What was wrong."""

    code: str
    """Stable name for scripts."""
    message: str
    """A sentence for people: what was wrong, where, what to do."""
    field: str | None
    """The parameter or field that it is about."""


@dataclass(frozen=True)
class ErrorReply:
    """Every error has this one shape."""

    error: ErrorDetail
    """What was wrong."""


def refuse_unknown(request: Request) -> None:
    """Raise UnknownParameter for a query parameter that the document does not name."""
    route: APIRoute = request.scope["route"]
    document: Document = request.app.state.api
    known = document.parameters[request.method, route.path_format]
    for name in request.query_params:
        if name not in known:
            there_are = f"there are {', '.join(known)}" if known else "there are none"
            raise UnknownParameter(f"'{name[:60]}' is no parameter here; {there_are}.", field=name[:60])


def refuse_other_bodies(request: Request) -> None:
    """Raise NoJson for a body that is not marked as JSON: other sites' forms can send anything else."""
    headers = request.headers
    empty = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if not empty and request.method != "GET" and kind != "application/json":
        raise NoJson("Send the body as JSON, with the header Content-Type: application/json.")


SCHEMA = "#/components/schemas/{model}"
SAID: Mapping[int | str, str] = {
    304: "Nothing has changed since the ETag that `If-None-Match` names.",
    400: "It cannot be done now.",
    401: "Only for people with an account; send a key.",
    403: "Sent by a page of another site, or more than whoever asks may do.",
    404: "There is no such thing.",
    409: "Somebody else changed it meanwhile.",
    413: "The body is too large.",
    415: "The body is not marked as JSON.",
    422: "A parameter or field is wrong; `field` names it.",
    503: "The database or the engine does not answer now.",
    "4XX": "Any other refusal.",
    "5XX": "Something went wrong here.",
}


def replies(*statuses: int | str) -> dict[int | str, dict[str, Any]]:
    """How errors of these statuses are described. Whatever a route answers, its errors are JSON."""
    refused = {"content": {"application/json": {"schema": {"$ref": SCHEMA.format(model=ErrorReply.__name__)}}}}
    return {status: {"description": SAID[status], **({} if status == 304 else refused)} for status in statuses}


EXAMPLES = Path(__file__).with_name("examples.json")
"""What each route answered once, shortened; `tests/web/api_examples.py` writes it."""
SaeName = Annotated[str, InPath(description="Name of the SAE.", max_length=LONGEST_NAME, examples=["smollm2-l17"])]
Index = Annotated[int, InPath(description="Index of the feature, counted from 0.", ge=0, examples=[3])]
Id = Annotated[int, Field(ge=0, le=2**31 - 1)]
"""A number that both databases take for a key."""


async def _asked(request: Request) -> Request:
    return request


BriefRead = Annotated[Session, Depends(_asked)]
"""A session that reads, for as long as the route's function runs and no longer: `ApiRouter` opens it, in that function's thread.
The pages' `Read` is a dependency, which lasts until the answer is sent."""


class ApiRouter(APIRouter):
    """A router whose routes take few steps: each is a thing to wait for.

    Other addresses are sent on without a look at its routes. A function's session is opened in the thread in which the function
    runs; as a dependency it would be another step into a thread to open it, and one to close it.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether one of its routes takes the address."""
        return super().matches(scope) if get_route_path(scope).startswith(PREFIX) else (Match.NONE, {})

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **about: Any) -> None:
        """A route, as every decorator adds it."""
        read = inspect.signature(endpoint).parameters.get("read")
        super().add_api_route(path, _reading(endpoint, read) if read else endpoint, **about)


def _reading(endpoint: Callable[..., Any], parameter: inspect.Parameter) -> Callable[..., Any]:
    where = f"{endpoint.__module__}.{endpoint.__name__}"
    assert parameter.annotation is BriefRead, f"`read` of {where} is no BriefRead: it would be given the request."
    assert not inspect.iscoroutinefunction(endpoint), f"{where} is async: its session would be closed before it has begun."

    def reads(read: Request, given: Mapping[str, Any]) -> Any:
        with known_schema(read).read() as session:
            return endpoint(read=session, **given)

    @wraps(endpoint)
    async def answers(read: Request, **given: Any) -> Any:
        if endpoint in _quick and read.app.state.db.is_file:
            return reads(read, given)
        return await run_in_threadpool(reads, read, given)

    return answers


F = TypeVar("F", bound=Callable[..., Any])
_quick: set[Callable[..., Any]] = set()


def quick(endpoint: F) -> F:
    """Say of a route that it reads a few rows by their keys. Where the database is a file it is answered at once, since a step
    into a thread and back takes as long as the reading; a server may keep one waiting, and that must not hold up the others."""
    _quick.add(endpoint)
    return endpoint


def api_router(tag: str) -> ApiRouter:
    """A router of the API, whose routes the document shows under `tag`."""
    return ApiRouter(
        prefix=PREFIX,
        tags=[tag],
        dependencies=[Depends(_checked)],
        responses=replies(422, 503, "4XX", "5XX"),
        generate_unique_id_function=lambda route: route.name,
    )


async def _checked(request: Request) -> None:
    refuse_other_bodies(request)
    refuse_unknown(request)


_ETAGS: Mapping[str, Any] = {"type": "string", "examples": ['W/"0f343b0931126a20f17c"']}
ETAG = {
    "description": "What the answer depends on, as one word. It changes whenever the answer does.",
    "schema": _ETAGS,
}
IF_NONE_MATCH = {
    "name": "If-None-Match",
    "in": "header",
    "required": False,
    "description": "ETags of answers that are kept, with commas between: 304 comes instead of one of these.",
    "schema": _ETAGS,
}


def _tell_of_etags(operation: dict[str, Any]) -> None:
    """A route that answers 304 takes `If-None-Match`, and says its ETag in either answer."""
    operation.setdefault("parameters", []).append(IF_NONE_MATCH)
    for status in ("200", "304"):
        operation["responses"][status].setdefault("headers", {})["ETag"] = ETAG


class Document:
    """What some routers are, made when it is first asked for."""

    def __init__(self, routers: Sequence[APIRouter]) -> None:
        self._routers = routers

    @cached_property
    def openapi(self) -> dict[str, Any]:
        """As OpenAPI 3.1."""
        found = get_openapi(
            title="Headscope",
            version=VERSION,
            summary="What attention layers compute, for scripts.",
            description='Everything that the pages show, as JSON. An error is always `{"error": {"code", "message", "field"}}`.',
            routes=[route for router in self._routers for route in router.routes],
            tags=[{"name": str(router.tags[0])} for router in self._routers],
            servers=[{"url": "/"}],
        )
        refusal = TypeAdapter(ErrorReply).json_schema(ref_template=SCHEMA)
        found["components"]["schemas"] |= {**refusal.pop("$defs"), ErrorReply.__name__: refusal}
        describe(found["components"]["schemas"])
        known = json.loads(EXAMPLES.read_text(encoding="utf-8"))
        for operation in (one for operations in found["paths"].values() for one in operations.values()):
            if "304" in operation["responses"]:
                _tell_of_etags(operation)
            answer = next(one for status, one in operation["responses"].items() if status.startswith("2"))
            if operation["operationId"] in known:
                answer["content"]["application/json"]["example"] = known[operation["operationId"]]
        return found

    def methods(self, path: str) -> tuple[str, ...]:
        """What can be asked of a path."""
        return tuple(sorted(method.upper() for method in self.openapi["paths"].get(path, ())))

    @cached_property
    def parameters(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """(method, path) -> the query parameters of each route."""
        return {
            (method.upper(), path): tuple(one["name"] for one in operation.get("parameters", ()) if one["in"] == "query")
            for path, operations in self.openapi["paths"].items()
            for method, operation in operations.items()
        }


def respond(
    value: Any,
    *,
    status: int = 200,
    tag: str | None = None,
    headers: Mapping[str, str] | None = None,
    write: Callable[[Any], bytes] = to_json,
) -> Response:
    """The dataclass `value` as JSON."""
    kept = {"Cache-Control": "private, no-cache", **({"ETag": tag} if tag else {}), **(headers or {})}
    return Response(write(value), status, kept, media_type="application/json")


def facts(door: Door) -> tuple[object, ...]:
    """What answers about an SAE's features depend on: its weights, its published harvest, and what people wrote."""
    return door.sae.sha256, door.sae.harvest and door.sae.harvest.id, door.revision, door.sae.name


def signed(
    request: Request,
    name: Annotated[
        str | None,
        Header(
            alias="X-Author",
            max_length=600,
            description="Who writes; percent-encoded where the name is not plain ASCII. Without it the browser's cookie says it.",
        ),
    ] = None,
) -> str:
    """Who writes: the account's name; without accounts the header `X-Author`, percent-encoded where it is not plain ASCII, or
    the name that the browser keeps, any name."""
    with_accounts = shown(request) is not None
    known = typed_author(request) if with_accounts or name is None else author_name(unquote(name))
    if known is None and with_accounts:
        raise LoginNeeded("Send a key in the header Authorization: Bearer; what you write is signed with your name.")
    if known is None:
        raise UsageError("Say who writes: send your name in the header X-Author.", field="X-Author")
    return known


Signed = Annotated[str, Depends(signed)]


@contextmanager
def queue(request: Request, how: Wishes = AS_USUAL) -> Iterator[Jobs]:
    """The job queue, and how what is put into it is to be done."""
    with closing(Jobs(request.app.state.settings, known_schema(request), how)) as jobs:
        yield jobs


def listed(words: Sequence[str]) -> str:
    """A pattern: some of `words`, with commas between."""
    one = "|".join(words)
    return rf"^({one})(,({one}))*$"
