"""Browsing and searching a generated database: plans use indexes, and SQLite and PostgreSQL say the same."""

import itertools
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from bench import browse
from server.db import Database
from server.store import search, walk
from server.store.examples import example_page
from server.store.features import SORT_KEYS, FeatureQuery, feature_pages, feature_rows, feature_table, place_of, walk_of
from server.store.labels import feature_labels
from server.store.saes import Door, find_sae
from server.store.stored_harvests import delete
from server.tables import FeatureToken

FEATURES, LAYERS = 600, 2
FILTERS = len(browse.filter_kinds(random.Random(0)))


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    if request.param == "sqlite":
        yield from filled(sa.URL.create("sqlite", database=str(tmp_path_factory.mktemp("browse") / "b.db")))
        return
    server: sa.URL = request.getfixturevalue("postgres")
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        connection.execute(sa.text("create database browse"))
    yield from filled(server.set(database="browse"))


def filled(url: sa.URL) -> Iterator[Database]:
    browse.generate(url, FEATURES, LAYERS)
    database = Database(url)
    yield database
    database.close()


def explained(session: Session, statement: sa.Select[tuple[object, int]]) -> str:
    dialect = session.get_bind().dialect  # the engine's own, which writes hints
    asked = statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True})
    if dialect.name == "sqlite":
        return "\n".join(row[3] for row in session.execute(sa.text(f"explain query plan {asked}")))
    # Tables this small are read whole whatever indexes there are, unless that is made dear.
    session.execute(sa.text("set local enable_seqscan = off"))
    return "\n".join(row[0] for row in session.execute(sa.text(f"explain {asked}")))


def test_a_pass_takes_the_rows_in_their_order_and_looks_a_heads_shares_up_by_them(database: Database) -> None:
    if database.engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL keeps statistics and chooses well by itself")
    with database.read() as session:
        door = find_sae(session, "l1")
        query = FeatureQuery(sort="mean", head=3, leads=True, min_max=1.0, min_density=1e-6)
        whole = list(walk_of(door, query).statements(False, None, 51, False))[-1]
        first, second, *_ = explained(session, whole).splitlines()
        assert first == f"SEARCH feature USING INDEX {walk.IN_ORDER.removeprefix('INDEXED BY ')} (harvest_id=?)"
        assert second == "SEARCH feature_head USING PRIMARY KEY (harvest_id=? AND head=? AND idx=?)"
        alone = FeatureQuery(head=3, min_share=0.4)
        for statement in walk_of(door, alone).statements(False, None, 51, True):
            assert "SEARCH feature USING" not in explained(session, statement), "a head's own table is enough"


@pytest.mark.parametrize("number", range(FILTERS))
@pytest.mark.parametrize("key", SORT_KEYS)
def test_every_sort_and_filter_is_read_by_indexes(database: Database, key: str, number: int) -> None:
    with database.read() as session:
        door = find_sae(session, "l1")
        for sign in ("", "-"):
            query = FeatureQuery(sort=f"{sign}{key}", **browse.filter_kinds(random.Random(1))[number])
            way, at = walk_of(door, query), place_of(session, door, 40, query)
            for start in (None, at):
                for missing in way.parts(start, False):
                    within = start if start is not None and (start.value is None) == missing else None
                    plans = [explained(session, one) for one in way.statements(missing, within, 51, way.descending)]
                    assert all("SCAN feature" not in plan and "Seq Scan" not in plan for plan in plans), plans
                    assert all("INDEX" in plan or "PRIMARY KEY" in plan or "Index" in plan for plan in plans), plans
                    if not query.model_dump(exclude_defaults=True, exclude={"sort"}):
                        assert "TEMP B-TREE" not in plans[0], "an order that an index has needs no sorting"


READS: dict[str, Callable[[Session, Door], object]] = {
    "an SAE": lambda session, door: find_sae(session, door.sae.name),
    "a feature": lambda session, door: feature_pages(session, door, [40]),
    "its numbers": lambda session, door: feature_pages(session, door, [40], others=False, examples=False, parts=()),
    "a hundred features": lambda session, door: feature_pages(session, door, range(100)),
    "all examples of ten": lambda session, door: feature_pages(session, door, range(10), every=True, others=False),
    "lines of the table": lambda session, door: feature_rows(session, door, None, range(50)),
    "lines at a head": lambda session, door: feature_rows(session, door, 3, range(50)),
    "an example": lambda session, door: example_page(session, door, 40, 0, 0),
    "labels of a feature": lambda session, door: feature_labels(session, door.sae, door.id, 40),
    # A word that is nowhere: of one that is everywhere PostgreSQL rightly takes the first rows that there are.
    **{
        f"a search by {kind} for {q}": partial(lambda q, kind, session, door: search.search(session, door, q, kind), q, kind)
        for kind in search.KINDS
        for q in (("nowhere",) if kind == "text" else ("the",))
    },
}
"""What scripts ask by the API, beside the table's filters."""
LARGE = ("feature", "feature_detail", "feature_head", "example", "context", "context_text", "feature_token")


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_scripts_read_is_read_by_indexes(database: Database, read: Callable[[Session, Door], object]) -> None:
    asked: list[tuple[str, Any]] = []
    search.put_words_in(database)  # as whatever writes a harvest's words does

    def note(_connection: object, _cursor: object, statement: str, given: Any, *_: object) -> None:
        asked.append((statement, given))

    with database.read() as session:
        door, explain = find_sae(session, "l1"), "explain"
        sa.event.listen(database.engine, "before_cursor_execute", note)
        try:
            read(session, door)
        finally:
            sa.event.remove(database.engine, "before_cursor_execute", note)
        if database.engine.dialect.name == "sqlite":
            explain = "explain query plan"
        else:
            # Of tables this small all is read, and joined by hashes, whatever indexes there are, unless that is made dear.
            for way in ("seqscan", "hashjoin", "mergejoin"):
                session.execute(sa.text(f"set local enable_{way} = off"))
        assert asked
        for statement, given in asked:
            found = session.connection().exec_driver_sql(f"{explain} {statement}", given).all()
            plan = "\n".join(str(row[-1]) for row in found)
            assert not walked_whole(plan), f"{statement}\n{plan}"


def test_new_words_are_put_into_their_index_by_whoever_owns_it(database: Database) -> None:
    if database.is_file:
        return search.put_words_in(database)  # SQLite has no such list

    def waiting() -> int:
        with database.read() as session:
            found: int = session.scalars(sa.text("select pending_tuples from pgstatginindex('ix_context_text_words')")).one()
            return found

    def run(*statements: str) -> None:
        with database.write() as session:
            for statement in statements:
                session.execute(sa.text(statement))

    run(
        "create extension pgstattuple",
        "create role stranger login",
        "grant all on all tables in schema public to stranger",
        "alter table context_text set (autovacuum_enabled = false)",
    )
    search.put_words_in(database)
    other = Database(database.url.set(username="stranger"))
    try:
        run("insert into context_text (context_id, words) values (1000000000, cast('tide' as tsvector))")
        assert waiting() == 1
        search.put_words_in(other)
        assert waiting() == 1, "PostgreSQL would have refused it"
        search.put_words_in(database)
        assert waiting() == 0
    finally:
        other.close()
        run("delete from context_text where context_id = 1000000000", "drop owned by stranger", "drop role stranger")


def walked_whole(plan: str) -> set[str]:
    """Large tables that a plan reads from end to end, be it by an index: SQLite says SCAN, PostgreSQL names no condition."""
    postgresql = r"Seq Scan on (\w+)|Index(?: Only)? Scan .* on (\w+).*\n(?!\s*Index Cond)"
    found = re.findall(rf"\bSCAN (\w+)(?! VIRTUAL TABLE)|{postgresql}", f"{plan}\n")  # the scan may be the last line
    return {name for names in found for name in names} & set(LARGE)


def test_a_walk_from_end_to_end_is_seen(database: Database) -> None:
    with database.read() as session:
        if database.engine.dialect.name == "sqlite":
            found = session.execute(sa.text("explain query plan select count(*) from feature where n_fired + 0 > 9")).all()
        else:
            session.execute(sa.text("set local enable_seqscan = off"))
            found = session.execute(sa.text("explain select count(*) from feature where n_fired + 0 > 9")).all()
    assert walked_whole("\n".join(str(row[-1]) for row in found)) == {"feature"}
    assert walked_whole("Aggregate\n  ->  Index Only Scan using ix_f on feature  (cost=1)") == {"feature"}
    assert walked_whole("Index Scan using ix_f on feature  (cost=1)\n  Index Cond: (idx = 3)") == set()


def test_what_lies_beyond_the_reach_is_found_as_well(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with database.read() as session:
        door = find_sae(session, "l1")
        half = ("sqlite", "postgresql").index(session.get_bind().dialect.name)
        kinds = browse.filter_kinds(random.Random(2))
        for (n, key), (m, filters) in itertools.product(enumerate(SORT_KEYS), enumerate(kinds)):
            if (n + m) % 2 != half:  # each database tries every key and every filter, both together every pair
                continue
            query = FeatureQuery(sort=f"-{key}", **filters)
            monkeypatch.setattr(walk, "REACH", 10 * FEATURES)
            near = pages(session, door, query, 200)
            monkeypatch.setattr(walk, "REACH", 7)
            assert pages(session, door, query, 60) == near
            assert len(near) == feature_table(session, door, query).n_matching


def pages(session: Session, door: Door, query: FeatureQuery, limit: int) -> list[int]:
    """The features of all pages, forth; and back it is the same."""
    found: list[int] = []
    after: str | None = None
    while True:
        table = feature_table(session, door, query.model_copy(update={"limit": limit, "after": after}))
        found += [row.index for row in table.rows]
        if table.next is None:
            break
        after = table.next
    back = [row.index for row in table.rows]
    while table.previous is not None:
        table = feature_table(session, door, query.model_copy(update={"limit": limit, "before": table.previous}))
        back = [row.index for row in table.rows] + back
    assert back == found
    return found


def test_both_databases_find_the_same(database: Database) -> None:
    with database.read() as session:
        door = find_sae(session, "l0")
        for q, kind in browse._searches(random.Random(3), 24):
            found = search.search(session, door, q, kind)
            assert found.trouble is None
            seen = SEEN.setdefault((q, kind), [(hit.index, hit.token, hit.band, hit.rank) for hit in found.hits])
            assert [(hit.index, hit.token, hit.band, hit.rank) for hit in found.hits] == seen
        assert any(seen for (_, kind), seen in SEEN.items() if kind == "text")


SEEN: dict[tuple[str, str], list[tuple[object, ...]]] = {}


@pytest.mark.parametrize("q", ["'", '"', "a' | b", "a & !b", "tide:*", "\\", "%", "(", "東京", "x" * 10_000, "the " * 500])
def test_no_query_is_taken_for_syntax(database: Database, q: str) -> None:
    with database.read() as session:
        for kind in search.KINDS:
            search.search(session, find_sae(session, "l0"), q, kind)
        search.search_all(session, q)


def test_a_deleted_harvest_leaves_nothing_to_search(database: Database) -> None:
    delete(database, 2, force=True)
    with database.read() as session:
        assert session.scalar(sa.select(sa.func.count()).where(FeatureToken.harvest_id == 2)) == 0
        assert session.scalar(sa.select(sa.func.count()).where(FeatureToken.harvest_id == 1)) > 0
        assert search._rows_with(session, "the", 2, 5) == []
        assert len(search._rows_with(session, "the", 1, 5)) == 5
