"""`/jobs` and `/jobs/{job_id}`: what workers do, as it happens."""

from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated

import anyio
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse

from server.figures import collecting
from server.jobs import Jobs
from server.pages.reply import Read, known_schema, render, reply
from server.pages.start import KINDS, form_for
from server.store import jobs as store
from server.store import studies
from server.store.jobs import JobRecord, LogLine, WorkerRecord
from server.store.saes import CurvePoint, saes_made_by

router = APIRouter()

SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class JobsPage:
    """Jobs, newest first, and the workers there are to do them."""

    jobs: tuple[JobRecord, ...]
    workers: tuple[WorkerRecord, ...]
    """Those heard from in the last minute."""


@dataclass(frozen=True)
class JobPage:
    """One job with its curves and its log."""

    job: JobRecord
    """The job itself."""
    children: tuple[JobRecord, ...]
    """Jobs that it asked for."""
    curve: tuple[CurvePoint, ...]
    """What training measured, step by step."""
    log: tuple[LogLine, ...]
    """What it said, oldest first."""
    study: int | None
    """The study it made, once it is there."""
    saes: tuple[str, ...]
    """The SAEs it made, measured or swept, once they are there."""
    form: str | None
    """The form that starts jobs like it, at /jobs/new/."""
    counters: dict[str, float]
    """Of a harvest: `firings` and `live` features of the scan so far."""


@router.get("/jobs", include_in_schema=False)
@router.get("/jobs.json", response_model=JobsPage)
def jobs_page(request: Request, read: Read) -> Response:
    """Every job."""
    page = JobsPage(tuple(store.newest(read)), tuple(store.workers(read, seen_within=60)))
    return reply(request, page, "jobs.html", block="_jobs.html", forms={kind: starts.title for kind, starts in KINDS.items()})


@router.get("/jobs/{job_id}", include_in_schema=False)
@router.get("/jobs/{job_id}.json", response_model=JobPage)
def job_page(request: Request, job_id: str, read: Read) -> Response:
    """One job as it stands; a browser with JavaScript then follows its events."""
    return reply(request, look(read, job_id), "job.html", block="_job.html")


def look(session: Session, job_id: str) -> JobPage:
    """The job as it stands: five queries."""
    job = store.get(session, job_id)
    many = job.kind == "sweep"  # its SAEs and their curves have a page of their own
    points = () if many else tuple(CurvePoint(step, values) for step, values in store.points(session, job_id))
    counted = job.kind == "harvest"
    return JobPage(
        job=job,
        children=tuple(store.children(session, job_id)),
        curve=() if counted else points,
        log=tuple(store.log_lines(session, job_id)),
        study=studies.of_job(session, job_id) if job.kind in ("study", "compare") else None,
        saes=() if many else saes_made_by(session, job_id, store.saes_of(job.config)),
        form=form_for(job.kind, job.config),
        counters=points[-1].values if counted and points else {},
    )


@router.post("/jobs/{job_id}/cancel", include_in_schema=False)
def cancel(request: Request, job_id: str) -> Response:
    """Ask the job's worker to stop, then show the job."""
    with closing(Jobs(request.app.state.settings, known_schema(request))) as jobs:
        jobs.cancel(job_id)
    return RedirectResponse(f"/jobs/{job_id}", 303)


@router.post("/jobs/{job_id}/retry", include_in_schema=False)
def retry(request: Request, job_id: str) -> Response:
    """Run a failed or cancelled job again, from what it left on disk."""
    with closing(Jobs(request.app.state.settings, known_schema(request))) as jobs:
        jobs.retry(job_id)
    return RedirectResponse(f"/jobs/{job_id}", 303)


def known_job(request: Request, job_id: str) -> str:
    """The id, once it is sure that there is such a job: an event stream cannot answer 404."""
    with known_schema(request).read() as session:
        return store.get(session, job_id).id


@router.get("/jobs/{job_id}/events", response_class=EventSourceResponse, include_in_schema=False)
async def events(request: Request, job_id: Annotated[str, Depends(known_job)]) -> AsyncIterator[ServerSentEvent]:
    """The job's block whenever it changes, until the job ends."""
    shown = ""
    while True:
        block, ended = await run_sync(_block, request, job_id)
        if block != shown:
            shown = block
            yield ServerSentEvent(raw_data=block)
        if ended:
            yield ServerSentEvent(event="end", raw_data="")
            return
        await anyio.sleep(SECONDS_BETWEEN_LOOKS)


def _block(request: Request, job_id: str) -> tuple[str, bool]:
    with known_schema(request).read() as session:
        page = look(session, job_id)
    with collecting():
        return render("_job.html", page=page), page.job.ended
