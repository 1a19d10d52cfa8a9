"""Writing a harvest: begun once, filled chunk by chunk, published by moving one pointer.

A part may be written again after a crash, by this worker or another; its rows count once, because the mark that says a
chunk is written (`harvest_part`) is committed with them. Every transaction first asks its fence whether the job is still
ours. Chunks are small: on SQLite a writer keeps all others waiting, for at most about 100 ms.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from sae_core.errors import JobError
from server.db import Database
from server.packing import F4, I4, fold, pack, pack_acts, pack_dfa, read_examples, shorten
from server.store.chunks import cut
from server.tables import SAE, Context, Example, Feature, FeatureDetail, Harvest, HarvestPart, HeadSummary, now

if TYPE_CHECKING:
    from sae_core.records import ExampleRecord, FeatureRecord, HarvestTotals, HeadRecord, RowRecord

Fence = Callable[[Session], object]
"""Raises when the job has been taken over or cancelled: `lambda session: jobs.check(session, job_id, attempt)`."""

T = TypeVar("T")

RUNNING, PUBLISHED, REPLACED = "running", "published", "replaced"
FEATURES_AT_ONCE = 100
EXAMPLES_AT_ONCE = 800


def begin(
    db: Database, *, sae_id: int, corpus_id: int, job_id: str, config: dict[str, Any], totals: "HarvestTotals", fence: Fence
) -> int:
    """The id of the job's harvest, made if it is not there."""
    with db.write() as session:
        fence(session)
        there = session.scalar(sa.select(Harvest.id).where(Harvest.job_id == job_id, Harvest.sae_id == sae_id))
        if there is not None:
            return there
        harvest = Harvest(
            sae_id=sae_id,
            corpus_id=corpus_id,
            job_id=job_id,
            config=config,
            status=RUNNING,
            n_tokens=totals.n_tokens,
            n_rows=totals.n_rows,
            n_live=totals.n_live,
            context=totals.context,
        )
        session.add(harvest)
        session.flush()
        return harvest.id


def write_features(db: Database, harvest_id: int, features: Iterable["FeatureRecord"], fence: Fence) -> None:
    """Store every feature of the SAE, and the heads of live ones."""
    chunks = cut(features, lambda _: 1, FEATURES_AT_ONCE)
    write_chunks(db, harvest_id, "features", chunks, insert_features, fence)


def write_part(db: Database, harvest_id: int, part: int, rows: Iterable["RowRecord"], fence: Fence) -> None:
    """Store one part's rows with their examples. The features must be there."""
    with db.read() as session:
        found = session.execute(sa.select(Feature.idx, Feature.id).where(Feature.harvest_id == harvest_id))
        ids = {row.idx: row.id for row in found}

    def insert(session: Session, harvest_id: int, chunk: list["RowRecord"]) -> float | None:
        _insert_rows(session, harvest_id, chunk, ids)
        return max((example.gap for row in chunk for example in row.examples), default=None)

    chunks = cut(rows, lambda row: len(row.examples), EXAMPLES_AT_ONCE)
    write_chunks(db, harvest_id, f"part {part}", chunks, insert, fence)


def write_heads(db: Database, harvest_id: int, heads: Iterable["HeadRecord"], fence: Fence) -> None:
    """Store what the features say of each head."""

    def insert(session: Session, harvest_id: int, chunk: list["HeadRecord"]) -> None:
        session.execute(sa.insert(HeadSummary), [{"harvest_id": harvest_id, **vars(head)} for head in chunk])

    write_chunks(db, harvest_id, "heads", cut(heads, lambda _: 1, FEATURES_AT_ONCE), insert, fence)


def publish(db: Database, harvest_id: int, n_parts: int, fence: Fence) -> None:
    """Make it the one that readers see; the one before becomes `replaced`. JobError when a part is missing."""
    with db.read() as session:  # what is written does not change any more, so it may be counted outside the transaction
        done = _marks(session, harvest_id)
        missing = [name for name in ("features", "heads", *(f"part {i}" for i in range(n_parts))) if name not in done]
        if missing:
            raise JobError(f"Harvest {harvest_id} cannot be published: {', '.join(missing[:5])} not written yet; retry its job.")
        examples = sa.select(sa.func.count(Example.id)).join(Feature, Feature.id == Example.feature_id)
        n_examples = session.scalar(examples.where(Feature.harvest_id == harvest_id)) or 0
        worst_gap = session.scalar(sa.select(sa.func.max(HarvestPart.worst_gap)).where(HarvestPart.harvest_id == harvest_id))
    with db.write() as session:
        fence(session)
        harvest = session.get_one(Harvest, harvest_id)
        if harvest.status != RUNNING:
            return
        sae = session.get_one(SAE, harvest.sae_id, with_for_update=True)
        if sae.harvest_id is not None:
            session.get_one(Harvest, sae.harvest_id).status = REPLACED
        harvest.n_examples, harvest.worst_gap = n_examples, worst_gap
        harvest.status, harvest.published_at = PUBLISHED, now()
        sae.harvest_id = harvest_id


def stored_gaps(session: Session, harvest_id: int) -> NDArray[np.float64]:
    """The identity of every example as it is stored: |kept + dropped + before + bias - preact| / (sum |DFA| + |bias|)."""
    found = session.scalars(
        sa.select(Example).join(Feature, Feature.id == Example.feature_id).where(Feature.harvest_id == harvest_id)
    )
    return np.concatenate([np.zeros(0), *(read_examples(part).gap for part in found.partitions(1000))])


# ---- chunks, each written once ----


def _marks(session: Session, harvest_id: int) -> set[str]:
    return set(session.scalars(sa.select(HarvestPart.part).where(HarvestPart.harvest_id == harvest_id)))


def write_chunks(
    db: Database,
    harvest_id: int,
    name: str,
    chunks: Iterator[list[T]],
    insert: Callable[[Session, int, list[T]], float | None],
    fence: Fence,
) -> None:
    """Each chunk in a transaction of its own, with its mark; `name` is the mark of all. What is written already is left."""
    with db.read() as session:
        done = _marks(session, harvest_id)
    if name in done:
        return
    for number, chunk in enumerate(chunks):
        if f"{name}/{number}" not in done:
            with db.write() as session:
                fence(session)
                mark = HarvestPart(harvest_id=harvest_id, part=f"{name}/{number}")
                session.add(mark)
                session.flush()
                mark.worst_gap = insert(session, harvest_id, chunk)
    with db.write() as session:
        fence(session)
        session.add(HarvestPart(harvest_id=harvest_id, part=name))


# ---- rows of tables ----


def insert_features(session: Session, harvest_id: int, chunk: Sequence["FeatureRecord"]) -> None:
    """Rows of features, with their details and heads."""
    rows = [_feature(harvest_id, feature) for feature in chunk]
    ids = {idx: id for id, idx in session.execute(sa.insert(Feature).returning(Feature.id, Feature.idx), rows)}
    session.execute(sa.insert(FeatureDetail), [_detail(ids[feature.idx], feature) for feature in chunk])
    heads = (row for feature in chunk if feature.n_fired for row in _heads(harvest_id, feature))
    insert_plain(session, "feature_head", FEATURE_HEAD, heads)


def _feature(harvest_id: int, feature: "FeatureRecord") -> dict[str, Any]:
    return {
        "harvest_id": harvest_id,
        "idx": feature.idx,
        "n_fired": feature.n_fired,
        "density": feature.density,
        "max_act": feature.max_act,
        "mean_act": feature.mean_act,
        "top_head": feature.top_head,
        "top_head_share": feature.top_head_share,
        "top_head_dfa": feature.top_head_dfa,
        "top_head_dfa_share": feature.top_head_dfa_share,
        "distance": feature.distance,
        "family": feature.family,
        "family_score": feature.family_score,
        "shuffle_key": zlib.crc32(feature.idx.to_bytes(4, "little")) & 0x7FFFFFFF,
    }


def _detail(feature_id: int, feature: "FeatureRecord") -> dict[str, Any]:
    return {
        "feature_id": feature_id,
        "histogram": fold(feature.histogram),
        "bands": shorten(feature.bands),
        "head_norm": pack(feature.head_norm, F4),
        "head_dfa": pack(feature.head_dfa, F4),
        "head_dfa_std": pack(feature.head_dfa_std, F4),
        "promoted": feature.promoted,
        "suppressed": feature.suppressed,
        "neighbours": feature.neighbours,
        "evidence": feature.evidence,
        "families": feature.families,
        "verdict": None if feature.verdict is None else feature.verdict.replace("\0", "\u2400"),  # as in JSON (db.py)
        "logits": fold(feature.logits),
        "positions": shorten(feature.positions),
        "coactive": shorten(feature.coactive),
        "sample": shorten(feature.sample),
    }


FEATURE_HEAD = {
    "harvest_id": "int4",
    "head": "int4",
    "idx": "int4",
    "norm_share": "float8",
    "dfa": "float8",
    "dfa_share": "float8",
}
"""Columns of a feature at a head, and their types on PostgreSQL."""


def _heads(harvest_id: int, feature: "FeatureRecord") -> Iterator[tuple[object, ...]]:
    size = float(np.abs(feature.head_dfa).sum())
    known = feature.head_dfa.tolist() or [None] * len(feature.head_norm)
    for head, (norm, dfa) in enumerate(zip(feature.head_norm.tolist(), known, strict=True)):
        share = abs(dfa) / size if size > 0 and dfa is not None else None
        yield harvest_id, head, feature.idx, norm, dfa, share


def _insert_rows(session: Session, harvest_id: int, chunk: list["RowRecord"], feature_ids: dict[int, int]) -> None:
    contexts = [{"harvest_id": harvest_id, "row": r.row, "tokens": pack(r.tokens, I4), "texts": r.texts} for r in chunk]
    ids = {row: id for id, row in session.execute(sa.insert(Context).returning(Context.id, Context.row), contexts)}
    examples = [e for r in chunk for e in r.examples]
    if examples:
        insert_examples(session, _examples(examples, feature_ids, ids))


EXAMPLE = {
    "feature_id": "int8",
    "context_id": "int8",
    "band": "int4",
    "rank": "int4",
    "dest": "int4",
    "start": "int4",
    "act": "float8",
    "acts": "bytea",
    "dfa": "bytea",
}
"""Columns of an example, and their types on PostgreSQL."""


def _examples(
    examples: list["ExampleRecord"], feature_ids: dict[int, int], context_ids: dict[int, int]
) -> Iterator[tuple[object, ...]]:
    for e, acts, dfa in zip(examples, pack_acts(examples), pack_dfa(examples), strict=True):
        where = (feature_ids[e.feature], context_ids[e.row], e.band, e.rank, e.dest, e.start)
        yield (*where, e.act, acts, dfa)


def insert_examples(session: Session, rows: Iterable[tuple[object, ...]]) -> None:
    """Examples, as `EXAMPLE` names their columns."""
    insert_plain(session, "example", EXAMPLE, rows)


def insert_plain(session: Session, table: str, columns: dict[str, str], rows: Iterable[tuple[object, ...]]) -> None:
    """Straight through the driver, and on PostgreSQL by COPY: a harvest has dozens of examples and heads per feature, and
    SQLAlchemy's part of inserting one costs more than the database's. `columns` has their types on PostgreSQL, whose binary COPY
    has to be told."""
    connection, names = session.connection(), ", ".join(columns)
    if connection.dialect.name == "postgresql":
        cursor: Any = connection.connection.cursor()
        with cursor, cursor.copy(f"COPY {table} ({names}) FROM STDIN (FORMAT BINARY)") as copy:
            copy.set_types(list(columns.values()))
            for row in rows:
                copy.write_row(row)
    elif held := list(rows):
        marks = ", ".join("?" * len(columns))
        connection.exec_driver_sql(f"INSERT INTO {table} ({names}) VALUES ({marks})", held)  # noqa: S608 - our own names
