"""Homes on SQLite and on PostgreSQL, and worker processes that are quick to start, so that many can be killed."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import sqlalchemy as sa

from sae_core.config import CorpusSource, ModelSource
from server import jobs
from server.db import Database
from server.jobs import Jobs
from server.settings import Settings
from server.store import registry
from tests.jobs.conftest import Home, tiny_folder, tiny_text  # noqa: F401 - fixtures
from tests.processes import CONTEXT, work

BEAT, SILENT = 0.25, 2.0
"""Seconds, in tests: a worker that is stopped for longer than `SILENT` loses its job."""


def quick(folder: Path, url: sa.URL | None = None, **more: object) -> Settings:
    """Settings with a quick heart."""
    address = url.render_as_string(hide_password=False) if url else None
    given = {"data": folder / "data", "cache": folder / "cache", "database_url": address, "device": "cpu"}
    return Settings(**given, beat_seconds=BEAT, silent_seconds=SILENT, **more).prepare()  # type: ignore[arg-type]


def home_of(settings: Settings, model: Path, text: Path) -> Home:
    """Both databases, the tiny model and the tiny corpus."""
    db = Database(settings.url)
    jobs.upgrade(settings, db)
    with db.write() as session:
        registry.add_model(session, "tiny", ModelSource(location=str(model)))
        registry.add_corpus(session, "words", CorpusSource(location=str(text)))
    return Home(settings, db, Jobs(settings, db))


@pytest.fixture
def new_database(postgres: sa.URL, request: pytest.FixtureRequest) -> Iterator[sa.URL]:
    """An empty database of the server's, dropped afterwards."""
    name = f"t{abs(hash(request.node.nodeid)) % 10**9}"
    admin = sa.create_engine(postgres, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"create database {name}"))
    yield postgres.set(database=name)
    with admin.connect() as connection:
        connection.execute(sa.text(f"drop database {name} with (force)"))
    admin.dispose()


class Crew:
    """Worker processes, forked from one that has loaded everything."""

    def __init__(self) -> None:
        self.processes = list[ForkServerProcess]()

    def start(self, settings: Settings) -> ForkServerProcess:
        """One more; it takes the first slot that is free."""
        process = CONTEXT.Process(target=work, args=(settings, settings.data / "logs" / "crew.log"), daemon=True)
        (settings.data / "logs").mkdir(exist_ok=True)
        process.start()
        self.processes.append(process)
        return process

    def send(self, process: ForkServerProcess, number: int) -> None:
        """A signal, unless it is gone."""
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, number)

    def end(self) -> None:
        """Kill all that are left."""
        for process in self.processes:
            self.send(process, signal.SIGKILL)
        for process in self.processes:
            process.join(30)


@pytest.fixture
def crew() -> Iterator[Crew]:
    """Nobody yet; whoever is left at the end is killed."""
    made = Crew()
    yield made
    made.end()


def until(found: Callable[[], object], seconds: float = 120) -> None:
    """Poll until it is true."""
    deadline = time.monotonic() + seconds
    while not found():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s in vain")
        time.sleep(0.05)
