"""Jobs under `/api/v1`: created from the same configs as the forms' and the command line's, watched as they run."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import anyio
from anyio.to_thread import run_sync
from fastapi import Depends, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field

from sae_core.config import (
    AS_USUAL,
    CompareJob,
    DashboardsJob,
    EvaluateJob,
    HarvestJob,
    ImportJob,
    StudyJob,
    SweepConfig,
    TrainConfig,
    Wishes,
)
from sae_core.errors import UsageError
from server.api.common import LONGEST_NAME, PREFIX, BriefRead, api_router, queue, replies, respond
from server.jobs import Jobs
from server.pages.jobs import SECONDS_BETWEEN_LOOKS, JobPage, look
from server.pages.reply import to_json
from server.pages.writing import reading
from server.store import jobs as store
from server.store.jobs import JobRecord, WorkerRecord

router = api_router("Jobs")

JobId = Annotated[str, Path(description="Id of the job.", max_length=LONGEST_NAME, examples=["train-smollm2-l17-1"])]
LONGEST_WATCH = 3600
Status = Literal["queued", "running", "done", "failed", "cancelled"]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _NewJob(_Body):
    how: Wishes = AS_USUAL
    """How it is to be done: how urgent it is, where, and for how long at most."""


class NewTraining(_NewJob):
    """Train an SAE."""

    kind: Literal["train"]
    config: TrainConfig
    """As `headscope train --config` takes it."""
    name: str | None = Field(None, max_length=LONGEST_NAME)
    """Of the SAE; left out, it tells model, layer and config."""


class NewSweep(_NewJob):
    """Train many SAEs on one stream of activations."""

    kind: Literal["sweep"]
    config: SweepConfig
    """As `headscope sweep --config` takes it."""
    name: str | None = Field(None, max_length=LONGEST_NAME)
    """Of the sweep."""


class NewHarvest(_NewJob):
    """Harvest SAEs that exist."""

    kind: Literal["harvest"]
    config: HarvestJob
    """The SAEs and the sweep of text."""


class NewEvaluation(_NewJob):
    """Measure an SAE that exists."""

    kind: Literal["evaluate"]
    config: EvaluateJob
    """The SAE and what is measured of it."""


class NewStudy(_NewJob):
    """Put a question to a feature or to a model's heads."""

    kind: Literal["study"]
    config: StudyJob
    """Its own `kind` says which question."""


class NewComparison(_NewJob):
    """Match the features of two SAEs of one site."""

    kind: Literal["compare"]
    config: CompareJob
    """The two SAEs."""


class NewImport(_NewJob):
    """Make a peer's SAE one of ours."""

    kind: Literal["import"]
    config: ImportJob
    """As `headscope import sae` takes it. `location` is of the worker's machine, from its root on, or a name on the hub; only a
    worker opens what is there, and what is wrong with it stands in the job's `error`."""
    name: str | None = Field(None, max_length=LONGEST_NAME)
    """Of the SAE here; left out, it is made of the location."""


class NewDashboards(_NewJob):
    """Make dashboards of SAEDashboard or Neuronpedia a harvest. The job's own kind is `import`."""

    kind: Literal["dashboards"]
    config: DashboardsJob
    """As `headscope import dashboards` takes it. `location` is a folder of the worker's machine, from its root on."""


AnyNewJob = NewTraining | NewSweep | NewHarvest | NewEvaluation | NewStudy | NewComparison | NewImport | NewDashboards
NewJob = Annotated[AnyNewJob, Field(discriminator="kind")]
EXAMPLE = {"kind": "harvest", "config": {"saes": ["smollm2-l17"], "corpus": "demo-text"}}


class JobsQuery(BaseModel):
    """Which jobs are listed."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    status: Status | None = None
    """Only those of this status."""
    kind: Literal["train", "sweep", "harvest", "evaluate", "study", "compare", "import", "shard"] | None = None
    """Only those of this kind; a `shard` is a part of a harvest that many workers do, and listed only when it is asked for."""
    after: str | None = Field(None, max_length=LONGEST_NAME)
    """Id of the job with which the page before this one ended."""
    limit: int = Field(100, ge=1, le=500)
    """Jobs on a page."""


@dataclass(frozen=True)
class JobsList:
    """Jobs, newest first, and the workers there are to do them."""

    jobs: tuple[JobRecord, ...]
    """Newest first."""
    workers: tuple[WorkerRecord, ...]
    """Those heard from in the last minute."""
    next: str | None
    """`after` of the next page; null on the last."""


class Watch(BaseModel):
    """How long a job is watched."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    seconds: int = Field(LONGEST_WATCH, ge=1, le=LONGEST_WATCH)
    """After so many seconds the stream ends, also where the job goes on; ask again then."""


WRITES = replies(400, 403, 404, 413, 415)


@router.get("/jobs", response_model=JobsList, responses=replies(404), summary="Every job")
def list_jobs(query: Annotated[JobsQuery, Query()], read: BriefRead) -> Response:
    """Jobs, newest first."""
    found = store.newest(read, query.limit + 1, status=query.status, kind=query.kind, after=query.after)
    shown = tuple(found[: query.limit])
    more = shown[-1].id if len(found) > query.limit else None
    return respond(JobsList(shown, tuple(store.workers(read, seen_within=60)), more))


@router.post(
    "/jobs",
    status_code=201,
    response_model=JobRecord,
    responses=replies(400, 403, 404, 413, 415),
    summary="Start a job",
    openapi_extra={"requestBody": {"content": {"application/json": {"example": EXAMPLE}}}},
)
def create_job(request: Request, body: NewJob) -> Response:
    """Queue a job: `config` is checked by the same models as the forms and the command line, so a refusal names its field.
    Harvests, studies, comparisons and imports of dashboards have ids that follow from what they do: asked twice, they run once.
    The header `Location` is the job's address."""
    with queue(request, body.how) as jobs:
        job = jobs.get(_enqueue(jobs, body))
    return respond(job, status=201, headers={"Location": f"{PREFIX}/jobs/{job.id}"})


def _enqueue(jobs: Jobs, body: AnyNewJob) -> str:
    match body:
        case NewTraining():
            return jobs.enqueue_train(body.config, name=body.name)
        case NewSweep():
            return jobs.enqueue_sweep(body.config, name=body.name)
        case NewHarvest():
            return jobs.enqueue_harvest(body.config)
        case NewEvaluation():
            return jobs.enqueue_evaluate(body.config)
        case NewStudy():
            return jobs.enqueue_study(body.config)
        case NewComparison():
            return jobs.enqueue_compare(body.config)
        case NewImport():
            return jobs.enqueue_import(_placed(body.config, hub=True), name=body.name)
        case NewDashboards():
            return jobs.enqueue_dashboards(_placed(body.config, hub=False))


Placed = TypeVar("Placed", ImportJob, DashboardsJob)


def _placed(config: Placed, *, hub: bool) -> Placed:
    """The same, once it is sure that its location means one place, whatever folder a worker was started in."""
    location = config.location
    named = hub and "/" in location and not location.startswith((".", "~"))
    if not location.isprintable() or not (location.startswith("/") or named):
        wanted = "a path of the worker's machine, from its root on" + (", or <owner>/<repository>/<folder> on the hub" * hub)
        raise UsageError(f"'{location[:60]}' is no place to import from: give {wanted}.", field="location")
    return config


@router.get("/jobs/{job}", response_model=JobPage, responses=replies(404), summary="One job")
def read_job(job: JobId, read: BriefRead) -> Response:
    """How far it is, its curves, its log, and what it made."""
    return respond(look(read, job))


@router.post("/jobs/{job}/cancel", response_model=JobRecord, responses=WRITES, summary="Cancel a job")
def cancel_job(request: Request, job: JobId) -> Response:
    """Ask its worker to stop, which it does at its next batch; a job that has ended stays as it is."""
    with queue(request) as jobs:
        return respond(jobs.cancel(job))


@router.post("/jobs/{job}/retry", response_model=JobRecord, responses=WRITES, summary="Run a job again")
def retry_job(request: Request, job: JobId) -> Response:
    """Run a failed or cancelled job again, from what it left on disk."""
    with queue(request) as jobs:
        return respond(jobs.retry(job))


def watched(request: Request, job: JobId) -> str:
    """The id, once it is sure that there is such a job: an event stream cannot answer 404."""
    with reading(request) as session:
        return store.get(session, job).id


@router.get(
    "/jobs/{job}/events",
    response_class=EventSourceResponse,
    responses={200: {"description": "Events `job` with the job as JSON, then one event `end`."}, **replies(404)},
    summary="Watch a job",
)
async def watch_job(
    request: Request, job: Annotated[str, Depends(watched)], query: Annotated[Watch, Query()]
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: `job` with the job as `GET /jobs/{job}` has it under `job`, at once and whenever it changes; `end`
    when it has ended, or when the seconds are over. Data of `end` is the status then."""
    last, until = "", anyio.current_time() + query.seconds
    while True:
        record = await run_sync(_look, request, job)
        said = to_json(record).decode()
        if said != last:
            last = said
            yield ServerSentEvent(event="job", raw_data=said)
        if record.ended or anyio.current_time() >= until:
            yield ServerSentEvent(event="end", raw_data=record.status)
            return
        await anyio.sleep(SECONDS_BETWEEN_LOOKS)


def _look(request: Request, job: str) -> JobRecord:
    with reading(request) as session:
        return store.get(session, job)
