"""What a database holds, read from the database itself whatever its version: its tables, how many rows each has, and the files
that it refers to. Both kinds of database, Headscope's schema and the queue's. No torch."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

Ask = Callable[[str], list[tuple[Any, ...]]]
"""SQL to rows."""
OURS, QUEUE = "headscope", "jobs"
_SHADOWS = ("_data", "_idx", "_content", "_docsize", "_config")


@contextmanager
def sqlite_file(path: Path) -> Iterator[Ask]:
    """Asks a SQLite file that nobody writes, and leaves nothing beside it."""
    connection = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        yield lambda sql: connection.execute(sql).fetchall()
    finally:
        connection.close()


def asking(connection: sa.Connection) -> Ask:
    """Asks a connection, within its transaction."""
    return lambda sql: [tuple(row) for row in connection.exec_driver_sql(sql)]


def counts(ask: Ask, *, schema: str | None = None) -> dict[str, int]:
    """How many rows each table holds; of PostgreSQL those of one schema."""
    if schema is None:
        named = [name for (name,) in ask("select name from sqlite_master where type = 'table' and name not like 'sqlite_%'")]
        # A virtual table's own tables are counted with it: their rows are its index, laid out anew by every copy.
        names = [n for n in named if not any(n.endswith(end) and n.removesuffix(end) in named for end in _SHADOWS)]
        return {name: int(ask(f'select count(*) from "{name}"')[0][0]) for name in sorted(names)}  # noqa: S608 - its own names
    found = ask(f"select tablename from pg_tables where schemaname = '{schema}' order by tablename")  # noqa: S608 - our names
    return {name: int(ask(f'select count(*) from "{schema}"."{name}"')[0][0]) for (name,) in found}  # noqa: S608 - its names


def revision(ask: Ask) -> str:
    """Version of Headscope's schema."""
    return str(ask("select version_num from alembic_version")[0][0])


@dataclass(frozen=True)
class Sae:
    """An SAE's files as its row names them."""

    name: str
    folder: str
    sha256: str


def saes(ask: Ask) -> list[Sae]:
    """Every SAE."""
    return [Sae(*row) for row in ask("select name, folder, sha256 from sae order by name")]


@dataclass(frozen=True)
class Transcoder:
    """A transcoder's file as its row names it."""

    model: str
    layer: int
    file: str
    sha256: str


def transcoders(ask: Ask) -> list[Transcoder]:
    """Every transcoder; none of a database of before there were any."""
    if revision(ask) < "0017":
        return []
    query = "select model.name, layer, file, transcoder.sha256 from transcoder join model on model.id = model_id order by 1, 2"
    return [Transcoder(*row) for row in ask(query)]


def corpora(ask: Ask) -> list[Any]:
    """Sources of the corpora, as their rows have them: JSON text on SQLite."""
    return [source for (source,) in ask("select source from corpus")]
