"""How every page answers: the whole page, one block of it for htmx, or the same dataclass as JSON."""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlencode

from fastapi import Depends, Request, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import TypeAdapter
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse

from sae_core.errors import UsageError
from server import access, charts, lines, panels, rendering
from server.figures import SCHEMES, Figure, collecting, pick, standalone
from server.markup import token_chip, token_text, written
from server.proxied import prefixed
from server.resources import resource_path

if TYPE_CHECKING:
    from server.db import Database

VERSION = version("headscope")
SVG_CSP = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
"""Of an SVG file, which holds its own style and nothing else."""
VARY = "HX-Request, HX-Request-Type, HX-History-Restore-Request"


def read(request: Request) -> Iterator[Session]:
    """A session that reads, for as long as the request lasts; a sentence when the schema is not the one we know."""
    with known_schema(request).read() as session:
        yield session


def known_schema(request: Request) -> "Database":
    """The app's database as whoever asks sees it, once it is sure that its schema is the one we know."""
    return access.seen(request)


Read = Annotated[Session, Depends(read)]


async def made_quickly(make: Callable[..., Response], request: Request, *args: Any) -> Response:
    """What `make` answers with a few rows read by their keys. Where the database is a file it is made right here, since a step
    into a thread and back took a fifth of a page's time; a server may keep one waiting, and that must not hold up the others."""
    if request.app.state.db.is_file:
        return make(request, *args)
    return await run_in_threadpool(make, request, *args)


def wants_json(request: Request) -> bool:
    """Is this the address of a page's JSON twin, or of the API?"""
    return request.url.path.endswith(".json") or request.url.path.startswith("/api/")


def wants_part(request: Request) -> bool:
    """Did htmx ask for a block? Going back in the history asks for the whole page."""
    headers = request.headers
    return (
        headers.get("hx-request") == "true"
        and headers.get("hx-request-type") == "partial"
        and headers.get("hx-history-restore-request") != "true"
    )


def etag(request: Request, *facts: object) -> str:
    """Changes whenever the answer may: with the facts, the version, the templates, the kind of answer, and who asks. It is weak:
    the same answer may be sent compressed or not."""
    variant = "json" if wants_json(request) else "part" if wants_part(request) else "page"
    text = repr((VERSION, build(), request.app.state.settings.prefix, variant, access.tag_of(request), facts))
    return f'W/"{hashlib.sha256(text.encode()).hexdigest()[:20]}"'


def unchanged(request: Request, tag: str) -> Response | None:
    """304 when the browser already has `tag`; None when the page must be made."""
    known = [given.strip().removeprefix("W/") for given in request.headers.get("if-none-match", "").split(",")]
    held = tag.removeprefix("W/") in known or known == ["*"]  # which stands for whatever is there
    return Response(status_code=304, headers=_headers(tag)) if held else None


def reply(
    request: Request,
    page: Any,
    template: str,
    *,
    block: str | None = None,
    tag: str | None = None,
    status: int = 200,
    headers: dict[str, str] | None = None,
    **view: Any,
) -> Response:
    """`page` as JSON, as `block` of the page, or as the whole `template`, as the request wants it.

    `view` is what the template needs beyond the page's facts: what is chosen, not what is known.
    """
    headers = {**_headers(tag), **(headers or {})}
    if wants_json(request):
        return Response(to_json(page), status, headers, media_type="application/json")
    asked = request.query_params.get("figure")
    chosen = block if block and wants_part(request) and not asked else template
    with collecting(request.url.query) as figures:
        text = render(chosen, page=page, origin=origin(request), viewer=access.shown(request), **view)
    if asked:
        return _file(*pick(figures, asked), request.query_params.get("scheme", "light"))
    return HTMLResponse(text, status, headers)


def _file(figure: Figure, kind: str, scheme: str) -> Response:
    """A figure of a page as a file."""
    if kind == "csv" and figure.data:
        return csv_reply(figure.name, figure.data.header, figure.data.rows)
    if scheme not in SCHEMES:
        raise UsageError(f"'{scheme}' is no colour scheme; there are {' and '.join(SCHEMES)}.", field="scheme")
    name = f'inline; filename="{file_name(figure.name)}.svg"'
    headers = {"Content-Disposition": name, "Cache-Control": "private, no-cache", "Content-Security-Policy": SVG_CSP}
    return Response(standalone(figure, scheme), headers=headers, media_type="image/svg+xml")


def csv_reply(name: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Response:
    """Rows as a file to keep, called `name`.csv; an empty cell is a value that is not known."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *rows])
    headers = {"Content-Disposition": f'attachment; filename="{file_name(name)}.csv"', "Cache-Control": "private, no-cache"}
    return Response(text.getvalue(), headers=headers, media_type="text/csv; charset=utf-8")


def file_name(name: str) -> str:
    """`name` with nothing in it that a file's name or a header cannot hold."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "headscope"


def to_json(page: Any) -> bytes:
    """The dataclass `page` as JSON."""
    kind = type(page)
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind].dump_json(page)


_adapters: dict[type, TypeAdapter[Any]] = {}


def _headers(tag: str | None) -> dict[str, str]:
    headers = {"Vary": VARY, "Cache-Control": "private, no-cache"}
    return {**headers, "ETag": tag} if tag else headers


def origin(request: Request) -> str:
    """What stands before the path in an address that is sent elsewhere; no slash at its end."""
    settings = request.app.state.settings
    return settings.address if settings.public_url else str(request.base_url).rstrip("/")


def link(path: str, **params: Any) -> str:
    """An address of ours; parameters that are None are left out."""
    given = {key: value for key, value in params.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def sae_path(name: str) -> str:
    """The address of an SAE's page."""
    return f"/saes/{quote(name, safe='')}"


def feature_path(sae: str, index: int) -> str:
    """The address of a feature's page."""
    return f"{sae_path(sae)}/features/{index}"


def head_path(sae: str, head: int) -> str:
    """The address of a head's page."""
    return f"{sae_path(sae)}/heads/{head}"


def heads_path(model: str) -> str:
    """The address of the table of a model's heads."""
    return f"/models/{quote(model)}/heads"


def asset(name: str) -> str:
    """The address of a static file; it changes with the file, so browsers may keep it for good."""
    return f"/static/{name}?v={build()}"


@lru_cache
def build() -> str:
    """A digest of templates and static files."""
    digest = hashlib.sha256()
    for folder in ("templates", "static"):
        for path in sorted(resource_path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def render(template: str, **view: Any) -> str:
    """The template as HTML."""
    return prefixed(environment().get_template(template).render(**view))


@lru_cache
def environment() -> Environment:
    """Jinja with our filters. Everything is escaped, and a name that a template gets wrong is an error."""
    jinja = Environment(
        loader=FileSystemLoader(Path(resource_path("templates"))),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,  # looking at each file's time costs more than many a block; `build` reads them once as well
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = ("size", "num", "signed", "fixed", "percent", "count", "duration", "moment", "clock")
    jinja.filters.update({name: getattr(rendering, name) for name in names})
    jinja.filters.update(token_text=token_text, token_chip=token_chip, written=written)
    jinja.globals.update(link=link, sae_path=sae_path, feature_path=feature_path, head_path=head_path, heads_path=heads_path)
    jinja.globals.update(asset=asset, version=VERSION, asdict=asdict, viewer=None)
    jinja.globals.update(rendering=rendering, charts=charts, panels=panels, lines=lines)
    return jinja
