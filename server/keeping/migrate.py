"""From SQLite to PostgreSQL and back: every table of both schemas, streamed, counted, and compared by what its rows say.

Nothing of the target is seen before all of it is there: on PostgreSQL everything is one transaction, of SQLite the two files are
written aside. Into PostgreSQL rows go by COPY. The source is only read, in one snapshot. No torch.
"""

import json
import sqlite3
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from sae_core.errors import JobError, MachineError, UsageError
from server import jobs
from server.db import Database, sqlite_path
from server.keeping import stored
from server.keeping.backup import FILES, sqlite_files
from server.keeping.room import need_free, sync
from server.settings import Settings
from server.store import jobs as store
from server.store import whole

AT_ONCE = 500
"""Rows that are held at a time."""
SEEN_SECONDS = 60.0
"""A worker that was heard so lately may be alive."""
QUEUE_OWN = ("dbos_migrations",)
"""Tables of the queue that each database has its own of."""

QUEUE_SAYS = ("application_versions", "queues")
"""Tables in which the queue writes what it is itself."""

Told = Callable[[str], None]


@dataclass(frozen=True)
class Moved:
    """What was moved."""

    tables: dict[str, tuple[int, str]]
    """By table: rows, and the digest of what they say; the same in both databases."""


def migrate(settings: Settings, target: Settings, say: Told) -> Moved:
    """Copy both databases of `settings` into those of `target`, which are empty; files stay where they are.

    Raises UsageError where the target is not empty or of the same kind, JobError while a worker runs, and MachineError where the
    copy is not what was copied; the target is as empty as before then.
    """
    if settings.url.get_backend_name() == target.url.get_backend_name():
        raise UsageError("Both databases are of one kind; `headscope backup` and `headscope restore` move such one.", field="to")
    source = Database(settings.url)
    try:
        _check_source(source)
        if sqlite_path(target.url) is not None:
            return _into_files(settings, target, source, say)
        with _made(target) as made:
            return _copy_all(settings, target, source, made, say)
    finally:
        source.close()


def _check_source(source: Database) -> None:
    source.check_version()
    with source.read() as session:
        alive = [worker.id for worker in store.workers(session, seen_within=SEEN_SECONDS)]
    if alive:
        raise JobError(
            f"{', '.join(alive)} may be at work (heard within {SEEN_SECONDS:.0f} s), and what a worker writes meanwhile would be "
            "lost; stop the web and the workers first. Jobs that wait go on in the new database."
        )


def _into_files(settings: Settings, target: Settings, source: Database, say: Told) -> Moved:
    """Into SQLite, aside."""
    names = [path for path in (sqlite_path(target.url), sqlite_path(sa.make_url(target.jobs_url))) if path]
    there = [path for path in sqlite_files(target) if path.exists()]
    if there:
        raise UsageError(f"{there[0]} is there already, and nothing is overwritten; move it away first.", field="to")
    with source.engine.connect() as connection:
        size = connection.exec_driver_sql("select pg_database_size(current_database())").scalar_one()
    need_free(target, target.data, size, "The SQLite database")
    with tempfile.TemporaryDirectory(dir=target.data, prefix=".aside-") as held:
        aside = target.model_copy(update={"data": Path(held), "database_url": None})
        with _made(aside) as made:
            moved = _copy_all(settings, aside, source, made, say)
        made_as = dict(zip(names, (Path(held) / name for name in FILES.values()), strict=True))
        for path in reversed(names):  # ours last
            written = made_as[path]
            with closing(sqlite3.connect(written)) as connection:  # nothing may be left in a journal, which stays behind
                busy, _, _ = connection.execute("pragma wal_checkpoint(truncate)").fetchone()
            if busy:
                raise MachineError(f"{written.name} is still being written; nothing was moved.")
            sync(written)
            written.rename(path)
        sync(target.data)
    return moved


@contextmanager
def _made(target: Settings) -> Iterator[Database]:
    """The target with both schemas and nothing in them. Where it was empty, it is empty again after an error."""
    database = Database(target.url)
    try:
        if sqlite_path(target.url) is None:
            with database.engine.connect() as connection:
                ask = stored.asking(connection)
                ours = {**stored.counts(ask, schema="public"), **stored.counts(ask, schema="dbos")}
                filled = {name for name, n in ours.items() if n} - {"alembic_version", *QUEUE_OWN, *QUEUE_SAYS}
                foreign = set(stored.counts(ask, schema="public")) - {table.name for table in whole.TABLES}
            filled |= foreign - {"alembic_version", "context_text"}
            if filled:
                raise UsageError(
                    f"The database at {target.url!r} is not empty (it has {', '.join(sorted(filled)[:3])}); make a new one.",
                    field="to",
                )
        jobs.upgrade(target, database)
        yield database
    finally:
        database.close()


def _copy_all(settings: Settings, target: Settings, source: Database, made: Database, say: Told) -> Moved:
    """Copy, then read everything back. On SQLite the queue is another file, and so another transaction."""
    tables: dict[str, tuple[int, str]] = {}
    with ExitStack() as open_:
        read, write = open_.enter_context(_reading(source)), open_.enter_context(_writing(made))
        asked, put = read, write
        if sqlite_path(settings.url) is not None:
            asked = open_.enter_context(_reading(open_.enter_context(closing(Database(sa.make_url(settings.jobs_url))))))
        if sqlite_path(target.url) is not None:
            put = open_.enter_context(_writing(open_.enter_context(closing(Database(sa.make_url(target.jobs_url))))))
        pairs = [(read, table, write, table) for table in whole.TABLES]
        pairs += [(asked, theirs, put, ours) for theirs, ours in _queue_tables(asked, put)]
        for one, theirs, other, ours in pairs:
            tables[ours.name] = _copy(one, theirs, other, ours)
        _set_later(read, write)
        for _, theirs, other, ours in pairs:
            _compare(ours.name, tables[ours.name], _digest(other, ours, theirs))
            if tables[ours.name][0]:
                say(f"{ours.name}: {tables[ours.name][0]:,} rows")
        whole.index_texts(write)
        _set_sequences(write) if sqlite_path(target.url) is None else _check_references(write)
    return Moved(tables)


@contextmanager
def _reading(db: Database) -> Iterator[sa.Connection]:
    """A snapshot."""
    how = {} if sqlite_path(db.url) else {"isolation_level": "REPEATABLE READ"}
    with db.engine.connect().execution_options(**how) as connection:
        yield connection


@contextmanager
def _writing(db: Database) -> Iterator[sa.Connection]:
    """One transaction, in which SQLite looks at no foreign key: all of them are looked at in the end."""
    with db.engine.connect() as connection:
        if sqlite_path(db.url):
            driver: Any = connection.connection.driver_connection
            driver.execute("pragma foreign_keys=off")
        with connection.begin():
            yield connection


def _queue_tables(asked: sa.Connection, put: sa.Connection) -> list[tuple[sa.Table, sa.Table]]:
    """The queue's own tables, there and here."""
    found = []
    for connection in (asked, put):
        schema = None if connection.dialect.name == "sqlite" else "dbos"
        metadata = sa.MetaData(schema=schema)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sa.exc.SAWarning)  # indexes on expressions, which are of no matter here
            metadata.reflect(connection)
        found.append({table.name: table for table in metadata.tables.values() if table.name not in QUEUE_OWN})
    theirs, ours = found
    for name in set(theirs) - set(ours):  # PostgreSQL's queue has a table more, for what Headscope does not use
        if asked.execute(sa.select(sa.func.count()).select_from(theirs[name])).scalar():
            raise MachineError(f"The queue's table {name} has rows, and the new queue has no such table; nothing was moved.")
    return [(theirs[name], ours[name]) for name in sorted(set(theirs) & set(ours))]


def _columns(table: sa.Table, like: sa.Table) -> list[sa.Column[Any]]:
    """The columns that both have, in one order."""
    return [table.c[column.name] for column in like.c if column.name in table.c]


def _copy(read: sa.Connection, theirs: sa.Table, write: sa.Connection, ours: sa.Table) -> tuple[int, str]:
    """Copy a table; rows and digest of what was read."""
    said, columns = whole.Digest(), _columns(theirs, ours)
    into = [ours.c[column.name] for column in columns]
    later = whole.LATER.get(ours.name)
    bind = [_binder(write.dialect, column, empty=column.name == later) for column in into]
    names = ", ".join(write.dialect.identifier_preparer.quote(column.name) for column in into)
    place = write.dialect.identifier_preparer.format_table(ours)

    def rows() -> Iterator[list[tuple[Any, ...]]]:
        for part in whole.read(read, theirs, columns, AT_ONCE):
            for row in part:
                said.add(_same(row, columns, into))
            yield [tuple(made(value) for made, value in zip(bind, row, strict=True)) for row in part]

    if theirs is not ours:
        write.execute(sa.delete(ours))  # what the queue has written about itself
    if write.dialect.name == "postgresql":
        cursor: Any = write.connection.cursor()
        with cursor, cursor.copy(f"COPY {place} ({names}) FROM STDIN") as copy:
            for part in rows():
                for row in part:
                    copy.write_row(row)
    else:
        marks = ", ".join("?" * len(into))
        for part in rows():
            write.exec_driver_sql(f"INSERT INTO {place} ({names}) VALUES ({marks})", part)  # noqa: S608 - names of tables
    return said.value


def _binder(dialect: sa.Dialect, column: sa.Column[Any], *, empty: bool) -> Callable[[Any], Any]:
    """Makes of a value, from whichever database, what the driver takes."""
    processed = column.type.dialect_impl(dialect).bind_processor(dialect)
    if empty:
        return lambda _: None

    def bound(value: Any) -> Any:
        if value is None:
            return None
        value = whole.portable(_as(column, value))
        return processed(value) if processed else value

    return bound


def _as(column: sa.Column[Any], value: Any) -> Any:
    """Of the queue's tables, whose columns have other types there: the value as this column has it."""
    kind = column.type
    if isinstance(kind, sa.Boolean):
        return bool(value)
    if isinstance(kind, sa.JSON):
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(kind, sa.Text | sa.String) and isinstance(value, dict | list):
        return json.dumps(value)
    return value


def _same(row: Sequence[Any], columns: Sequence[sa.Column[Any]], other: Sequence[sa.Column[Any]]) -> list[Any]:
    """A row as it reads the same in both."""
    return [
        json.loads(value)
        if isinstance(value, str) and isinstance(column.type, sa.JSON) != isinstance(twin.type, sa.JSON)
        else value
        for value, column, twin in zip(row, columns, other, strict=True)
    ]


def _digest(connection: sa.Connection, table: sa.Table, like: sa.Table) -> tuple[int, str]:
    found, columns = whole.Digest(), _columns(table, table)
    columns = [column for column in columns if column.name in like.c]
    twins = [like.c[column.name] for column in columns]
    for part in whole.read(connection, table, columns, AT_ONCE):
        for row in part:
            found.add(_same(row, columns, twins))
    return found.value


def _compare(name: str, was: tuple[int, str], found: tuple[int, str]) -> None:
    if was != found:
        raise MachineError(
            f"The table {name} came out as {found[0]:,} rows with the digest {found[1][:8]}, and was {was[0]:,} rows with "
            f"{was[1][:8]}; nothing was moved. Please report this."
        )


def _set_later(read: sa.Connection, write: sa.Connection) -> None:
    """Fill what refers to a table further down."""
    for name, later in whole.LATER.items():
        table = next(table for table in whole.TABLES if table.name == name)
        filled = sa.select(table.c.id, table.c[later]).where(table.c[later].is_not(None))
        for id_, value in read.execute(filled).all():
            write.execute(sa.update(table).where(table.c.id == id_).values({later: value}))


def _set_sequences(write: sa.Connection) -> None:
    """The next number that PostgreSQL gives is one after the largest."""
    for table in whole.TABLES:
        key = table.autoincrement_column
        if key is not None:
            name, number = table.name, key.name
            counter = f"pg_get_serial_sequence('{name}', '{number}')"
            write.exec_driver_sql(f"select setval({counter}, coalesce(max({number}), 0) + 1, false) from {name}")  # noqa: S608 - our names


def _check_references(write: sa.Connection) -> None:
    lost = write.exec_driver_sql("pragma foreign_key_check").fetchall()
    if lost:
        raise MachineError(f"Rows of {lost[0][0]} refer to rows of {lost[0][2]} that are not there; nothing was moved.")
