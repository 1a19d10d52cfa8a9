"""A job in the terminal: a progress bar where there is a terminal, a line now and then where there is none. No torch."""

import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from server.db import Database
from server.store import jobs as store
from server.store.jobs import JobRecord

LINE_SECONDS = 30.0


def watch(
    db: Database, job_id: str, console: Console, stop: threading.Event, *, look: Callable[[], None] = lambda: None
) -> list[JobRecord]:
    """Show a job and those that follow from it until they have ended, or `stop`; the jobs as they are then.

    `look` is called between two looks at the database.
    """
    show = _bar if console.is_terminal else _lines
    return show(db, job_id, console, stop, look)


def family(db: Database, job_id: str) -> list[JobRecord]:
    """The job and those that follow from it."""
    with db.read() as session:
        return [store.get(session, job_id), *store.children(session, job_id)]


def current(jobs: list[JobRecord]) -> JobRecord | None:
    """The one to look at: the one that runs, else the next in the queue."""
    return next((job for job in jobs if job.status == store.RUNNING), next((job for job in jobs if not job.ended), None))


def duration(seconds: float | None) -> str:
    """`1 h 05 min`, `3 min 20 s`, `12 s`; empty while unknown."""
    if seconds is None:
        return ""
    whole = int(seconds + 0.5)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def describe(job: JobRecord, values: dict[str, float]) -> str:
    """What the job does now, in a few words."""
    if job.status == store.QUEUED:
        return "queued"
    parts = [f"{job.rate:,.0f} {job.unit}/s"] if job.rate else []
    parts += [f"{name} {values[name]:.3g}" for name in ("fvu", "l0", "dead") if name in values and job.phase == "train"]
    if job.seconds_left is not None:
        parts.append(f"{duration(job.seconds_left)} left")
    return ", ".join(parts)


def _newest_values(db: Database, job: JobRecord) -> dict[str, float]:
    if job.phase != "train":
        return {}
    with db.read() as session:
        return store.last_point(session, job.id)


def _bar(db: Database, job_id: str, console: Console, stop: threading.Event, look: Callable[[], None]) -> list[JobRecord]:
    columns = (TextColumn("{task.description:<30}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, console=console, transient=False) as bar:
        task, shown = None, None
        while True:
            found = family(db, job_id)
            job = current(found)
            if job is None or stop.is_set():
                if task is not None:
                    bar.update(task, completed=1.0 if job is None else None, said="")
                return found
            if (job.id, job.phase) != shown:
                if task is not None:
                    bar.update(task, completed=1.0, said="")
                task, shown = bar.add_task(f"{job.kind}: {job.phase or 'waiting'}", total=1.0, said=""), (job.id, job.phase)
            assert task is not None
            bar.update(task, completed=job.share, said=describe(job, _newest_values(db, job)))
            look()
            stop.wait(0.5)


def _lines(db: Database, job_id: str, console: Console, stop: threading.Event, look: Callable[[], None]) -> list[JobRecord]:
    shown, at = None, 0.0
    while True:
        found = family(db, job_id)
        job = current(found)
        if job is None or stop.is_set():
            return found
        if (job.id, job.phase) != shown or time.monotonic() - at > LINE_SECONDS:
            shown, at = (job.id, job.phase), time.monotonic()
            said = describe(job, _newest_values(db, job))
            line = f"{job.kind}: {job.phase or 'waiting'} {job.share:.0%}{f', {said}' if said else ''}"
            console.print(line, highlight=False, soft_wrap=True)
        look()
        stop.wait(0.5)
