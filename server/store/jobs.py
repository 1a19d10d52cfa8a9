"""Jobs, their attempts and their workers. Whatever a worker writes is checked against its attempt in the same transaction."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.config import AS_USUAL, DeviceKind, Wishes
from sae_core.errors import Cancelled, Fenced, JobError, UnknownJob
from sae_core.progress import Progress
from server.store.viewers import check_own, everything, own, viewer_of
from server.tables import SAE, FormerName, Job, JobLog, JobPoint, JobSae, Worker, now

FIRST, LAST = 1, 9
PRIORITY = {"shard": 1, "compare": 3, "evaluate": 3, "study": 3, "harvest": 3, "import": 3, "train": 5, "sweep": 7}
"""By kind: what a person waits for comes before new work, and between any two there is room for what is more urgent."""
PARTS = "shard"
"""The kind of the jobs that a harvest over many workers is cut into."""
LONGEST_WAIT = 600.0
"""Seconds that a job waits at most before it is tried again by itself."""

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
OPEN = (QUEUED, RUNNING)
ENDED = (DONE, FAILED, CANCELLED)


@dataclass(frozen=True)
class JobRecord:
    """A job as people see it."""

    id: str
    kind: str
    """What it does: train, sweep, harvest, evaluate, study, compare, import; shard, which is a part of a harvest."""
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
    priority: int = 5
    """From 1, which starts first, to 9."""
    only_on: str | None = None
    """The only kind of device that may do it: cpu, cuda or mps; null for any."""
    time_limit: float | None = None
    """Seconds that it may work, all attempts together; null for as long as it takes."""
    worked: float = 0.0
    """Seconds that it has worked."""
    tries: int = 0
    """Times that it was queued again by itself, after a failure that may pass."""
    not_before: datetime | None = None
    """When it is tried again, in UTC."""

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
    beats: int = 0
    """Heartbeats so far: a count, so that no clock matters."""


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
    wishes: Wishes = AS_USUAL,
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
        job.owner_id, job.visibility, job.only_on = parent.owner_id, parent.visibility, parent.only_on
    job.priority = PRIORITY[kind] if wishes.priority is None else wishes.priority
    job.only_on, job.time_limit = wishes.only_on or job.only_on, wishes.time_limit or None
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
    for part in (job, *session.scalars(_open_parts(job_id))):
        part.status, part.finished_at, part.seconds_left, part.rate = CANCELLED, now(), None, 0.0
        _say(session, part.id, "Cancelled.")
    return True


def requeue(session: Session, job_id: str, *, even_done: bool = False) -> None:
    """Queue a failed or cancelled job again, or one that is done when what it made is gone; what it has on disk is used."""
    job = _locked(session, job_id)
    _check_may_change(session, job)
    if job.status not in (FAILED, CANCELLED) and not (even_done and job.status == DONE):
        raise JobError(f"Job {job_id} is {job.status}; only a failed or cancelled job can be run again.", field="job")
    job.status, job.error, job.phase, job.finished_at, job.done, job.total = QUEUED, None, None, None, 0, 0
    job.attempt += 1  # whoever still works on an earlier attempt is shut out from now on
    job.tries, job.worked, job.not_before = 0, 0.0, None
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
        raise UnknownJob(f"There is no job {job_id}.", field="job")
    return _record(job)


def find(session: Session, job_id: str) -> JobRecord | None:
    """The job, or None."""
    job = session.get(Job, job_id)
    return _record(job) if job else None


def newest(
    session: Session, limit: int = 100, *, status: str | None = None, kind: str | None = None, after: str | None = None
) -> list[JobRecord]:
    """Jobs, newest first, from the one after the job `after`; of one status or kind, without parts of others unless asked for."""
    listed = sa.select(Job).order_by(Job.created_at.desc(), Job.id.desc()).limit(limit)
    if status is not None:
        listed = listed.where(Job.status == status)
    listed = listed.where(Job.kind == kind) if kind is not None else listed.where(Job.kind != PARTS)
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
    other in order; and none waits to be tried again. Should the clock jump back, none waits longer than it may."""
    free, taken, at = [], set[tuple[str, str]](), clock(session)
    for job in all_open(session):
        in_order = job.parent_id is not None and job.kind != PARTS
        line = {(job.parent_id or "", sae) for sae in (saes_of(job.config) or ("",))} if in_order else set()
        waits = job.not_before is not None and at < job.not_before <= at + timedelta(seconds=LONGEST_WAIT)
        if job.status == QUEUED and not waits and line.isdisjoint(taken):
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


def clock(session: Session) -> datetime:
    """The time by the one clock that all processes share: PostgreSQL's, or, with SQLite, this machine's."""
    if session.get_bind().dialect.name != "postgresql":
        return now()
    at: datetime = session.scalars(sa.select(sa.func.clock_timestamp(type_=sa.DateTime(timezone=True)))).one()
    return at.astimezone(UTC)


def _open_parts(job_id: str) -> sa.Select[Job]:
    return everything(sa.select(Job).where(Job.parent_id == job_id, Job.kind == PARTS, Job.status.in_(OPEN)).order_by(*_AGE))


def at_work(session: Session) -> set[str]:
    """Workers that have a running job."""
    return set(session.scalars(everything(sa.select(Job.worker).where(Job.status == RUNNING, Job.worker.is_not(None)))))


# ---- what a worker writes ----


def start_attempt(session: Session, job_id: str, worker: str) -> int:
    """Take the job up: every attempt before this one is shut out. `Cancelled` when there is nothing to do any more, or, of a
    part, when a worker that lives is doing it: whoever has the whole took it out of the queue."""
    job = _locked(session, job_id)
    if job.status in ENDED or (job.kind == PARTS and not _free(session, job, worker)):
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
    if row.status != RUNNING:
        raise Fenced(f"Job {job_id} is {row.status} already.")


def tick(session: Session, job_id: str, attempt: int, seconds: float) -> None:
    """Count time that the job was worked at."""
    job = check(session, job_id, attempt)
    job.worked += seconds


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
    for part in session.scalars(_open_parts(job_id)):
        _end(part, CANCELLED)
    _say(session, job_id, f"Failed: {error}")


def try_again(session: Session, job_id: str, attempt: int, error: str, wait: float) -> None:
    """Queue the job again by itself, `wait` seconds from now: what was wrong may pass."""
    job = check(session, job_id, attempt)
    job.status, job.rate, job.seconds_left, job.updated_at = QUEUED, 0.0, None, now()
    job.attempt += 1
    job.tries, job.not_before = job.tries + 1, clock(session) + timedelta(seconds=min(wait, LONGEST_WAIT))
    _say(session, job_id, f"{error} It is tried again in {wait:.0f} s.")


# ---- parts of a job, which any worker may do ----


def add_parts(
    session: Session, job_id: str, attempt: int, phase: str, configs: Sequence[dict[str, Any]], kind: DeviceKind
) -> None:
    """Queue parts of a phase of a job, to be done on one kind of device; those that are there already stay."""
    job = check(session, job_id, attempt)
    for part in parts(session, job_id, phase):
        if part.status in (FAILED, CANCELLED):  # the whole was cancelled or failed, and is done again
            again = session.get_one(Job, part.id)
            again.status, again.attempt, again.error, again.finished_at = QUEUED, part.attempt + 1, None, None
    for number, config in enumerate(configs):
        title = f"{job.title}: {phase}, part {number + 1} of {len(configs)}"
        create(
            session, f"{job_id[:80]}-{phase}-{number}", PARTS, title[:300], config, parent_id=job_id,
            wishes=Wishes(only_on=kind),
        )  # fmt: skip


def parts(session: Session, job_id: str, phase: str) -> list[JobRecord]:
    """The parts of a phase, in order."""
    found = session.scalars(everything(sa.select(Job).where(Job.parent_id == job_id, Job.kind == PARTS)))
    return sorted((_record(job) for job in found if job.config["phase"] == phase), key=lambda job: job.config["number"])


def take_part(session: Session, job_id: str, phase: str, worker: str) -> tuple[JobRecord, int] | None:
    """Take up the first part of a phase that nobody works at, and its attempt; None where there is none. `worker` has the whole,
    so whatever part it seems to have as well is left over from before."""
    for part in parts(session, job_id, phase):
        if part.ended:
            continue
        row = _locked(session, part.id)  # another worker may take it, or end it, between the two looks
        if row.status not in ENDED and _free(session, row, worker):
            number = start_attempt(session, part.id, worker)
            return get(session, part.id), number
    return None


def _free(session: Session, part: Job, worker: str) -> bool:
    return part.status == QUEUED or part.worker == worker or session.get(Worker, part.worker or "") is None


# ---- workers ----


def beat(session: Session, worker: str, device: str, pid: int) -> None:
    """Say that the worker is alive."""
    row = session.get(Worker, worker)
    if row is None:
        session.add(Worker(id=worker, device=device, pid=pid, last_seen=clock(session), beats=1))
    else:
        row.device, row.pid, row.last_seen, row.beats = device, pid, clock(session), row.beats + 1


def leave(session: Session, worker: str) -> None:
    """The worker has ended properly."""
    session.execute(sa.delete(Worker).where(Worker.id == worker))


def take_from(session: Session, worker: str) -> int:
    """Put what a silent worker works at back into the queue, which shuts it out, and forget it; how many jobs it had."""
    had = session.scalars(
        everything(sa.select(Job).where(Job.worker == worker, Job.status == RUNNING).order_by(Job.id).with_for_update())
    ).all()
    for job in had:
        job.status, job.rate = QUEUED, 0.0
        _say(session, job.id, f"{worker} is gone; another worker takes it up.")
    leave(session, worker)
    return len(had)


def workers(session: Session, *, seen_within: float | None = None) -> list[WorkerRecord]:
    """Workers, or those seen in the last `seen_within` seconds."""
    query = sa.select(Worker).order_by(Worker.id)
    if seen_within is not None:
        query = query.where(Worker.last_seen >= clock(session) - timedelta(seconds=seen_within))
    return [WorkerRecord(row.id, row.device, row.pid, row.last_seen, row.beats) for row in session.scalars(query)]


class Listener:
    """Which workers are silent, as one that listens to their heartbeats knows it by its own monotonic clock: no clock that is
    set makes a worker seem dead or alive. Only time in which beats could be heard counts: after a pause of ours, of the whole
    machine or of the database, nobody is thought dead for it."""

    def __init__(self, silent: float, beat: float, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._silent, self._most, self._monotonic = silent, 2 * beat, monotonic
        self._heard: dict[str, tuple[int, int, float]] = {}  # pid and beats as last seen, and how long they have been the same
        self._looked = monotonic()

    def look(self, session: Session) -> list[str]:
        """Slots that have been silent for too long."""
        found = workers(session)
        at = self._monotonic()
        passed, self._looked = min(at - self._looked, self._most), at
        heard: dict[str, tuple[int, int, float]] = {}
        for worker in found:
            *said, quiet = self._heard.get(worker.id, (0, 0, 0.0))
            same = said == [worker.pid, worker.beats]
            heard[worker.id] = (worker.pid, worker.beats, quiet + passed if same else 0.0)
        self._heard = heard
        return [name for name, (_, _, quiet) in heard.items() if quiet >= self._silent]


_AGE = (Job.created_at, Job.id)


def saes_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of the SAEs that a job measures or sweeps, as its config says."""
    return tuple(config.get("saes") or ((config["sae"],) if "sae" in config else ()))


def _locked(session: Session, job_id: str) -> Job:
    job = session.get(Job, job_id, with_for_update=True, populate_existing=True)
    if job is None:
        raise UnknownJob(f"There is no job {job_id}.", field="job")
    return job


def _end(job: Job, status: str) -> None:
    job.status, job.finished_at, job.updated_at, job.seconds_left, job.rate = status, now(), now(), None, 0.0


def _say(session: Session, job_id: str, text: str) -> None:
    session.add(JobLog(job_id=job_id, text=text))


def _record(job: Job) -> JobRecord:
    return JobRecord(**{name: getattr(job, name) for name in JobRecord.__dataclass_fields__})
