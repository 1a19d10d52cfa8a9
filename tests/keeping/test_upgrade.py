"""Upgrades keep what is there: from every version of the schema on both databases, with rows in every table; and queued jobs."""

import datetime
import itertools
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from server import jobs
from server.db import Database
from server.jobs import Jobs
from server.resources import resource_path
from server.store import jobs as store
from server.worker import Worker
from tests.core.tiny_models import save_tiny
from tests.jobs.conftest import make_home, start, tiny_config, write_text
from tests.keeping.conftest import home, new_database

VERSIONS = [script.revision for script in ScriptDirectory(str(resource_path("migrations"))).walk_revisions()][::-1]
N = 3
"""Rows of every table."""
EXAMPLE = {
    "acts": "04000000003f0900000040400b000000a03f", "dfa": "080001000020400300000000c0bf0800000000803e",
    "dropped": "0000003e000080bd", "before": "0000003f00000000", "dest": 9, "start": 2, "act": 3.0, "preact": 3.0, "bias": 1.1875,
    "abs_dfa": 5.0, "gap": 0.00002,
}  # fmt: skip
"""Of the first two versions, whose examples are packed anew on the way."""
CHANGED = {("example", "acts"), ("example", "dfa"), ("head_summary", "diversity")}
"""What a migration says anew, or forgets on purpose."""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> sa.URL:
    """An empty database of each kind."""
    if request.param == "postgresql":
        return sa.make_url(new_database(request.getfixturevalue("postgres")))
    return sa.make_url(f"sqlite:///{tmp_path / 'old.db'}")


def config(url: sa.URL) -> Config:
    made = Config()
    made.set_main_option("script_location", str(resource_path("migrations")))
    made.attributes["url"] = url
    return made


def tables(connection: sa.Connection) -> list[sa.Table]:
    metadata = sa.MetaData()
    metadata.reflect(connection)
    # SAEs and harvests refer to each other.
    in_order = sa.schema.sort_tables(
        metadata.tables.values(), skip_fn=lambda key: (key.parent.table.name, key.parent.name) == ("sae", "harvest_id")
    )
    return [table for table in in_order if not table.name.startswith(("context_text", "alembic"))]


def values(table: sa.Table, number: int, version: str) -> dict[str, Any]:
    """A row of a table, whatever its columns: foreign keys point at the row of that number."""
    made: dict[str, Any] = {}
    for column in table.c:
        named = EXAMPLE.get(column.name) if table.name == "example" and version <= "0002" else None
        if named is not None:
            made[column.name] = bytes.fromhex(named) if isinstance(named, str) else named
        elif (table.name, column.name) in (("job", "parent_id"), ("label", "follows_id"), ("sae", "harvest_id")):
            continue  # refers to a row that is not there yet
        elif isinstance(column.type, sa.JSON | sa.dialects.postgresql.JSONB):
            made[column.name] = [] if column.name in ("licences", "texts", "bands", "promoted", "families") else {"n": number}
        elif column.foreign_keys or column.primary_key or column.name in ("idx", "row", "rank", "step", "folded", "digest"):
            made[column.name] = number if isinstance(column.type, sa.Integer | sa.BigInteger) else f"{number}"
        elif isinstance(column.type, sa.DateTime):
            made[column.name] = datetime.datetime(2026, 1, number, 12, tzinfo=datetime.UTC)
        elif isinstance(column.type, sa.LargeBinary):
            made[column.name] = bytes([number, 0, 255])
        elif isinstance(column.type, sa.Float | sa.Double | sa.REAL):
            made[column.name] = number + 0.125
        elif isinstance(column.type, sa.Integer | sa.BigInteger):
            made[column.name] = number
        else:
            made[column.name] = f"{number}"
    return made


def filled(connection: sa.Connection, version: str) -> dict[str, list[dict[str, Any]]]:
    """Rows in every table of the version, as they are read back."""
    found = {}
    everyone = tables(connection)
    for table in everyone:
        for number in range(1, N + 1):
            connection.execute(sa.insert(table).values(values(table, number, version)))
    sae = next(table for table in everyone if table.name == "sae")
    connection.execute(sa.update(sae).values(harvest_id=sae.c.id))
    for table in everyone:
        found[table.name] = read(connection, table)
    connection.commit()
    return found


def read(connection: sa.Connection, table: sa.Table) -> list[dict[str, Any]]:
    rows = connection.execute(sa.select(table).order_by(*table.primary_key)).mappings()
    return [dict(row) for row in rows]


def engine_of(url: sa.URL) -> Iterator[sa.Connection]:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.mark.parametrize("version", VERSIONS)
def test_every_row_of_every_table_survives(url: sa.URL, version: str) -> None:
    command.upgrade(config(url), version)
    for connection in engine_of(url):
        before = filled(connection, version)
    assert len(before) >= 13
    command.upgrade(config(url), "head")
    for connection in engine_of(url):
        after = {table.name: read(connection, table) for table in tables(connection)}
        if url.get_backend_name() == "sqlite":
            assert connection.exec_driver_sql("pragma foreign_key_check").fetchall() == []
    for name, rows in before.items():
        assert len(after[name]) == N, name
        for was, now in zip(rows, after[name], strict=True):
            kept = {key for key in was if key in now and (name, key) not in CHANGED}
            assert len(kept) >= 2
            assert {key: now[key] for key in kept} == {key: was[key] for key in kept}, name


def test_the_versions_are_a_chain_and_all_of_them_are_tried() -> None:
    assert VERSIONS[0] == "0001"
    assert len(VERSIONS) >= 8
    assert all(a < b for a, b in itertools.pairwise(VERSIONS))


@pytest.mark.parametrize("began", [False, True], ids=["queued", "begun"])
def test_jobs_that_an_older_version_queued_or_began_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began: bool) -> None:
    made = make_home(tmp_path, save_tiny("llama", tmp_path / "tiny-llama"), write_text(tmp_path / "words.txt"))
    monkeypatch.setattr(jobs, "VERSION", "1")
    job = made.jobs.enqueue_train(tiny_config(tokens=8192, passes=1, harvests=()))
    if began:
        with made.db.write() as session:
            store.start_attempt(session, job, "worker-0")
    monkeypatch.setattr(jobs, "VERSION", "999")
    flow = made.jobs.client.list_workflows(workflow_ids=[job])[0]
    assert flow.app_version == "1"
    jobs.upgrade(made.settings, made.db)
    flow = made.jobs.client.list_workflows(workflow_ids=[job])[0]
    assert (flow.app_version, flow.status) == ("999", "ENQUEUED")
    assert made.status(job) == "queued"
    worker = Worker(made.settings.model_copy(update={"device": "cpu"}), made.db)
    start(worker)
    try:
        assert made.wait(job) == "done", made.error(job)
        with made.db.read() as session:
            said = [line.text for line in store.log_lines(session, job)]
        assert any("takes its steps differently" in line for line in said) == began
    finally:
        worker.close()
        made.jobs.close()
        made.db.close()


def test_an_upgrade_leaves_the_jobs_of_this_version_alone(tmp_path: Path) -> None:
    settings = home(tmp_path / uuid.uuid4().hex, shape=None)
    database = Database(settings.url)
    queue = Jobs(settings, database)
    with database.write() as session:
        store.create(session, "study-x", "study", "t", {})
    queue.release()
    before = queue.client.list_workflows()[0]
    jobs.upgrade(settings, database)
    assert vars(queue.client.list_workflows()[0]) == vars(before)
    assert queue.settle() == ()
    queue.close()
    database.close()
