"""How the queue, the workers and the database are, for those who look after them. Of everybody's jobs, and no names of any."""

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session

from server.store.jobs import QUEUED, RUNNING
from server.store.viewers import everything
from server.tables import Job, Worker, now


@dataclass(frozen=True)
class Running:
    """A job that runs."""

    id: str
    kind: str
    title: str
    worker: str | None
    phase: str | None
    rate: float
    """Units a second, lately."""
    unit: str


@dataclass(frozen=True)
class Beat:
    """A worker's slot."""

    id: str
    device: str
    pid: int
    last_seen: datetime
    silent: float
    """Seconds since it was heard."""


@dataclass(frozen=True)
class Queue:
    """How it is now."""

    counts: dict[tuple[str, str], int]
    """Jobs by kind and status."""
    waited: float
    """Seconds that the job waits that has waited longest; 0 where none does."""
    running: tuple[Running, ...]
    """Those that the session's viewer may see."""
    workers: tuple[Beat, ...]
    bytes: int | None
    """Size of the database."""


def queue(session: Session) -> Queue:
    """Queue, workers and size: four small queries."""
    present = now()
    counted = sa.select(Job.kind, Job.status, sa.func.count()).group_by(Job.kind, Job.status)
    oldest = sa.select(sa.func.min(Job.created_at)).where(Job.status == QUEUED)
    since: datetime | None = session.scalar(everything(oldest))
    runs = sa.select(Job.id, Job.kind, Job.title, Job.worker, Job.phase, Job.rate, Job.unit).where(Job.status == RUNNING)
    beats = session.scalars(sa.select(Worker).order_by(Worker.id))
    return Queue(
        {(kind, status): n for kind, status, n in session.execute(everything(counted))},
        max((present - since).total_seconds(), 0.0) if since else 0.0,
        tuple(Running(*row) for row in session.execute(runs.order_by(Job.started_at))),
        tuple(
            Beat(row.id, row.device, row.pid, row.last_seen, max((present - row.last_seen).total_seconds(), 0.0)) for row in beats
        ),
        database_bytes(session),
    )


def rates(found: Queue, worker: str | None = None) -> dict[tuple[str, str], float]:
    """What running jobs do a second, by kind and unit; those of one worker, where it is given."""
    summed: dict[tuple[str, str], float] = defaultdict(float)
    for one in found.running:
        if worker in (None, one.worker):
            summed[one.kind, one.unit] += one.rate
    return dict(summed)


def database_bytes(session: Session) -> int | None:
    """Size of the database as it says itself, in bytes."""
    if session.get_bind().dialect.name == "sqlite":
        pages = session.execute(sa.text("select page_count * page_size from pragma_page_count, pragma_page_size")).scalar()
    else:
        pages = session.execute(sa.text("select pg_database_size(current_database())")).scalar()
    return None if pages is None else int(pages)


Backend = Literal["SQLite", "PostgreSQL"]


def database_version(session: Session) -> tuple[Backend, str]:
    """Which database it is, and its version."""
    if session.get_bind().dialect.name == "sqlite":
        return "SQLite", str(session.execute(sa.text("select sqlite_version()")).scalar())
    return "PostgreSQL", str(session.execute(sa.text("show server_version")).scalar()).split()[0]


def schema_revision(session: Session) -> str:
    """The schema's revision."""
    return str(session.execute(sa.text("select version_num from alembic_version")).scalar())
