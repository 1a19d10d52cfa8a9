"""`/status`: how the server is, for those who look after it."""

import platform
from collections import defaultdict
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session

from sae_core.errors import EngineAway
from server.access import needs
from server.live import Live
from server.pages.reply import VERSION, Read, reply
from server.settings import Settings
from server.store import watching
from server.store.watching import Running
from server.watch import disk

router = APIRouter()

SILENT = 60.0
"""Seconds after which a worker counts as dead and its jobs are taken over."""
SCARCE = 0.05
"""Share of a disk below which little is left."""


@dataclass(frozen=True)
class WorkerLine:
    """A worker, and what it does."""

    id: str
    device: str
    pid: int
    silent: float
    """Seconds since it was heard."""
    lost: bool
    """Silent for so long that others take its jobs."""
    job: Running | None
    """What it is at; null too where that is not yours to see."""


@dataclass(frozen=True)
class QueueLine:
    """Jobs of a kind."""

    kind: str
    queued: int
    running: int
    done: int
    failed: int
    cancelled: int


@dataclass(frozen=True)
class DiskLine:
    """The disk of a folder, in bytes."""

    folder: str
    free: int
    total: int
    scarce: bool


@dataclass(frozen=True)
class EngineLine:
    """The engine."""

    answers: bool
    model: str | None
    """The model that is warm."""
    trouble: str | None


@dataclass(frozen=True)
class StatusPage:
    """How it is now."""

    workers: tuple[WorkerLine, ...]
    engine: EngineLine
    queue: tuple[QueueLine, ...]
    waited: float
    """Seconds that the job waits that has waited longest."""
    disks: tuple[DiskLine, ...]
    database: str
    database_bytes: int | None
    schema: str
    version: str
    python: str


@router.get("/status", include_in_schema=False)
@router.get("/status.json", response_model=StatusPage)
@needs("editor")
def status_page(request: Request, read: Read) -> Response:
    """Workers, engine, queue, disk, database and versions."""
    return reply(request, status(request.app.state.settings, read), "status.html", block="_status.html")


def status(settings: Settings, session: Session) -> StatusPage:
    """How it is now."""
    queue = watching.queue(session)
    at_work = {one.worker: one for one in queue.running}
    kinds: dict[str, dict[str, int]] = defaultdict(dict)
    for (kind, state), n in queue.counts.items():
        kinds[kind][state] = n
    states = ("queued", "running", "done", "failed", "cancelled")
    disks = {name: disk(folder) for name, folder in (("data", settings.data), ("cache", settings.cache))}
    return StatusPage(
        tuple(WorkerLine(b.id, b.device, b.pid, b.silent, b.silent > SILENT, at_work.get(b.id)) for b in queue.workers),
        _engine(settings),
        tuple(QueueLine(kind, *(found.get(state, 0) for state in states)) for kind, found in sorted(kinds.items())),
        queue.waited,
        tuple(DiskLine(name, d.free, d.total, d.free < SCARCE * d.total) for name, d in disks.items() if d is not None),
        " ".join(watching.database_version(session)),
        queue.bytes,
        watching.schema_revision(session),
        VERSION,
        platform.python_version(),
    )


def _engine(settings: Settings) -> EngineLine:
    asked = Live(settings, seconds=2.0)
    try:
        return EngineLine(True, asked.loaded(), None)
    except EngineAway as error:
        return EngineLine(False, None, str(error))
    finally:
        asked.close()
