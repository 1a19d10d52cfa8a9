"""Jobs, their attempts and their workers. Whatever a worker writes is checked against its attempt in the same transaction."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.errors import Cancelled, Fenced, JobError, UnknownJob
from sae_core.progress import Progress
from server.store.viewers import check_own, everything, own, viewer_of
from server.tables import SAE, FormerName, Job, JobLog, JobPoint, JobSae, Worker, now

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
OPEN = (QUEUED, RUNNING)
ENDED = (DONE, FAILED, CANCELLED)


@dataclass(frozen=True)
class JobRecord:
    """A job as people see it."""

    id: str
    kind: str
    """What it does: train, sweep, harvest, evaluate, study, compare, import."""
    title: str
    """The same in words."""
    config: dict[str, Any]
    parent_id: str | None
    """Id of the job that asked for it; null where a person did."""
    status: str
    attempt: int
    """Raised whenever a worker takes it up, and when it is queued again; writes of earlier ones are refused."""
    worker: str | None
    """The worker that has it, or had it last."""
    phase: str | None
    done: int
    """How much of the phase is done, in `unit`."""
    total: int
    """How much the phase is in all, in `unit`; 0 while that is not known."""
    unit: str
    """What `done` and `total` count."""
    rate: float
    """Units a second, lately."""
    seconds_left: float | None
    """Estimate of what the phase still takes; null while there is none."""
    error: str | None
    """Why it failed, in a sentence."""
    created_at: datetime
    started_at: datetime | None
    """When it was first begun, in UTC."""
    updated_at: datetime | None
    """When it last told how far it is, in UTC."""
    finished_at: datetime | None
    """When it ended, in UTC."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in ENDED

    @property
    def share(self) -> float:
        """How much of the present phase is done, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 0.0


@dataclass(frozen=True)
class LogLine:
    """A line that a job said."""

    id: int
    """Rises from line to line."""
    at: datetime
    """When it was said, in UTC."""
    text: str


@dataclass(frozen=True)
class WorkerRecord:
    """A worker's slot and when it was last heard."""

    id: str
    """Its slot."""
    device: str
    """Where it computes."""
    pid: int
    """Number of its process."""
    last_seen: datetime
    """When it was last heard, in UTC."""


# ---- what people ask for ----


def create(
    session: Session,
    job_id: str,
    kind: str,
    title: str,
    config: dict[str, Any],
    *,
    parent_id: str | None = None,
    seconds_left: float | None = None,
) -> bool:
    """Put a job in the book as queued; False, and no change, when one of that id is there. It belongs to whoever asks, or, where
    it follows from another, to whom that one belongs."""
    if session.scalar(everything(sa.select(Job.id).where(Job.id == job_id))) is not None:
        return False
    job = Job(id=job_id, kind=kind, title=title, config=config, parent_id=parent_id, status=QUEUED, seconds_left=seconds_left)
    parent = session.get(Job, parent_id) if parent_id else None
    if parent is None:
        own(session, job)
    else:
        job.owner_id, job.visibility = parent.owner_id, parent.visibility
    session.add(job)
    session.flush()
    session.add_all(JobSae(job_id=job_id, sae_id=sae_id) for sae_id in _read_by(session, config))
    session.flush()
    return True


def _read_by(session: Session, config: dict[str, Any]) -> set[int]:
    """Ids of the SAEs that a job reads."""
    against = config.get("against") or ()
    names = {*saes_of(config), *((against,) if isinstance(against, str) else against)}
    now_called = session.scalars(sa.select(SAE.id).where(SAE.name.in_(names)))
    return {*now_called, *session.scalars(sa.select(FormerName.sae_id).where(FormerName.name.in_(names)))} if names else set()


def cancel(session: Session, job_id: str) -> bool:
    """Cancel a job that is queued or running; False when it has ended already."""
    job = _locked(session, job_id)
    _check_may_change(session, job)
    if job.status in ENDED:
        return False
    job.status, job.finished_at, job.seconds_left, job.rate = CANCELLED, now(), None, 0.0
    _say(session, job_id, "Cancelled.")
    return True


def requeue(session: Session, job_id: str, *, even_done: bool = False) -> None:
    """Queue a failed or cancelled job again, or one that is done when what it made is gone; what it has on disk is used."""
    job = _locked(session, job_id)
    _check_may_change(session, job)
    if job.status not in (FAILED, CANCELLED) and not (even_done and job.status == DONE):
        raise JobError(f"Job {job_id} is {job.status}; only a failed or cancelled job can be run again.")
    job.status, job.error, job.phase, job.finished_at, job.done, job.total = QUEUED, None, None, None, 0, 0
    job.attempt += 1  # whoever still works on an earlier attempt is shut out from now on
    _say(session, job_id, "Queued again.")


def give_back(session: Session, job_id: str, why: str) -> None:
    """Queue a job that is open from its beginning: no worker that had it may write any more."""
    job = _locked(session, job_id)
    if job.status not in OPEN:
        return
    if job.status == RUNNING:
        job.attempt += 1
        job.status, job.phase, job.done, job.total, job.rate = QUEUED, None, 0, 0, 0.0
        _say(session, job_id, f"Queued again: {why}")


def _check_may_change(session: Session, job: Job) -> None:
    if job.owner_id is not None or not viewer_of(session).may("editor"):
        check_own(session, job, "cancel this job or run it again")


def get(session: Session, job_id: str) -> JobRecord:
    """The job; `UnknownJob` without one."""
    job = session.get(Job, job_id)
    if job is None:
        raise UnknownJob(f"There is no job {job_id}.")
    return _record(job)


def find(session: Session, job_id: str) -> JobRecord | None:
    """The job, or None."""
    job = session.get(Job, job_id)
    return _record(job) if job else None


def newest(
    session: Session, limit: int = 100, *, status: str | None = None, kind: str | None = None, after: str | None = None
) -> list[JobRecord]:
    """Jobs, newest first, from the one after the job `after`; of one status or kind."""
    listed = sa.select(Job).order_by(Job.created_at.desc(), Job.id.desc()).limit(limit)
    if status is not None:
        listed = listed.where(Job.status == status)
    if kind is not None:
        listed = listed.where(Job.kind == kind)
    if after is not None:
        last = get(session, after)
        listed = listed.where(sa.tuple_(Job.created_at, Job.id) < sa.tuple_(sa.literal(last.created_at), sa.literal(last.id)))
    return [_record(job) for job in session.scalars(listed)]


def of_status(session: Session, statuses: Sequence[str]) -> list[JobRecord]:
    """Jobs in one of the statuses, oldest first."""
    return [_record(job) for job in session.scalars(_in_status(statuses))]


def all_open(session: Session) -> list[JobRecord]:
    """Every job that is queued or running, oldest first, seen or not: the queue is one for all."""
    return [_record(job) for job in session.scalars(everything(_in_status(OPEN)))]


def _in_status(statuses: Sequence[str]) -> sa.Select[Job]:
    return sa.select(Job).where(Job.status.in_(statuses)).order_by(*_AGE)


def ended_for_now(session: Session, job_id: str) -> bool:
    """Whether the job has ended, and will not be run again before this transaction does: its row is locked."""
    job = session.get(Job, job_id, with_for_update=True, populate_existing=True)
    return job is not None and job.status in ENDED


def children(session: Session, job_id: str) -> list[JobRecord]:
    """The jobs that follow from this one, in the order they run."""
    return [_record(job) for job in session.scalars(sa.select(Job).where(Job.parent_id == job_id).order_by(*_AGE))]


def ids_like(session: Session, prefix: str) -> set[str]:
    """Ids of the jobs whose id begins with `prefix`, seen or not."""
    return set(session.scalars(everything(sa.select(Job.id).where(Job.id.startswith(prefix, autoescape=True)))))


def n_ended(session: Session, prefix: str) -> int:
    """How many jobs whose id begins with `prefix` have ended, seen or not."""
    mine = sa.select(sa.func.count(Job.id)).where(Job.id.startswith(prefix, autoescape=True), Job.status.in_(ENDED))
    return session.scalars(everything(mine)).one()


def ready(session: Session) -> list[JobRecord]:
    """Queued jobs that may start: no older job of the same parent with one of its SAEs is open, since harvests replace each
    other in order."""
    free, taken = [], set[tuple[str, str]]()
    for job in all_open(session):
        line = {(job.parent_id, sae) for sae in (saes_of(job.config) or ("",))} if job.parent_id else set()
        if job.status == QUEUED and line.isdisjoint(taken):
            free.append(job)
        taken |= line
    return free


def points(session: Session, job_id: str, *, run: int = 0, after: int = -1) -> list[tuple[int, dict[str, float]]]:
    """The curves of the job's training run `run`: (step, values by name), from the step after `after`."""
    mine = (JobPoint.job_id == job_id, JobPoint.run == run, JobPoint.step > after)
    return [(point.step, point.values) for point in session.scalars(sa.select(JobPoint).where(*mine).order_by(JobPoint.step))]


def last_point(session: Session, job_id: str) -> dict[str, float]:
    """The newest values of the job's curves, of the run that is furthest; empty without any."""
    newest = sa.select(JobPoint.values).where(JobPoint.job_id == job_id).order_by(JobPoint.step.desc(), JobPoint.run.desc())
    return session.scalar(newest.limit(1)) or {}


def log_lines(session: Session, job_id: str, *, after: int = 0, limit: int = 500) -> list[LogLine]:
    """What the job said, oldest first, from the line after id `after`."""
    query = sa.select(JobLog).where(JobLog.job_id == job_id, JobLog.id > after).order_by(JobLog.id).limit(limit)
    return [LogLine(line.id, line.at, line.text) for line in session.scalars(query)]


# ---- what a worker writes ----


def start_attempt(session: Session, job_id: str, worker: str) -> int:
    """Take the job up: every attempt before this one is shut out. `Cancelled` when there is nothing to do any more."""
    job = _locked(session, job_id)
    if job.status in ENDED:
        raise Cancelled(f"Job {job_id} is {job.status}.")
    resumed = job.status == RUNNING
    job.attempt += 1
    job.status, job.worker, job.updated_at, job.rate = RUNNING, worker, now(), 0.0
    job.started_at = job.started_at or now()
    if resumed:
        _say(session, job_id, f"Taken up again by {worker}.")
    return job.attempt


def check(session: Session, job_id: str, attempt: int) -> Job:
    """The job, locked for this transaction; `Fenced` when another attempt owns it, `Cancelled` when a person ended it.

    On SQLite the transaction itself is the lock (BEGIN IMMEDIATE), on PostgreSQL the row is.
    """
    job = _locked(session, job_id)
    if job.attempt != attempt:
        raise Fenced(f"Job {job_id} is at attempt {job.attempt}; what attempt {attempt} still does must not count.")
    if job.status == CANCELLED:
        raise Cancelled(f"Job {job_id} was cancelled.")
    if job.status != RUNNING:
        raise Fenced(f"Job {job_id} is {job.status} already.")
    return job


def still_ours(session: Session, job_id: str, attempt: int) -> None:
    """`check` without a lock, cheap enough for every batch."""
    row = session.execute(sa.select(Job.attempt, Job.status).where(Job.id == job_id)).one_or_none()
    if row is None or row.attempt != attempt:
        raise Fenced(f"Job {job_id} has been taken over.")
    if row.status == CANCELLED:
        raise Cancelled(f"Job {job_id} was cancelled.")


def report(session: Session, job_id: str, attempt: int, progress: Progress, seconds_left: float | None) -> None:
    """Store how far the job is."""
    job = check(session, job_id, attempt)
    job.phase, job.done, job.total, job.unit = progress.phase, progress.done, progress.total, progress.unit
    job.rate, job.seconds_left, job.updated_at = progress.rate, seconds_left, now()


def add_points(session: Session, job_id: str, attempt: int, new: Sequence[tuple[int, dict[str, float]]], *, run: int = 0) -> None:
    """Store points of a run's curves. A resumed run says some steps again, with the same values: they replace the old ones."""
    check(session, job_id, attempt)
    steps = [step for step, _ in new]
    session.execute(sa.delete(JobPoint).where(JobPoint.job_id == job_id, JobPoint.run == run, JobPoint.step.in_(steps)))
    session.add_all(JobPoint(job_id=job_id, run=run, step=step, values=values) for step, values in dict(new).items())


def say(session: Session, job_id: str, attempt: int, text: str) -> None:
    """Add a line to the job's log."""
    check(session, job_id, attempt)
    _say(session, job_id, text)


def finish(session: Session, job_id: str, attempt: int) -> None:
    """The job is done."""
    job = check(session, job_id, attempt)
    _end(job, DONE)
    job.done = job.total


def fail(session: Session, job_id: str, attempt: int, error: str) -> None:
    """The job ends with a sentence that says what was wrong."""
    job = check(session, job_id, attempt)
    _end(job, FAILED)
    job.error = error
    _say(session, job_id, f"Failed: {error}")


# ---- workers ----


def beat(session: Session, worker: str, device: str, pid: int) -> None:
    """Say that the worker is alive."""
    row = session.get(Worker, worker)
    if row is None:
        session.add(Worker(id=worker, device=device, pid=pid, last_seen=now()))
    else:
        row.device, row.pid, row.last_seen = device, pid, now()


def leave(session: Session, worker: str) -> None:
    """The worker has ended properly."""
    session.execute(sa.delete(Worker).where(Worker.id == worker))


def workers(session: Session, *, seen_within: float | None = None) -> list[WorkerRecord]:
    """Workers, or those seen in the last `seen_within` seconds."""
    query = sa.select(Worker).order_by(Worker.id)
    if seen_within is not None:
        query = query.where(Worker.last_seen >= now() - timedelta(seconds=seen_within))
    return [WorkerRecord(row.id, row.device, row.pid, row.last_seen) for row in session.scalars(query)]


def silent_workers(session: Session, seconds: float) -> list[str]:
    """Slots that have not been heard for `seconds`."""
    return list(session.scalars(sa.select(Worker.id).where(Worker.last_seen < now() - timedelta(seconds=seconds))))


_AGE = (Job.created_at, Job.id)


def saes_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of the SAEs that a job measures or sweeps, as its config says."""
    return tuple(config.get("saes") or ((config["sae"],) if "sae" in config else ()))


def _locked(session: Session, job_id: str) -> Job:
    job = session.get(Job, job_id, with_for_update=True, populate_existing=True)
    if job is None:
        raise UnknownJob(f"There is no job {job_id}.")
    return job


def _end(job: Job, status: str) -> None:
    job.status, job.finished_at, job.updated_at, job.seconds_left, job.rate = status, now(), now(), None, 0.0


def _say(session: Session, job_id: str, text: str) -> None:
    session.add(JobLog(job_id=job_id, text=text))


def _record(job: Job) -> JobRecord:
    return JobRecord(**{name: getattr(job, name) for name in JobRecord.__dataclass_fields__})
