"""A filled database shared by all tests that only read, and clients of the web process on it."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest
import sqlalchemy as sa
import uvicorn
from fastapi.testclient import TestClient
from playwright.sync_api import Page
from starlette.types import ASGIApp

from sae_core.config import SAEConfig, Site
from server import jobs
from server.app import create_app
from server.db import Database, sqlite_path
from server.settings import Settings
from server.tables import SAE as SaeRow
from tests.upgraded import upgraded
from tests.web.factory import Shape, fill
from tests.web.walk import listening

SAE = "/saes/smollm2-l17"


class Visit(Protocol):
    """Makes a visitor who says to be called so; None says nothing."""

    def __call__(self, name: str | None = "Maren") -> TestClient: ...


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a data folder whose database holds one small harvest."""
    return put(at(tmp_path_factory.mktemp("filled")))


@pytest.fixture(scope="session")
def client(filled: Settings) -> Iterator[TestClient]:
    """The web process on the filled database."""
    with TestClient(create_app(filled), base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        yield client


@pytest.fixture
def quiet_page(page: Page) -> Iterator[Page]:
    """A page on which any complaint of the browser fails the test."""
    yield from listening(page)


@pytest.fixture
def empty_client(settings: Settings) -> Iterator[TestClient]:
    """The web process on a fresh database with nothing in it."""
    upgraded(settings, queue=False).close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        yield client


def put(settings: Settings, shape: Shape | None = None) -> Settings:
    """Fill the settings' database; a new SQLite file becomes a copy of one that was filled alike, which takes a second."""
    shape, path = shape or Shape(), sqlite_path(settings.url)
    if path is None or path.exists():
        _filled(settings, shape)
    elif (made := _made.get(repr(shape))) is not None:
        path.write_bytes(made)
    else:
        _filled(settings, shape)
        assert not path.with_name(f"{path.name}-wal").exists()
        _made[repr(shape)] = path.read_bytes()
    return settings


_made: dict[str, bytes] = {}


def _filled(settings: Settings, shape: Shape) -> None:
    database = Database(settings.url)
    fill(database, shape)
    database.close()


def at(folder: Path) -> Settings:
    """Settings of a folder, whose engine is where none listens, whatever else runs on this machine."""
    return Settings(data=folder, cache=folder / "cache", engine_port=9).prepare()


@contextmanager
def database_of(settings: Settings) -> Iterator[Database]:
    """The settings' database."""
    database = Database(settings.url)
    yield database
    database.close()


def queued(settings: Settings) -> Settings:
    """The settings' database with a job queue, and with SAEs of which all is known that a job about them asks for."""
    database = Database(settings.url)
    jobs.upgrade(settings, database)
    with database.write() as session:
        for row in session.scalars(sa.select(SaeRow)):
            row.config = SAEConfig(
                arch="batchtopk", d_in=row.d_in, d_sae=row.d_sae, k=row.k, n_heads=row.n_heads, d_head=64,
                site=Site(layer=row.layer), model="smollm2-135m", model_fingerprint="f", processing={}, scale=1.0,
                max_norm=None, context=64,
            ).model_dump(mode="json")  # fmt: skip
    database.close()
    return settings


def listened(settings: Settings) -> Iterator[str]:
    """The web process, really listening; gives its address."""
    with served(create_app(settings)) as address:
        yield address


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """The address of an app that really listens."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(5)
    listener.close()


@pytest.fixture
def peopled(settings: Settings) -> Settings:
    """Settings of a filled database of the test's own, to write into."""
    return put(settings)


@pytest.fixture
def visit(peopled: Settings) -> Iterator[Visit]:
    """Visitors of the web process on a database of the test's own."""
    app = create_app(peopled)

    def visitor(name: str | None = "Maren") -> TestClient:
        client = TestClient(app, base_url="http://127.0.0.1:8000", follow_redirects=False)
        if name is not None:
            assert client.post("/author", data={"author": name}).status_code == 303
        return client

    with TestClient(app):
        yield visitor


@pytest.fixture
def maren(visit: Visit) -> TestClient:
    """A visitor called Maren."""
    return visit("Maren")
