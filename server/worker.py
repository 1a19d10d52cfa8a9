"""The worker: a process that takes jobs from the queue, one at a time, and the DBOS workflows by which they come to it.

What it does at each kind of job is in `server.work`. A worker's name is a slot with a file lock; another worker takes the jobs
of a slot that has been silent for a minute.
"""

import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer

from sae_core import machine
from sae_core.config import DeviceKind
from sae_core.errors import Cancelled, Fenced, HeadscopeError
from sae_core.lens import Lens, load_lens
from sae_core.parallel import check_processes
from server import estimates, jobs, logs, telemetry, watch, webhook
from server.db import Database
from server.estimates import Shape
from server.gpus import gpus, take_gpu
from server.settings import Settings
from server.slots import Slot
from server.store import jobs as store
from server.store import registry
from server.work.comparing import compare
from server.work.evaluating import evaluate_job
from server.work.failures import Failed, Leave
from server.work.harvesting import harvest_job, shard_job
from server.work.importing import import_job
from server.work.run import LOOK_SECONDS, Run
from server.work.studying import study
from server.work.training import sweep_job, train_job

log = logging.getLogger("headscope.worker")

TAKING_SECONDS = 10.0  # that a job which was taken from a queue needs at most to come to `Worker.work`
RETAKE = 50  # times that a job is taken up before it counts as one that takes its worker down


class Worker:
    """One device, one job at a time. `close()` stops at the next batch and leaves the job to be resumed."""

    def __init__(self, settings: Settings, db: Database) -> None:
        self.settings, self.db = settings, db
        self.jobs = jobs.Jobs(settings, db)
        self.stopping = threading.Event()
        self.slot = Slot.take(settings)
        self.log_path = settings.data / "logs" / f"{jobs.slug(self.slot.name)}.log"
        self.device = machine.pick_device(settings.device)
        check_processes(settings.processes, self.device)
        self.speed = estimates.UNKNOWN
        self._busy = threading.Lock()  # held while a job is worked at
        self._taken = -math.inf  # when a job was taken from a queue that has not come here yet
        self._run: Run | None = None
        self._gpu = take_gpu(settings, self.device)
        self._loaded: tuple[registry.ModelRecord, Lens] | None = None
        self.beaten = time.monotonic()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._watch = threading.Thread(target=self._look, name="watch", daemon=True)

    @property
    def kind(self) -> DeviceKind:
        """What kind of device it is."""
        kind: DeviceKind = self.device.partition(":")[0]  # type: ignore[assignment]  # pick_device knows no other
        return kind

    @property
    def busy(self) -> bool:
        """Whether a job is worked at."""
        return self._busy.locked()

    def trouble(self) -> str | None:
        """What is wrong with this process, in a sentence; None where nothing is."""
        if not self._heart.is_alive():
            return "The heart does not beat."
        silent = time.monotonic() - self.beaten
        return None if silent < self.settings.silent_seconds else f"The database has not taken a heartbeat for {silent:.0f} s."

    def start(self) -> None:
        """Take the slot's unfinished jobs up again, then take new ones from the queue."""
        global _worker
        assert _worker is None, "one worker per process: DBOS is a singleton"
        _worker = self
        jobs.quiet()
        self._end_log = logs.to_file(self.settings, self.log_path)
        self.speed = estimates.Speed(**machine.speeds(self.device))
        with self.db.write() as session:
            store.beat(session, self.slot.name, self.device, os.getpid())
        config = DBOSConfig(
            name=jobs.APP,
            system_database_url=self.settings.jobs_url,
            executor_id=self.slot.name,
            application_version=jobs.VERSION,
            serializer=DBOSPortableJSONSerializer(),
            log_level="WARNING",
            enable_otlp=False,
        )
        mine = (jobs.QUEUE, jobs.queue_of(self.kind))
        dbos = DBOS(config=config)
        DBOS.listen_queues(mine)
        DBOS.launch()
        self._one_at_a_time(dbos)  # a queue's thread waits before it first looks
        for queue in mine:
            DBOS.register_queue(queue, worker_concurrency=1, polling_interval_sec=0.5)
        tidy(self.settings.data, self.db)
        self.jobs.release()
        self._heart.start()
        self._watch.start()
        log.info("%s takes jobs on %s", self.slot.name, self.device)

    def _one_at_a_time(self, dbos: DBOS) -> None:
        """Let DBOS take a workflow from a queue only while none is worked at. It bounds each queue by itself, and a worker that
        listens to two would take a second job, to wait for the first, while another worker is idle. The method is private, hence
        the pinned minor version."""
        inner, gate = dbos._sys_db.start_queued_workflows, threading.Lock()

        def start(*given: Any, **named: Any) -> Any:
            with gate:
                if self.busy or time.monotonic() - self._taken < TAKING_SECONDS:
                    return [], None
                found = inner(*given, **named)
                self._taken = time.monotonic() if found[0] else -math.inf
                return found

        dbos._sys_db.start_queued_workflows = start  # type: ignore[method-assign]

    def close(self) -> None:
        """Stop at the next batch, keep what is needed to go on, and free the slot."""
        global _worker
        self.stopping.set()
        with self._busy:
            DBOS.destroy()
        self._heart.join()
        self._watch.join()
        with self.db.write() as session:
            store.leave(session, self.slot.name)
        self.jobs.close()
        self.slot.free()
        if self._gpu:
            self._gpu.free()
        _worker = None
        log.info("%s has stopped", self.slot.name)
        self._end_log()

    def work(self, job_id: str, tell: Callable[[Run], None]) -> str:
        """Make an attempt at a job; the status it ends with."""
        with self._busy, logs.about_job(job_id):
            self._taken = -math.inf
            if self.stopping.is_set():
                raise Leave
            try:
                with self.db.write() as session:
                    attempt = store.start_attempt(session, job_id, self.slot.name)
            except Cancelled:
                return "ended before"
            try:
                run = Run(self, self.jobs.get(job_id), attempt)
            except Fenced as error:
                raise Leave from error
            try:
                self._run = run
                if attempt % RETAKE == 0:
                    raise HeadscopeError(f"It was taken up {RETAKE} times and never ended; see the worker's log.")
                with telemetry.job(job_id, run.job.kind):
                    tell(run)
                run.finish()
                tidy(self.settings.data, self.db)
            except Failed:
                return "failed"
            except (Cancelled, Fenced) as error:
                raise Leave from error
            except Exception as error:
                run.fail(error)
                return "failed"
            finally:
                self._run = None
                if run.tracker:
                    run.tracker.close()
                if not self.stopping.is_set():
                    self.jobs.release()  # what waited for this job may start
                self._announce(job_id, attempt)
            return "done"

    def _announce(self, job_id: str, attempt: int) -> None:
        """Call the webhook if this attempt was the job's last; another worker tells of its own."""
        job = self.jobs.get(job_id)
        if job.ended and job.attempt == attempt and job.kind != store.PARTS:
            webhook.announce(self.settings, job)

    def lens(self, name: str) -> Lens:
        """The model of that name, loaded; the one used last stays warm."""
        with self.db.read() as session:
            record = registry.model(session, name)
        if self._loaded is None or self._loaded[0].source != record.source:
            self._loaded = None
            lens = load_lens(record.source, name=name, device=self.device, cache=self.settings.cache)
            self._loaded = (record, lens)
        return self._loaded[1]

    def keep(self, name: str, lens: Lens) -> None:
        """Use a model that is loaded already."""
        with self.db.read() as session:
            self._loaded = (registry.model(session, name), lens)

    def model_shape(self, name: str) -> Shape | None:
        """The model's sizes, if it is the one that is loaded."""
        return Shape.of(self._loaded[1].info) if self._loaded and self._loaded[0].name == name else None

    def _beat(self) -> None:
        beat, ears = self.settings.beat_seconds, store.Listener(self.settings.silent_seconds, self.settings.beat_seconds)
        while not self.stopping.wait(beat):
            try:
                with self.db.write() as session:
                    store.beat(session, self.slot.name, self.device, os.getpid())
                with self.db.read() as session:
                    silent = [slot for slot in ears.look(session) if slot != self.slot.name]
                self.beaten = time.monotonic()
                for slot in {*silent, *self.jobs.gone()}:
                    take_over(slot, self.db)
                self.jobs.release()  # what was taken over, and what waited to be tried again
            except Exception:  # a database that is away for a while must not stop the heart
                log.exception("the heartbeat failed; trying again")

    def _look(self) -> None:
        while not self.stopping.wait(LOOK_SECONDS):
            run = self._run
            if run is not None:
                try:
                    run.look()
                except Exception:
                    log.exception("looking after %s failed; trying again", run.id)


def tidy(data: Path, db: Database) -> None:
    """Give back the disk of jobs that are done: their folders, unless a job that follows will still read them."""
    for folder in (data / "jobs").glob("*"):
        with db.read() as session:
            job = store.find(session, folder.name)
            followers = store.children(session, folder.name)
            whole = store.find(session, job.parent_id or "") if job and job.kind == store.PARTS else None
        if whole is not None and not whole.ended:
            continue  # what a part has made is gathered by whoever has the whole
        if job and (job.status == store.DONE or whole) and all(follower.ended for follower in followers):
            shutil.rmtree(folder, ignore_errors=True)


def take_over(slot: str, db: Database) -> int:
    """Put the jobs of a dead slot back into the queue; how many there were.

    DBOS does this by itself only with its commercial service; the call is private, hence the pinned minor version and
    this one place. A worker that was only asleep is shut out by its attempt number.
    """
    moved = DBOS._recover_pending_workflows([slot])
    with db.write() as session:
        had = store.take_from(session, slot)
    log.warning("%s is gone; took over %d jobs, %d of them in the queue again", slot, had, len(moved))
    return had


_worker: Worker | None = None


@DBOS.workflow(name="train", max_recovery_attempts=None)
def train_workflow(job_id: str) -> str:
    """DBOS's entry to `train_job`."""
    assert _worker is not None
    return _worker.work(job_id, train_job)


@DBOS.workflow(name="import", max_recovery_attempts=None)
def import_workflow(job_id: str) -> str:
    """DBOS's entry to `import_job`."""
    assert _worker is not None
    return _worker.work(job_id, import_job)


@DBOS.workflow(name="sweep", max_recovery_attempts=None)
def sweep_workflow(job_id: str) -> str:
    """DBOS's entry to `sweep_job`."""
    assert _worker is not None
    return _worker.work(job_id, sweep_job)


@DBOS.workflow(name="evaluate", max_recovery_attempts=None)
def evaluate_workflow(job_id: str) -> str:
    """DBOS's entry to `evaluate_job`."""
    assert _worker is not None
    return _worker.work(job_id, evaluate_job)


@DBOS.workflow(name="study", max_recovery_attempts=None)
def study_workflow(job_id: str) -> str:
    """DBOS's entry to `study`."""
    assert _worker is not None
    return _worker.work(job_id, study)


@DBOS.workflow(name="compare", max_recovery_attempts=None)
def compare_workflow(job_id: str) -> str:
    """DBOS's entry to `compare`."""
    assert _worker is not None
    return _worker.work(job_id, compare)


@DBOS.workflow(name="harvest", max_recovery_attempts=None)
def harvest_workflow(job_id: str) -> str:
    """DBOS's entry to `harvest_job`."""
    assert _worker is not None
    return _worker.work(job_id, harvest_job)


@DBOS.workflow(name="shard", max_recovery_attempts=None)
def shard_workflow(job_id: str) -> str:
    """DBOS's entry to `shard_job`."""
    assert _worker is not None
    return _worker.work(job_id, shard_job)


def run_worker(settings: Settings, db: Database) -> None:
    """The worker process: works until SIGTERM or SIGINT; a second signal leaves at once (nothing is lost either way)."""
    stop = threading.Event()

    def leave(_signal: int, _frame: object) -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    worker = Worker(settings, db)
    if settings.metrics_port:  # first: where the port is taken, nothing has begun
        watch.listening(settings, watch.Watch(settings, db, "worker", worker=worker.slot.name, gpus=gpus), worker.trouble)
    worker.start()
    stop.wait()
    worker.close()
