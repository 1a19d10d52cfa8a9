"""One attempt of a worker at one job: `Run`, which every kind of job is handed.

Steps run at least once, their effects appear once: every write checks in its own transaction that this attempt still owns
the job (`Fenced` otherwise), files are written aside and renamed, rows are found by job id.
"""

import ctypes
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import sqlalchemy as sa
from dbos import DBOS
from sqlalchemy.orm import Session

from sae_core.config import DeviceKind
from sae_core.errors import Cancelled, Fenced, TimeUp
from sae_core.lens import Lens
from sae_core.progress import Progress
from server import estimates
from server.db import Database
from server.estimates import Shape
from server.job_folders import take_folder
from server.jobs import Jobs
from server.keeping import room
from server.settings import Settings
from server.slots import Slot
from server.store import jobs as store
from server.store.jobs import JobRecord
from server.tracking import Tracker
from server.work.failures import Broken, Failed, Leave, may_pass, sentence

log = logging.getLogger("headscope.worker")
R = TypeVar("R")

LOOK_SECONDS = 1.0  # between two looks whether the job in hand may go on
PATIENCE = 1.5  # seconds that a step may take to notice that it may not, before it is broken off
WAIT, LONGER = 5.0, 4  # seconds before a job is first tried again by itself, and how much longer each time
REPORT_SECONDS = 2.0  # between two writes of progress
AGAIN_SECONDS = 10.0  # between two tries to write to a database that refuses
WATCH_SECONDS = 1.0  # between two looks at the room that is left on disk
SAID = {
    "prepare": "Cutting the corpus into rows of tokens.",
    "collect": "Reading attention outputs.",
    "train": "Training.",
    "evaluate": "Evaluating on held-out rows and on repeated random tokens.",
    "scan": "Sweeping the corpus for firings.",
    "synthetic": "Reading random tokens with a prefix copied.",
    "random": "Reading random tokens said twice.",
    "weights": "Asking the weights of each head what it writes.",
    "text": "Looking for induction in real text.",
    "cut": "Cutting repeated prefixes down to one token.",
    "match": "Matching decoder directions.",
    "read": "Reading the files into the database.",
    "convert": "Reading the files and fitting them to the model.",
    "choose": "Choosing examples.",
    "visit": "Visiting the chosen rows with attention patterns.",
    "features": "Describing the features.",
    "write": "Writing to the database.",
}


class Process(Protocol):
    """What a run asks of the process that it is in; `server.worker.Worker` is one."""

    settings: Settings
    db: Database
    jobs: Jobs
    slot: Slot
    stopping: threading.Event
    log_path: Path
    device: str
    speed: estimates.Speed

    @property
    def kind(self) -> DeviceKind: ...

    def lens(self, name: str) -> Lens: ...

    def model_shape(self, name: str) -> Shape | None: ...


class Run:
    """One attempt of this worker at one job: its fenced writes, its progress, its durable steps."""

    def __init__(self, worker: Process, job: JobRecord, attempt: int) -> None:
        self.worker, self.job, self.attempt, self.id = worker, job, attempt, job.id
        self.folder = take_folder(worker.settings.data, job.id, attempt)
        self.over: Exception | None = None  # why it may not go on
        self._worked, self._looked, self._over_since = job.worked, time.monotonic(), 0.0
        self._uncounted = 0.0
        self._thread: int | None = None  # where a step runs that may be broken off
        self._breaking = threading.Lock()
        self.clock = estimates.Clock({})
        kept, project = worker.settings.data / "logs", worker.settings.wandb
        self.tracker = Tracker(project, job.id, job.config, kept) if project and job.kind in ("train", "sweep") else None
        self._phase: str | None = None
        self._said: set[str] = set()
        self._stored = self._watched = 0.0
        self._points: dict[int, dict[int, dict[str, float]]] = {}  # by training run, by step

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that only commits while this attempt owns the job."""
        with self.worker.db.write() as session:
            store.check(session, self.id, self.attempt)
            yield session

    def fence(self, session: Session) -> None:
        """For writers of many transactions: raises in each that must not be."""
        if self.worker.stopping.is_set():
            raise Leave
        store.check(session, self.id, self.attempt)

    def say(self, text: str) -> None:
        """A line in the job's log."""
        log.info("%s: %s", self.id, text)
        with self.worker.db.write() as session:
            store.say(session, self.id, self.attempt, text)

    def check(self) -> None:
        """Between two batches: may we go on?"""
        if self.worker.stopping.is_set():
            raise Leave
        if self.over is not None:
            raise self.over
        if time.monotonic() - self._watched > WATCH_SECONDS:
            self._watched = time.monotonic()
            room.watch(self.worker.settings)
        with self.worker.db.read() as session:
            store.still_ours(session, self.id, self.attempt)

    def step(self, name: str, work: Callable[[], R]) -> R:
        """A durable step: once recorded as done, it is not run again. It runs at least once."""
        return DBOS.run_step({"name": name}, self._guarded, work)

    def _guarded(self, work: Callable[[], R]) -> R:
        try:
            self.check()
            with self._breakable():
                return work()
        except (Cancelled, Fenced) as error:
            raise Leave from error
        except Broken as error:
            if not isinstance(self.over, TimeUp):
                raise Leave from error
            self.fail(self.over)
            raise Failed(str(self.over)) from error
        except Exception as error:
            self.fail(error)
            raise Failed(str(error)) from error

    @contextmanager
    def _breakable(self) -> Iterator[None]:
        with self._breaking:
            self._thread = threading.get_ident()
        try:
            yield
        finally:
            with self._breaking:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), None)
                self._thread = None

    def look(self) -> None:
        """From another thread, again and again: count the time, and see that the step in hand ends where the job was cancelled or
        taken over, or has worked for too long. Most steps notice between two batches; what does not is broken off."""
        at = time.monotonic()
        passed, self._looked = min(at - self._looked, 5 * LOOK_SECONDS), at  # we may have been asleep
        self._worked, self._uncounted = self._worked + passed, self._uncounted + passed
        if self.over is None:
            self.over, self._over_since = self._why_over(), at
        elif at - self._over_since >= PATIENCE:
            with self._breaking:
                if self._thread is not None:
                    log.info("%s: breaking off a step that goes on", self.id)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(Broken))
                    self._over_since = math.inf  # once

    def _why_over(self) -> Exception | None:
        try:
            if self._uncounted >= self.worker.settings.beat_seconds:
                with self.worker.db.write() as session:
                    store.tick(session, self.id, self.attempt, self._uncounted)
                self._uncounted = 0.0
            else:
                with self.worker.db.read() as session:
                    store.still_ours(session, self.id, self.attempt)
        except (Cancelled, Fenced) as error:
            return error
        except (sa.exc.OperationalError, sa.exc.InterfaceError):
            return None  # a database that is away says nothing about the job
        limit = self.job.time_limit
        if limit is not None and self._worked > limit:
            return TimeUp(
                f"It has worked for {self._worked:,.0f} s, and its limit was {limit:,.0f} s. Run it again to go on from what it "
                "left on disk, or ask for more time."
            )
        return None

    def follow(self, work: Generator[Progress, None, R]) -> R:
        """Run a generator of `sae_core` to its end, storing what it says; its return value."""
        while True:
            try:
                self.check()
            except Fenced as error:
                with suppress(Fenced):
                    work.throw(error)  # not close(): the run on disk belongs to another worker now
                raise
            except BaseException:
                work.close()  # training writes a checkpoint
                raise
            try:
                progress = next(work)
            except StopIteration as end:
                self._flush()
                value: R = end.value
                return value
            self.report(progress)

    def report(self, progress: Progress) -> None:
        """Store progress, at most every few seconds but always when a phase begins."""
        if progress.note:
            self.say(progress.note)
        if self.tracker:
            self.tracker.add(progress)
        if progress.values and progress.step is not None:
            of_run = self._points.setdefault(progress.run or 0, {})
            of_run[progress.step] = dict(progress.values) | {"rate": progress.rate}
        left, begins = self.clock.at(progress), progress.phase != self._phase
        if not begins and time.monotonic() - self._stored < REPORT_SECONDS:
            return
        if begins and progress.phase in SAID and progress.phase not in self._said:  # collecting and training take turns
            self._said.add(progress.phase)
            self.say(SAID[progress.phase])
        self._phase, self._stored = progress.phase, time.monotonic()
        with self.worker.db.write() as session:
            store.report(session, self.id, self.attempt, progress, left)
        self._flush()

    def _flush(self) -> None:
        if self._points:
            with self.worker.db.write() as session:
                for index, points in self._points.items():
                    store.add_points(session, self.id, self.attempt, list(points.items()), run=index)
            self._points.clear()

    def finish(self) -> None:
        """The job is done."""
        with self.worker.db.write() as session:
            store.finish(session, self.id, self.attempt)
        log.info("%s: done", self.id)

    def fail(self, error: Exception) -> None:
        """The job ends with a sentence; or waits to be tried again, where what was wrong may pass."""
        log.error("%s failed", self.id, exc_info=error)
        while True:
            try:
                with self.worker.db.write() as session:
                    said = sentence(error, self.worker.settings, self.worker.log_path)
                    if may_pass(error) and (tries := store.get(session, self.id).tries) < self.worker.settings.job_tries:
                        return store.try_again(session, self.id, self.attempt, said, WAIT * LONGER**tries)
                    return store.fail(session, self.id, self.attempt, said)
            except (Cancelled, Fenced) as other:
                raise Leave from other
            except (
                sa.exc.OperationalError,
                sa.exc.InterfaceError,
            ):  # a full disk, a database that is away: say it when it can be said
                log.exception("%s cannot be marked as failed now; trying again", self.id)
                if self.worker.stopping.wait(AGAIN_SECONDS):
                    raise Leave from error
