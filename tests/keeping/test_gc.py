"""What nothing needs is listed and goes; what a job may need stays, also when it comes to need it between the two."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from sae_core.config import CorpusSource
from server import cli
from server.db import Database
from server.jobs import Jobs
from server.keeping import gc
from server.settings import Settings
from server.store import jobs as store
from server.store import registry
from server.tables import Feature, Harvest, Job
from tests.keeping.conftest import home

OLD = time.time() - 40 * gc.DAY


@pytest.fixture
def database(filled: Settings):  # type: ignore[no-untyped-def]
    found = Database(filled.url)
    yield found
    found.close()


def put(folder: Path, *, old: bool = False, size: int = 10_000) -> Path:
    """A folder with a file."""
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"x" * size)
    if old:
        age(folder)
    return folder


def age(path: Path) -> None:
    for inner in (*path.rglob("*"), path):
        os.utime(inner, (OLD, OLD))


def job(database: Database, name: str, status: str, *, kind: str = "train", parent: str | None = None, **config: object) -> None:
    with database.write() as session:
        session.add(Job(id=name, kind=kind, title=name, config=config, status=status, parent_id=parent, finished_at=store.now()))


def rows(folder: Path, location: str) -> Path:
    put(folder)
    (folder / "rows.json").write_text(f'{{"source": {{"location": "{location}"}}}}')
    return folder


def test_what_is_not_needed_is_listed_and_what_is_stays(filled: Settings, database: Database) -> None:
    data = filled.data
    with database.write() as session:
        registry.add_corpus(session, "here", CorpusSource(location="/text/here"))
    job(database, "train-done-1", "done")
    job(database, "train-parent-1", "done")
    job(database, "harvest-child", "queued", parent="train-parent-1")
    job(database, "train-failed-1", "failed")
    job(database, "train-old-1", "cancelled")
    job(database, "train-new-1", "running", cache="used")
    job(database, "train-past-1", "done", cache="past")
    go = [
        put(data / "jobs" / "nobody"), put(data / "jobs" / "train-done-1"), put(data / "jobs" / "train-old-1", old=True),
        rows(data / "rows" / "aaaa", "/text/gone"), put(data / "saes" / "orphan"), put(data / "activations" / "stray", old=True),
        put(data / "rows" / "bbbb.part-x1", old=True), put(data / ".aside-q", old=True),
    ]  # fmt: skip
    stay = [
        put(data / "jobs" / "train-parent-1"), put(data / "jobs" / "harvest-child"), put(data / "jobs" / "train-failed-1"),
        put(data / "jobs" / "train-new-1", old=True), rows(data / "rows" / "cccc", "/text/here"),
        put(data / "rows" / "dddd.part-x2"),
        put(data / "saes" / "new"), put(data / "activations" / "used", old=True), put(data / "activations" / "past", old=True),
        data / "saes" / "smollm2-l17", put(data / "saes" / "failed"),
    ]  # fmt: skip
    (data / "logs").mkdir(exist_ok=True)
    for name in ("worker-9.log", "fresh.log"):
        (data / "logs" / name).write_text("said")
    os.utime(data / "logs" / "worker-9.log", (OLD, OLD))
    with database.write() as session:  # an SAE that an open import will make; and one whose run failed is none
        session.add(Job(id="import-failed-1", kind="import", title="t", config={}, status="queued"))
        session.add(Harvest(sae_id=1, corpus_id=1, job_id="lost", config={}, context=8))
    found = gc.find(filled, database)
    names = {one.what for one in found}
    assert names == {str(path.relative_to(data)) for path in go} | {"logs/worker-9.log", "harvest 2 of smollm2-l17"}
    assert all(one.why for one in found)
    sizes = {one.what: one.bytes for one in found}
    assert 10_000 <= sizes["jobs/nobody"] < 20_000
    assert all(path.exists() for path in (*go, *stay)), "looking changes nothing"
    with_caches = {one.what for one in gc.find(filled, database, caches=True)} - names
    assert with_caches == {"activations/past"}
    assert {one.what for one in gc.find(filled, database, days=0)} - names >= {"jobs/train-failed-1", "logs/fresh.log"}
    assert {one.what for one in gc.collect(filled, database, found)} == names
    assert [path for path in go if path.exists()] == []
    assert all(path.exists() for path in stay)
    assert [path.name for path in data.iterdir() if path.name.startswith(".gone")] == []
    with database.read() as session:
        assert session.scalar(sa.select(sa.func.count(Harvest.id))) == 1
        assert session.scalar(sa.select(sa.func.count(Feature.id))) == 40
    assert gc.find(filled, database) == []


def test_the_command_says_what_would_go_and_goes_only_when_asked(tmp_path: Path) -> None:
    settings = home(tmp_path / "data", shape=None)
    put(settings.data / "jobs" / "nobody", size=3_000_000)
    said = CliRunner().invoke(cli.app, ["gc", "--data", str(settings.data)]).output
    assert "jobs/nobody" in said
    assert "3.0 MB would be given back; add --yes." in said
    assert (settings.data / "jobs" / "nobody").exists()
    assert "3.0 MB are given back." in CliRunner().invoke(cli.app, ["gc", "--yes", "--data", str(settings.data)]).output
    assert "Nothing is left over." in CliRunner().invoke(cli.app, ["gc", "--data", str(settings.data)]).output


def test_what_is_run_again_between_the_look_and_the_deed_stays(filled: Settings, database: Database) -> None:
    job(database, "train-x-1", "failed")
    folder = put(filled.data / "jobs" / "train-x-1", old=True)
    orphan = put(filled.data / "saes" / "x")
    found = gc.find(filled, database)
    assert {one.what for one in found} == {"jobs/train-x-1", "saes/x"}
    queue = Jobs(filled, database)
    queue.retry("train-x-1")
    queue.close()
    assert gc.collect(filled, database, found) == []
    assert folder.exists()
    assert orphan.exists(), "the job will make an SAE of that name"


def test_a_race_of_running_again_and_clearing_up_never_loses_an_open_jobs_files(filled: Settings, database: Database) -> None:
    """Who retries first keeps its files; who comes after the deed finds none and no half."""
    n = 12
    for number in range(n):
        job(database, f"train-r{number}-1", "failed")
        folder = put(filled.data / "jobs" / f"train-r{number}-1")
        for inner in range(20):
            (folder / f"part-{inner}").write_bytes(b"y" * 1000)
        age(folder)
    found = [one for one in gc.find(filled, database) if one.what.startswith("jobs/train-r")]
    assert len(found) == n
    seen: dict[int, int] = {}

    def again() -> None:
        other = Database(filled.url)
        for number in reversed(range(n)):
            with other.write() as session:
                store.requeue(session, f"train-r{number}-1")
                # From here on it may be taken up: what it finds now it must find later.
                seen[number] = len(list((filled.data / "jobs" / f"train-r{number}-1").glob("*")))
        other.close()

    thread = threading.Thread(target=again)
    thread.start()
    gone = {one.what for one in gc.collect(filled, database, found)}
    thread.join()
    for number in range(n):
        folder = filled.data / "jobs" / f"train-r{number}-1"
        assert seen[number] in (0, 21), "whole or not there"
        assert len(list(folder.glob("*"))) == seen[number]
        assert (f"jobs/{folder.name}" in gone) == (seen[number] == 0)
    shutil.rmtree(filled.data / "jobs")
