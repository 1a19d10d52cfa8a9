"""A database moved to the other kind says the same, shows the same pages, and goes on with the same jobs."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from sae_core.errors import JobError, MachineError, UsageError
from server.db import Database
from server.jobs import Jobs
from server.keeping import migrate
from server.settings import Settings
from server.store import jobs as store
from server.store import whole
from server.tables import Context, Feature, FeatureDetail, Harvest, HeadSummary, Label
from tests.keeping.conftest import home, new_database, pages


def moved_to(settings: Settings, url: str | None, folder: Path | None = None) -> Settings:
    target = settings.model_copy(update={"database_url": url, **({"data": folder} if folder else {})})
    target.prepare()
    said: list[str] = []
    found = migrate.migrate(settings, target, said.append)
    assert found.tables["context"][0] > 0
    assert any(line.startswith("example: ") for line in said)
    return target


@pytest.fixture
def calm(tmp_path: Path) -> Settings:
    """A filled SQLite folder whose worker is gone, with a job that waits and a label with a hostile text."""
    settings = home(tmp_path / "data")
    database = Database(settings.url)
    queue = Jobs(settings, database)
    queue.forget_workers()
    with database.write() as session:
        store.create(session, "study-waits", "study", "waits", {"a": [1.0, 1e-7, 3e22, "x\0y", None, True]})
        for text in ("tab\tnewline\n back\\slash \\N", "nul \0 here", "漢字 🙂 ” '"):
            session.add(Label(sae_id=1, idx=1, text=text, author="Maren", method="person"))
        # In an order that PostgreSQL does not keep, and that is not ours either: it has the shortest name first.
        session.execute(sa.update(HeadSummary).values(families={"successor": 2, "positional": 2, "local": 2, "induction": 3}))
        session.execute(sa.update(FeatureDetail).values(evidence={"stretch": 1.0, "zeal": 2.0, "calm": 3.0, "induction": 0.5}))
        for idx in range(40):
            kind = ("successor", "positional", "local", None)[idx % 4]
            session.execute(sa.update(Feature).where(Feature.idx == idx).values(family=kind))
        row = session.get_one(Context, 1)
        row.texts = [*row.texts[:-2], "\0", "\\"]
    queue.release()
    queue.close()
    database.close()
    return settings


def test_there_and_back_again(calm: Settings, postgres: sa.URL, tmp_path: Path) -> None:
    before = pages(calm)
    there = moved_to(calm, new_database(postgres))
    assert pages(there) == {path: text.replace("\\u0000", "\u2400").replace("\0", "\u2400") for path, text in before.items()}
    back = moved_to(there, None, tmp_path / "back")
    assert pages(back) == pages(there)
    assert [path.name for path in back.data.iterdir() if path.name.startswith(".")] == []
    for settings in (there, back):
        database = Database(settings.url)
        queue = Jobs(settings, database)
        (flow,) = queue.client.list_workflows(workflow_ids=["study-waits"])
        assert (flow.status, flow.queue_name, flow.name) == ("ENQUEUED", "gpu", "study")
        assert flow.input is not None
        assert list(flow.input["args"]) == ["study-waits"]
        queue.close()
        with database.write() as session:  # the next number is free
            label = Label(sae_id=1, idx=1, text="next", author="Maren", method="person")
            session.add(label)
            session.flush()
            assert label.id == (session.scalar(sa.select(sa.func.count(Label.id))) or 0)
            assert session.scalar(sa.text("select count(*) from context_text")) == session.scalar(
                sa.select(sa.func.count(Context.id))
            )
            assert session.scalars(sa.text("select harvest_id from sae")).all() == [1]
        database.close()


def test_every_table_is_copied_and_the_digest_sees_one_changed_value(calm: Settings, postgres: sa.URL) -> None:
    there = moved_to(calm, new_database(postgres))
    for settings in (calm, there):
        database = Database(settings.url)
        with database.engine.connect() as connection:
            digests = {}
            for table in whole.TABLES:
                found = whole.Digest()
                for part in whole.read(connection, table, list(table.c), 100):
                    for row in part:
                        found.add(row)
                digests[table.name] = found.value
        if settings is calm:
            first = digests
        database.close()
    assert digests == first
    one, other = whole.Digest(), whole.Digest()
    one.add((1, {"a": 1.0, "b": 2}, b"x"))
    other.add((1, {"b": 2, "a": 1}, b"x"))
    assert one.value == other.value
    other.add((1, {"b": 2, "a": 1}, b"y"))
    one.add((1, {"b": 2, "a": 1}, b"x"))
    assert one.value != other.value


def test_a_target_with_something_in_it_or_a_worker_at_work_is_refused(calm: Settings, postgres: sa.URL) -> None:
    url = new_database(postgres)
    moved_to(calm, url)
    with pytest.raises(UsageError, match="not empty"):
        moved_to(calm, url)
    there = calm.model_copy(update={"database_url": url})
    with pytest.raises(UsageError, match=r"headscope.db is there already"):
        migrate.migrate(there, calm, print)
    with pytest.raises(UsageError, match="of one kind"):
        migrate.migrate(calm, calm, print)
    database = Database(calm.url)
    with database.write() as session:
        store.beat(session, "worker-3", "cpu", 1)
    database.close()
    with pytest.raises(JobError, match="worker-3 may be at work"):
        moved_to(calm, new_database(postgres))


def test_a_copy_that_is_not_the_same_leaves_the_target_empty(
    calm: Settings, postgres: sa.URL, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_database(postgres)
    real = migrate._set_later
    monkeypatch.setattr(
        migrate, "_set_later", lambda read, write: (real(read, write), write.execute(sa.update(Harvest).values(n_rows=7)))
    )
    with pytest.raises(MachineError, match="The table harvest came out as 1 rows"):
        moved_to(calm, url)
    monkeypatch.undo()
    moved_to(calm, url)
