"""The database as a whole: its tables in an order that foreign keys allow, what a row says whatever the database, and the
search index made anew. For moving it from one database to another."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from server.store import search
from server.tables import Base, HarvestPart

TABLES = Base.metadata.sorted_tables
"""Every table of ours but `context_text`, which `index_texts` makes anew; a table stands behind those that it refers to."""
LATER = {"sae": "harvest_id"}
"""Columns that refer to a table further down; they are filled last."""
Row = tuple[Any, ...]


def portable(value: Any) -> Any:
    """A value as both databases can hold it: PostgreSQL has no place for the character 0, whose picture stands for it."""
    return value.replace("\0", "\u2400") if isinstance(value, str) and "\0" in value else value


class Digest:
    """What rows say, whatever their order and whichever database holds them: the sum of their hashes."""

    def __init__(self) -> None:
        self.rows, self._sum = 0, 0

    def add(self, row: Sequence[Any]) -> None:
        """Count a row in."""
        said = hashlib.blake2b(digest_size=16)
        for value in row:
            raw = _said(value)
            said.update(len(raw).to_bytes(8, "little"))
            said.update(raw)
        self._sum = (self._sum + int.from_bytes(said.digest(), "little")) % 2**128
        self.rows += 1

    @property
    def value(self) -> tuple[int, str]:
        """Rows, and the digest."""
        return self.rows, f"{self._sum:032x}"


def _said(value: Any) -> bytes:
    if isinstance(value, bytes | memoryview):
        return b"b" + bytes(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().encode() if value.tzinfo else value.replace(tzinfo=UTC).isoformat().encode()
    if isinstance(value, str):
        return b"s" + str(portable(value)).encode("utf-8", "surrogatepass")
    if isinstance(value, int):
        return b"%d" % value
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _plain(value: Any) -> Any:
    """JSON in one spelling: jsonb keeps 1e5 and 100000 as one number, 3e22 as its digits, and no order of keys."""
    if isinstance(value, dict):
        return {portable(key): _plain(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_plain(held) for held in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, Decimal):
        return _plain(float(value))
    if isinstance(value, int):
        return int(value) if abs(value) < 2**53 else float(value)
    return portable(value)


def read(connection: sa.Connection, table: sa.Table, columns: Sequence[sa.Column[Any]], at_once: int) -> Iterator[Sequence[Row]]:
    """Every row of a table, in parts, without holding it whole."""
    found = connection.execute(sa.select(*columns).select_from(table).execution_options(yield_per=at_once))
    for part in found.partitions():
        yield [tuple(row) for row in part]


def binders(dialect: sa.Dialect, columns: Sequence[sa.Column[Any]]) -> list[Callable[[Any], Any] | None]:
    """What makes of each column's value what the driver takes."""
    return [column.type.dialect_impl(dialect).bind_processor(dialect) for column in columns]


def index_texts(connection: sa.Connection) -> None:
    """Make the search index of texts anew, of the harvests whose texts were searched. Those of a harvest that was being written
    are left to its job."""
    with Session(connection) as session:
        session.execute(sa.text("delete from context_text"))
        done = list(session.scalars(sa.select(HarvestPart.harvest_id).where(HarvestPart.part == search.TEXTS_WRITTEN)))
        partly = HarvestPart.part.startswith(f"{search.TEXTS_WRITTEN}/"), HarvestPart.harvest_id.not_in(done)
        session.execute(sa.delete(HarvestPart).where(*partly))
        for harvest_id in done:
            search.index_texts(session, harvest_id)
        session.flush()
