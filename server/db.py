"""Makes the one SQLAlchemy engine, its sessions, and brings the schema up to date. No torch."""

import copy
import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite.base import SQLiteCompiler
from sqlalchemy.orm import Session

from sae_core.errors import DatabaseAway, DatabaseTooNew, DatabaseTooOld, HeadscopeError
from server.resources import resource_path


def make_engine(url: sa.URL, connections: int = 5) -> sa.Engine:
    """An engine on `url`, which keeps so many connections and makes twice as many more when they are needed. SQLite gets WAL,
    foreign keys, a busy timeout, and BEGIN IMMEDIATE in `write()`."""
    pool = {} if url.database in (None, "", ":memory:") else {"pool_size": connections, "max_overflow": 2 * connections}
    engine = sa.create_engine(
        url,
        pool_pre_ping=url.get_backend_name() != "sqlite",
        json_serializer=_compact,
        json_deserializer=_read_json,
        connect_args=_patience(url),
        **pool,
        hide_parameters=True,  # an error must not carry what somebody typed into a log
    )
    if url.get_backend_name() == "sqlite":
        engine.dialect.statement_compiler = _HintingCompiler
        sa.event.listen(engine, "connect", _sqlite_connect)
        sa.event.listen(engine, "begin", _sqlite_begin)
    return engine


def _patience(url: sa.URL) -> dict[str, int]:
    """A machine that is gone says nothing at all, and would be waited for for minutes."""
    here = url.get_backend_name() == "sqlite" or "connect_timeout" in url.query
    return {} if here else {"connect_timeout": CONNECT_SECONDS}


class _HintingCompiler(SQLiteCompiler):
    """Writes a table's hint behind its name (`INDEXED BY ...`), which SQLAlchemy's own compiler for SQLite leaves out."""

    def get_from_hint_text(self, table: sa.FromClause, text: str | None) -> str | None:
        """The hint as it was given, whatever the table."""
        del table
        return text


def _compact(value: object) -> str:
    # PostgreSQL has no place for the character 0, which is a token of many vocabularies; its picture stands for it. Half a
    # surrogate pair is no character and has no UTF-8; its number stands for it.
    text = json.dumps(value, separators=(",", ":"))
    text = _NUL.sub(r"\1\\u2400", text) if "\\u0000" in text else text
    return _SURROGATES.sub(_whole, text) if "\\ud" in text else text


def read_stored(value: Any) -> Any:
    """A JSON column that was selected as text: SQLite gives it as it lies there, PostgreSQL's driver has read it."""
    return _read_json(value) if isinstance(value, (str, bytes)) else value


def _read_json(text: str | bytes) -> Any:
    try:
        return msgspec.json.decode(text)  # several times quicker, and most of a row is JSON
    except msgspec.DecodeError:
        return json.loads(text)  # half of a pair of UTF-16, or no number: Python writes both, and reads both


_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")  # and not a backslash that somebody wrote before "u0000"
_SURROGATES = re.compile(r"(?<!\\)((?:\\\\)*)\\u(d[89ab]..\\ud[c-f]..|d[89a-f]..)")


def _whole(found: re.Match[str]) -> str:
    return found[0] if len(found[2]) > 4 else rf"{found[1]}\u27e8{found[2].upper()}\u27e9"


CONNECT_SECONDS = 10
WAIT_SECONDS = 0.5  # between two looks at a database that is away
READ = f"mmap_size={2**31}"
"""SQLite reads the file's first two GiB in place, more it never does: several times quicker than copying page after page, where
many are looked at."""


def _sqlite_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves, so that a writer takes its lock at the start
    # Larger pages, of a new database only: rows of features are of 1 to 2 kB, of which one often would not fit into the rest.
    for pragma in ("page_size=8192", "journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=30000", READ):
        connection.execute(f"PRAGMA {pragma}")


def _sqlite_begin(connection: sa.Connection) -> None:
    # A deferred transaction that reads first and writes later can fail with SQLITE_BUSY at once, whatever the timeout.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("write") else "BEGIN")


class Database:
    """Sessions on one database: `read()` never locks writers out, `write()` is one short transaction."""

    def __init__(self, url: sa.URL, *, connections: int = 5) -> None:
        self.url = url
        self.is_file = sqlite_path(url) is not None
        self.engine = make_engine(url, connections)
        self._writer = self.engine.execution_options(write=True)
        self._session: type[Session] = Session
        self._info: Mapping[str, object] = {}
        self._before_commit: Callable[[Session], None] | None = None

    def bound(
        self, session: type[Session], info: Mapping[str, object], before_commit: Callable[[Session], None] | None
    ) -> "Database":
        """The same database, with sessions of another class that carry `info`; `before_commit` ends each that writes."""
        other = copy.copy(self)
        other._session, other._info, other._before_commit = session, info, before_commit
        return other

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that only reads."""
        session = self._session(self.engine, expire_on_commit=False, info=dict(self._info))
        try:
            yield session
        finally:
            try:
                session.close()
            except sa.exc.DBAPIError:  # the database went away after it was asked: the answer is there, and may be on its way
                session.invalidate()

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction: committed at the end, rolled back by an exception."""
        with self._session(self._writer, expire_on_commit=False, info=dict(self._info)) as session, session.begin():
            yield session
            if self._before_commit is not None:
                self._before_commit(session)

    def close(self) -> None:
        """Give every connection back."""
        self.engine.dispose()

    def wait(self, seconds: float, say: Callable[[str], None], *, current: bool = True) -> None:
        """Return when the database answers, and when its schema is `current` unless that is not asked for; at most `seconds`
        later raise what is still wrong. A file is not waited for."""
        deadline = time.monotonic() + (0.0 if sqlite_path(self.url) else seconds)
        said: type[HeadscopeError] | None = None
        while True:
            try:
                self.check_version()
            except (DatabaseAway, DatabaseTooOld) as error:
                if isinstance(error, DatabaseTooOld) and not current:
                    return
                if time.monotonic() >= deadline:
                    raise
                if said is not type(error):
                    say(f"{error} Waiting for it, {deadline - time.monotonic():.0f} s at most.")
                    said = type(error)
                time.sleep(WAIT_SECONDS)
            else:
                return

    def check_version(self) -> None:
        """Raise a sentence unless the schema is exactly what this code knows."""
        try:
            present = self._version()
        except sa.exc.OperationalError as error:
            raise DatabaseAway(f"The database at {self.url!r} does not answer: {str(error.orig).strip().rstrip('.')}.") from error
        newest, known = _versions()
        if present == newest:
            return
        if present is not None and present not in known:
            raise DatabaseTooNew(_too_new(self.url, present))
        raise DatabaseTooOld(f"The database at {self.url!r} is not up to date; run `headscope db upgrade`.")

    def upgrade(self) -> None:
        """Bring the schema to the newest version; a database of a newer Headscope is left alone."""
        from alembic import command
        from alembic.config import Config

        self.refuse_newer()
        config = Config()
        config.set_main_option("script_location", str(resource_path("migrations")))
        config.attributes["url"] = self.url
        command.upgrade(config, "head")

    def knows(self, revision: str) -> bool:
        """Whether this code knows that version of the schema."""
        return revision in _versions()[1]

    def refuse_newer(self) -> None:
        """Raise a sentence when a newer Headscope wrote the database."""
        present = self._version()
        if present is not None and present not in _versions()[1]:
            raise DatabaseTooNew(_too_new(self.url, present))

    def _version(self) -> str | None:
        """The version of the database's schema; None where it has none yet."""
        with self.engine.connect() as connection:
            if not sa.inspect(connection).has_table("alembic_version"):
                return None
            found: str | None = connection.execute(sa.text("select version_num from alembic_version")).scalar()
            return found


def _too_new(url: sa.URL, revision: str) -> str:
    return (
        f"The database at {url!r} was written by a newer Headscope (schema {revision}); "
        "install that version, or use another data folder."
    )


@lru_cache
def _versions() -> tuple[str, frozenset[str]]:
    """The schema's newest version, and all that there are, read from the migrations' files: every start asks, and Alembic takes a
    sixth of a second to be loaded and to say it."""
    texts = [path.read_text(encoding="utf-8") for path in resource_path("migrations").joinpath("versions").glob("*.py")]
    all_, before = (
        frozenset(found[1] for text in texts if (found := re.search(rf'^{name} = "(\w+)"$', text, re.M)))
        for name in ("revision", "down_revision")
    )
    (newest,) = all_ - before
    return newest, all_


def sqlite_path(url: sa.URL) -> Path | None:
    """The file of a SQLite database; None for another backend or memory."""
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None
