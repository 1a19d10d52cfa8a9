"""A job that a command has queued: worked on in this process, or watched while a worker has it."""

import signal
import threading
from typing import TYPE_CHECKING

import typer

from sae_core.errors import HeadscopeError
from server import doctor as doctors
from server import terminal
from server.commands.printing import console, say, table
from server.db import Database
from server.jobs import Jobs
from server.settings import Settings
from server.store import sweeps

if TYPE_CHECKING:
    from sae_core.lens import Lens


def look_for_worker(queue: Jobs) -> bool:
    """Whether a worker runs; where none does, this process has to be able to work, which is seen before anything is queued."""
    alive = queue.worker_alive()
    if not alive:
        doctors.need_worker_extra()
    return alive


def carry_out(settings: Settings, db: Database, job_id: str, *, alive: bool, watch: bool) -> bool:
    """Work on a queued job here, where no worker is `alive`; else show what the worker makes of it, if `watch`. Whether it has
    ended."""
    say(f"Queued {job_id}.")
    if not alive:
        work_here(settings, db, job_id)
    elif watch:
        watch_worker(db, job_id)
    return watch or not alive


def work_here(settings: Settings, db: Database, job_id: str, warm: "tuple[str, Lens] | None" = None) -> None:
    """Work on the job in this process until it has ended, or Ctrl-C, which is exit code 130; `warm` is a model that is loaded
    already, and its name."""
    from server.worker import Worker

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    here = Worker(settings, db)
    if warm:
        here.keep(*warm)
    here.start()
    try:
        terminal.watch(db, job_id, console(), stop)
    finally:
        here.close()
    if stop.is_set():
        say(f"Stopped. `headscope worker` goes on with {job_id} where it is.")
        raise typer.Exit(130)
    _end(db, job_id)


def watch_worker(db: Database, job_id: str) -> None:
    """Show what a worker makes of the job, until it has ended or Ctrl-C is pressed."""
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    terminal.watch(db, job_id, console(), stop)
    _end(db, job_id)


def _end(db: Database, job_id: str) -> None:
    """Say how it ended; a failure is an error of this command."""
    for job in terminal.family(db, job_id):
        if job.status == "failed":
            raise HeadscopeError(f"{job.id} failed: {job.error}")
        if not job.ended:
            say(f"{job.id} goes on without us.")
            return
        say(f"{job.id} is {job.status}.")
        if job.kind == "sweep":
            _compare(db, job.id)
    say("See it with `headscope up`.")


def _compare(db: Database, job_id: str) -> None:
    """A sweep's table."""
    with db.read() as session:
        record = sweeps.sweep(session, job_id)

    def kept(run: sweeps.SweepRun, against: str) -> str:
        found = run.kept.get(f"prose ce {against}")
        if found is None or found.value is None:
            return "withheld" if found else ""
        return f"{found.value:.1%}" + ("" if found.low is None else f" ({found.low:.0%} to {found.high:.0%})")

    def figure(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = [
        (
            run.label or run.sae,
            figure(run.l0, ".1f"),
            figure(run.fvu, ".1%"),
            kept(run, "zero"),
            kept(run, "mean"),
            figure(run.dead, ".1%"),
            figure(run.gamma, ".3f"),
            figure(run.rate, ",.0f"),
        )
        for run in record.runs
    ]
    heads = ("SAE", "L0", "unexplained", "CE kept of z = 0", "of z = mean", "dead", "gamma", "tokens/s")
    table(heads, rows, "")
