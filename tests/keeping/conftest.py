"""Data folders that hold a harvest whose SAE has files, on SQLite and on PostgreSQL."""

import hashlib
import json
import uuid
from pathlib import Path

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from server import jobs
from server.app import create_app
from server.db import Database
from server.settings import Settings
from server.tables import SAE
from tests.web.factory import Shape, fill

PATHS = (
    "/", "/jobs", "/saes/smollm2-l17", "/saes/smollm2-l17/features/0", "/saes/smollm2-l17/features/3.json",
    "/saes/smollm2-l17/heads/2", "/saes/smollm2-l17/search?q=canberra",
)  # fmt: skip
SMALL = Shape(n_features=40, n_dead=3)


def new_database(postgres: sa.URL) -> str:
    """The address of an empty database of the server."""
    name = f"keep_{uuid.uuid4().hex[:10]}"
    engine = sa.create_engine(postgres, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"create database {name}"))
    engine.dispose()
    return postgres.set(database=name).render_as_string(hide_password=False)


def home(folder: Path, url: str | None = None, shape: Shape | None = SMALL) -> Settings:
    """A data folder with both databases; filled unless `shape` is None."""
    settings = Settings(data=folder, cache=folder.parent / "cache", database_url=url).prepare()
    database = Database(settings.url)
    jobs.upgrade(settings, database)
    if shape is not None:
        fill(database, shape)
        weights = settings.data / "saes" / shape.sae
        weights.mkdir(parents=True)
        (weights / "sae.safetensors").write_bytes(b"weights" * 1000)
        (weights / "cfg.json").write_text("{}")
        with database.write() as session:
            for row in session.scalars(sa.select(SAE)):
                row.folder = f"saes/{row.name}"
                row.sha256 = hashlib.sha256((weights / "sae.safetensors").read_bytes()).hexdigest()
        from server.store import search

        search.write(database, 1, search.unfenced)
    database.close()
    return settings


def pages(settings: Settings) -> dict[str, str]:
    """What the web process answers."""
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        found = {}
        for path in PATHS:
            answer = client.get(path)
            assert answer.status_code == 200, (path, answer.text[:300])
            # An object's keys have no order, and PostgreSQL keeps none.
            found[path] = json.dumps(answer.json(), sort_keys=True) if path.endswith(".json") else answer.text
        return found


@pytest.fixture(params=["sqlite", "postgresql"])
def filled(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """A filled data folder on each kind of database."""
    url = new_database(request.getfixturevalue("postgres")) if request.param == "postgresql" else None
    return home(tmp_path / "data", url)


@pytest.fixture
def empty(filled: Settings, request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings of an empty data folder, of the same kind."""
    url = new_database(request.getfixturevalue("postgres")) if filled.database_url else None
    return Settings(data=tmp_path / "restored", cache=tmp_path / "cache", database_url=url).prepare()
