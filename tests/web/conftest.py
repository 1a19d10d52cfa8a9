"""A filled database shared by all tests that only read, and clients of the web process on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from server.app import create_app
from server.db import Database
from server.settings import Settings
from tests.web.factory import Shape, fill

SAE = "/saes/smollm2-l17"


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a data folder whose database holds one small harvest."""
    folder = tmp_path_factory.mktemp("filled")
    settings = Settings(data=folder, cache=folder / "cache").prepare()
    return put(settings)


@pytest.fixture(scope="session")
def client(filled: Settings) -> Iterator[TestClient]:
    """The web process on the filled database."""
    with TestClient(create_app(filled), base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        yield client


@pytest.fixture
def empty_client(settings: Settings) -> Iterator[TestClient]:
    """The web process on a fresh database with nothing in it."""
    database = Database(settings.url)
    database.upgrade()
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        yield client


def put(settings: Settings, shape: Shape | None = None) -> Settings:
    """Fill the settings' database."""
    database = Database(settings.url)
    fill(database, shape)
    database.close()
    return settings


def at(folder: Path) -> Settings:
    """Settings of a folder."""
    return Settings(data=folder, cache=folder / "cache").prepare()
