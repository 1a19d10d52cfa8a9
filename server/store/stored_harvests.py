"""The harvests that are stored: listed, and deleted bit by bit, so that nobody who writes meanwhile waits for long."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import InstrumentedAttribute, Session

from sae_core.errors import JobError, NotFound
from server.db import Database
from server.store import search
from server.store.harvests import PUBLISHED, REPLACED, RUNNING
from server.store.jobs import OPEN
from server.store.viewers import check_own, everything
from server.tables import SAE, Context, Feature, FeatureHead, FeatureToken, Harvest, Job

CHUNK_SECONDS = 0.05
"""What one transaction aims at: half of what a writer may make others wait."""
FIRST_CHUNK = 20


@dataclass(frozen=True)
class StoredHarvest:
    """A harvest as `headscope harvests list` shows it."""

    id: int
    sae: str
    status: str
    """running, published, replaced"""
    n_tokens: int
    n_live: int
    n_examples: int
    created_at: datetime


def stored(session: Session) -> list[StoredHarvest]:
    """Every harvest, by SAE, newest first."""
    columns = (Harvest.id, SAE.name, Harvest.status, Harvest.n_tokens, Harvest.n_live, Harvest.n_examples, Harvest.created_at)
    found = session.execute(sa.select(*columns).join(SAE, SAE.id == Harvest.sae_id).order_by(SAE.name, Harvest.id.desc()))
    return [StoredHarvest(*row) for row in found]


@dataclass(frozen=True)
class Unfinished:
    """A harvest that is not whole."""

    id: int
    sae: str
    job_id: str
    created_at: datetime


def unfinished(session: Session) -> list[Unfinished]:
    """Harvests that were begun, or half deleted, oldest first."""
    columns = (Harvest.id, SAE.name, Harvest.job_id, Harvest.created_at)
    begun = sa.select(*columns).join(SAE, SAE.id == Harvest.sae_id).where(Harvest.status == RUNNING).order_by(Harvest.id)
    return [Unfinished(*row) for row in session.execute(begun)]


def n_made_by(session: Session, job_id: str) -> int:
    """How many of the harvests that a job published are still stored."""
    made = (Harvest.job_id == job_id, Harvest.status != RUNNING)
    return session.scalars(sa.select(sa.func.count(Harvest.id)).where(*made)).one()


def delete(db: Database, harvest_id: int, *, force: bool = False) -> None:
    """Delete a harvest with all its rows, in transactions of at most about 100 ms. Broken off, it is to be called again.

    Raises NotFound, and JobError where the pages show it (unless `force`) or a job still writes it.
    """
    with db.write() as session:
        harvest = session.get(Harvest, harvest_id, with_for_update=True)
        if harvest is None:
            raise NotFound(f"There is no harvest {harvest_id}; `headscope harvests list` shows those there are.", field="id")
        sae = session.get_one(SAE, harvest.sae_id, with_for_update=True)
        if harvest.status == PUBLISHED and not force:
            raise JobError(
                f"Harvest {harvest_id} is the one that the pages of {sae.name} show; --force deletes it all the same, and they "
                "are empty then until there is another."
            )
        check_own(session, sae, "delete this harvest")
        job = session.scalar(everything(sa.select(Job).where(Job.id == harvest.job_id)))
        if harvest.status == RUNNING and job is not None and job.status in OPEN:
            raise JobError(f"Harvest {harvest_id} is being written by {job.id}; cancel that job first.")
        if sae.harvest_id == harvest_id:
            sae.harvest_id = None
        harvest.status = REPLACED
    # Details and examples go with their features, what else is left with the harvest itself: there is little of it.
    _in_chunks(db, Feature.id, Feature.harvest_id == harvest_id)
    _in_chunks(db, Context.id, Context.harvest_id == harvest_id, also=search.delete_texts)
    for kind in (search.FIRES, search.PROMOTES, search.SUPPRESSES):
        _in_chunks(db, FeatureToken.token_id, sa.and_(FeatureToken.harvest_id == harvest_id, FeatureToken.kind == kind))
    with db.read() as session:
        heads = session.scalars(sa.select(FeatureHead.head).where(FeatureHead.harvest_id == harvest_id).distinct()).all()
    for head in heads:
        _in_chunks(db, FeatureHead.idx, sa.and_(FeatureHead.harvest_id == harvest_id, FeatureHead.head == head))
    with db.write() as session:
        session.execute(sa.delete(Harvest).where(Harvest.id == harvest_id))


def _in_chunks(
    db: Database,
    key: InstrumentedAttribute[int],
    which: sa.ColumnElement[bool],
    *,
    also: Callable[[Session, Sequence[int]], None] | None = None,
) -> None:
    """Delete the rows `which`, told apart by `key`; as many at a time as take about CHUNK_SECONDS. `also` deletes what else
    goes by those keys."""
    size = FIRST_CHUNK
    while True:
        with db.write() as session:
            begun = time.monotonic()
            keys = session.scalars(sa.select(key).where(which).order_by(key).limit(size)).all()
            if keys:
                session.execute(sa.delete(key.class_).where(which, key.in_(keys)))
                if also is not None:
                    also(session, keys)
        if not keys:
            return
        size = min(max(1, int(len(keys) * CHUNK_SECONDS / max(time.monotonic() - begun, 1e-4))), 4 * size, 10_000)
