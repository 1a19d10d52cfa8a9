"""Every page is reached by links from the first one, and no link leads nowhere."""

import importlib
import pkgutil
import re
from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

import pytest
import sqlalchemy as sa
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server import jobs, pages
from server.app import create_app
from server.db import Database
from server.settings import Settings
from server.store import labels, lists, prompts, ratings, search
from server.store.saes import find_sae
from server.tables import SAE, now
from tests.web.conftest import at, put
from tests.web.factory import Shape, add_sae
from tests.web.reading import Reader
from tests.web.test_study import keep, of_every_head
from tests.web.test_sweep import add_sweep

LAB = "https://lab.example"
EACH = 3
"""Addresses of one kind that are looked at."""
NO_PAGES = {
    **dict.fromkeys(("/healthz", "/readyz", "/metrics"), "for machines"),
    **dict.fromkeys(("/login/oidc", "/login/oidc/back"), "only where a login service is set up"),
    "/embed/saes/{sae}/features/{index:int}": "for a frame; the feature's page says its address in a text to copy",
    "/saes/{sae}/features/{index:int}/next": "leads on to a feature, from one that was opened in a filtered table",
    "/saes/{sae}/features/{index:int}/previous": "the same",
    "/jobs/{job_id}/events": "a stream that the job's page follows",
    "/prompts/{prompt_id}/circuit": "where a shared text's circuit is kept, once an engine has found what fires in it",
    "/start": "where the printed address leads, with its token",
    **dict.fromkeys(("/login", "/keys", "/people", "/audit"), "only where there are accounts"),
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a database in which there is something of everything."""
    settings = put(at(tmp_path_factory.mktemp("links")), Shape(n_features=16, n_dead=1))
    keep(settings, *of_every_head())
    database = Database(settings.url)
    jobs.upgrade(settings, database)
    with database.write() as session:
        add_sae(session, Shape(sae="other-l17", n_features=12, n_dead=1, seed=1, running_job=False))
        add_sweep(session, made=3)
        session.execute(sa.update(SAE).where(SAE.name == "other-l17").values(archived_at=now()))
        door = find_sae(session, "smollm2-l17")
        labels.add_label(session, door.id, 3, "dates", "Maren")
        lists.add(session, lists.create(session, "Mine", "", "Maren"), door.id, 3, "", "Maren")
        ratings.create(session, door, 4, 1, "Maren")
        view = {"at": None, "against_at": None, "feature": None}
        prompts.share(session, "The tide", None, model=None, doors=[door], view=view, visibility="shared", days=None)
    search.write(database, 1, search.unfenced)
    database.close()
    return settings


def proxied(app: ASGIApp, prefix: str, *, strips: bool) -> ASGIApp:
    """A reverse proxy before `app`: it knows `prefix` alone, and hands on what is below it, whole or without it."""

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["path"].startswith(f"{prefix}/"):
            return await PlainTextResponse("of another program", 404)(scope, receive, send)
        if scope["type"] == "http" and strips:
            others = [header for header in scope["headers"] if header[0] != b"host"]
            scope = {**scope, "path": scope["path"].removeprefix(prefix), "headers": [*others, (b"host", b"127.0.0.1:8000")]}
        return await app(scope, receive, send)

    return proxy


class Site(NamedTuple):
    """Where the pages are: a client, and what stands before every path."""

    client: TestClient
    origin: str
    prefix: str


WAYS = {
    "plain": ("http://127.0.0.1:8000", "", False),
    "proxied": (LAB, "/headscope", False),
    "stripped": (LAB, "/headscope", True),
}


@pytest.fixture(scope="module", params=list(WAYS))
def site(request: pytest.FixtureRequest, everything: Settings) -> Iterator[Site]:
    """The web process: by itself, and behind a proxy that hands on the prefix or takes it off."""
    origin, prefix, strips = WAYS[request.param]
    settings = everything.model_copy(update={"public_url": f"{origin}{prefix}/"} if prefix else {})
    app = proxied(create_app(settings), prefix, strips=strips) if prefix else create_app(settings)
    with TestClient(app, base_url=origin, follow_redirects=False) as client:
        author = client.post(f"{prefix}/author", data={"author": "Maren", "back": "/lists"}, headers={"Origin": origin})
        assert (author.status_code, author.headers["location"]) == (303, f"{prefix}/lists")
        yield Site(client, origin, prefix)


def kinds() -> list[tuple[str, re.Pattern[str]]]:
    """Every address that answers GET with a page."""
    modules = [importlib.import_module(f"{pages.__name__}.{one.name}") for one in pkgutil.iter_modules(pages.__path__)]
    routes = [route for module in modules for route in getattr(getattr(module, "router", None), "routes", ())]
    found = [(route.path, route.path_regex) for route in routes if isinstance(route, APIRoute) and "GET" in route.methods]
    return [one for one in found if not one[0].endswith(".json")]


def kind_of(path: str) -> str | None:
    return next((kind for kind, shape in kinds() if shape.match(path)), None)


def test_every_page_is_reached_from_the_first_and_no_link_is_broken(site: Site) -> None:
    first = f"{site.prefix}/"
    waiting, seen, times, broken = deque([first]), {first}, Counter[str](), list[str]()
    while waiting:
        address = waiting.popleft()
        kind = kind_of(urlsplit(address).path.removeprefix(site.prefix))
        if kind is None or kind in NO_PAGES or times[kind] >= EACH:
            continue
        times[kind] += 1
        answer = site.client.get(address)
        if answer.status_code >= 400 and not (answer.status_code == 503 and kind.endswith("/circuit")):  # no engine runs here
            broken.append(f"{address}: {answer.status_code}")
        ways = [answer.headers.get("location", "")]
        if answer.headers.get("content-type", "").startswith("text/html"):
            page = Reader(answer.text)
            ways += [a["href"] for a in page.all("a")] + [a.get("hx-get", "") for _, a in page.elements]
            ways += [a["src"] for a in page.all("img")] + [a.get("content", "") for a in page.all("meta") if "property" in a]
            ways = [way.removeprefix(site.origin) for way in ways]
            # A form is filled with what one would type of it.
            ways += [f"{form['action']}?q=the" for form in page.all("form") if form.get("role") == "search"]
            ways = [way.replace("/jump?q=the", "/jump?q=3") for way in ways]
            astray = [
                f"{address}: {name}={value}"
                for _, attributes in page.elements
                for name, value in attributes.items()
                if name != "value" and value.startswith("/") and not value.startswith(first)
            ]
            broken += astray
        for way in ways:
            there = urljoin(address, way).partition("#")[0]
            if way and there.startswith("/") and there not in seen:
                seen.add(there)
                waiting.append(there)
    assert broken == []
    assert {kind for kind, _ in kinds()} - set(times) - set(NO_PAGES) == set()


def test_what_is_left_out_is_there() -> None:
    assert set(NO_PAGES) <= {kind for kind, _ in kinds()}
