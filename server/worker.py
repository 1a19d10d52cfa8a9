"""The worker: DBOS workflows that turn a job into work of `sae_core` and results in the store.

What happens to a training job, top to bottom:

    train      resolve model and corpus, load the model, cut rows, train           one durable step; it resumes itself
    evaluate   measure the SAE                                                     from <data>/jobs/<id>
    publish    move the SAE to <data>/saes/<name>, write its row
    follow     queue the config's harvests; each replaces the one before

A sweep trains many SAEs in one such step, then evaluates and publishes one after the other. An evaluation of an SAE that
exists measures it and puts the numbers in the place of the old ones. A study puts a question to a feature or to a model's heads
and keeps what it finds. And what happens to a harvest of one SAE or of many: scan (for all), choose (a step for each), visit (for
all); then for each: features, write (a step per part), publish. Scan and visit are cut into shards, and where more workers are
there, into jobs of some shards each, which any of them takes.

Steps run at least once, their effects appear once: every write checks in its own transaction that this attempt still owns
the job (`Fenced` otherwise), files are written aside and renamed, rows are found by job id. A worker's name is a slot with
a file lock; another worker takes the jobs of a slot that has been silent for a minute.
"""

import ctypes
import fcntl
import logging
import math
import os
import shutil
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import sqlalchemy as sa
import torch
from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer, PortableWorkflowError
from sqlalchemy.orm import Session

from sae_core import attribution, heads, machine
from sae_core import harvest as sweep
from sae_core.activations import Activations, about
from sae_core.config import (
    AnyStudy,
    CompareJob,
    DashboardsJob,
    DeviceKind,
    EvaluateJob,
    HarvestConfig,
    HarvestJob,
    HeadsStudy,
    ImportJob,
    InductionStudy,
    IoiStudy,
    PrefixStudy,
    SaeStudy,
    SpecificityStudy,
    SweepConfig,
    TrainConfig,
    study_job,
)
from sae_core.corpus import Rows, prepare_rows
from sae_core.errors import (
    CacheBusy,
    Cancelled,
    DatabaseAway,
    DiskFull,
    DownloadFailed,
    EngineAway,
    Fenced,
    HeadscopeError,
    ProcessLost,
    SAEMismatch,
    SlotTaken,
    TimeUp,
    UnreadableDashboards,
)
from sae_core.evaluate import evaluate
from sae_core.formats import convert, fetched, open_peer
from sae_core.lens import Lens, load_lens
from sae_core.matching import match
from sae_core.parallel import check_processes, train_parallel
from sae_core.probes import read_texts
from sae_core.progress import Progress, relayed
from sae_core.records import HarvestTotals
from sae_core.saes import SAE, check_fits, load_sae, save_sae
from sae_core.stability import check_same_site
from sae_core.studies import heads as head_study
from sae_core.studies import induction
from sae_core.studies.ioi import ioi
from sae_core.studies.prefix import prefix
from sae_core.studies.specificity import specificity
from sae_core.train import activations_of, curve_of, diverged, made_by, train_many
from server import doctor, estimates, harvest_plan, jobs, logs, telemetry, watch, webhook
from server.db import Database, sqlite_path
from server.downloads import sha256_of
from server.estimates import Shape
from server.exchange import dashboards
from server.exchange.reading import Readers
from server.job_folders import left_by, take_folder
from server.keeping import room
from server.settings import Settings
from server.store import harvests, imports, registry, removals, search, studies
from server.store import jobs as store
from server.store.foreign import Chunk
from server.store.jobs import JobRecord
from server.store.sweeps import run_names
from server.tracking import Tracker
from server.watch import Gpu

log = logging.getLogger("headscope.worker")
R = TypeVar("R")

LOOK_SECONDS = 1.0  # between two looks whether the job in hand may go on
TAKING_SECONDS = 10.0  # that a job which was taken from a queue needs at most to come to `Worker.work`
PATIENCE = 1.5  # seconds that a step may take to notice that it may not, before it is broken off
WAIT, LONGER = 5.0, 4  # seconds before a job is first tried again by itself, and how much longer each time
NOT_TOLD = ("lr", "k")  # of a curve on disk, which follow from the config: a point is the same whoever wrote it
REPORT_SECONDS = 2.0  # between two writes of progress
AGAIN_SECONDS = 10.0  # between two tries to write to a database that refuses
PART_SECONDS = 0.3  # between two looks whether others have done their parts
SEEN_SECONDS = 20.0  # since a worker's last heartbeat, for it to be asked for help
NEIGHBOURS = 10  # nearest features kept of an imported harvest
TYPICAL_L0 = 50  # of an imported SAE whose files do not say it
WATCH_SECONDS = 1.0  # between two looks at the room that is left on disk
RETAKE = 50  # times that a job is taken up before it counts as one that takes its worker down
NO_ROOM = (27, 28, 122)  # EFBIG, ENOSPC, EDQUOT
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


PASSING = (DatabaseAway, EngineAway, DownloadFailed, CacheBusy, ProcessLost, ConnectionError, TimeoutError)
"""Failures that may be gone when the job is tried again; all others are of what was asked for, or need somebody's hand."""


class Broken(BaseException):
    """Raised from outside into a step that does not notice that it must end."""


class Leave(BaseException):
    """Stop working at a job here without ending it. Not an `Exception`, so that DBOS records no outcome."""


class Failed(Exception):
    """The job has been marked as failed; DBOS may record the step as such."""


# ------------------------------------------------------------------------------------------------------ one job's attempt


class Run:
    """One attempt of this worker at one job: its fenced writes, its progress, its durable steps."""

    def __init__(self, worker: "Worker", job: JobRecord, attempt: int) -> None:
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
        self._stored = self._looked = 0.0
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
        if time.monotonic() - self._looked > WATCH_SECONDS:
            self._looked = time.monotonic()
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
                    said = sentence(error, self.worker)
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


def may_pass(error: Exception) -> bool:
    """Whether it may go well when it is tried again, though nobody does anything."""
    if isinstance(error, sa.exc.DBAPIError):
        return isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError) and "disk is full" not in str(error)
    return isinstance(error, PASSING)


def sentence(error: Exception, worker: "Worker") -> str:
    """What a person reads about `error`."""
    if isinstance(error, HeadscopeError):
        return str(error)
    if isinstance(error, PortableWorkflowError):
        return str(error.message)
    if (isinstance(error, OSError) and error.errno in NO_ROOM) or "disk is full" in str(error):
        return str(no_room(worker.settings))
    if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError):
        return f"The database did not answer ({str(error.orig).strip().splitlines()[0][:200]})."
    if isinstance(error, torch.OutOfMemoryError):
        return "The device ran out of memory; lower `collect_rows`, `batch` or `batch_rows`, or choose another device."
    first = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    return f"It stopped with an error that is not foreseen ({first[:300]}); see the worker's log, {worker.log_path}."


def no_room(settings: Settings) -> DiskFull:
    """The disk is full."""
    return DiskFull(f"No room is left in {settings.data}; free some space there, then run the job again.")


# ---------------------------------------------------------------------------------------------------------- training job


def train_job(run: Run) -> None:
    """A training run, from text to an SAE in the store and its harvests in the queue."""
    cfg, name = TrainConfig.model_validate(run.job.config), jobs.sae_name(run.id)

    run.step("train", lambda: _train(run, cfg))
    metrics = run.step("evaluate", lambda: _evaluate(run, cfg))
    run.step("publish", lambda: _publish_sae(run, cfg.model, name, metrics))
    run.step("follow", lambda: _follow(run, [(cfg, name)]))


def _train(run: Run, cfg: TrainConfig) -> None:
    lens = _lens(run, cfg.model)
    lens.check_layer(cfg.site.layer)
    run.clock = estimates.Clock(estimates.train_seconds(cfg, Shape.of(lens.info), run.worker.speed))
    need = doctor.needs(cfg, Shape.of(lens.info), run.worker.speed).disk
    room.need_room(run.worker.settings, need - room.size_of(run.folder))
    rows = _rows(run, lens, cfg.corpus, cfg)
    _train_all(run, [cfg], lens, rows)


def _evaluate(run: Run, cfg: TrainConfig, index: int = 0, nth: int = 0, of: int = 1) -> dict[str, Any]:
    lens = _lens(run, cfg.model)
    expected = estimates.train_seconds(cfg, Shape.of(lens.info), run.worker.speed)
    if not run.clock.expected:
        run.clock = estimates.Clock({name: of * expected[name] for name in ("evaluate", "harvests")})
    rows = _rows(run, lens, cfg.corpus, cfg)
    sae = load_sae(made_by(run.folder, index), lens.device)
    reports = evaluate(lens, sae, rows, _activations(run, run.folder, lens, rows, cfg))

    def one_of_many(report: Progress) -> Progress:
        return replace(report, done=nth * report.total + report.done, total=of * report.total)

    return run.follow(relayed(reports, one_of_many)).model_dump(mode="json")


def _publish_sae(run: Run, model: str, name: str, metrics: dict[str, Any], index: int = 0) -> None:
    home, made = run.worker.settings.data / "saes" / name, made_by(run.folder, index)
    home.parent.mkdir(parents=True, exist_ok=True)
    if made.exists():  # else it was moved before a crash
        # Nothing is removed at the final name: that would be done by a late attempt too. What it renames starts or ends in its
        # own folder, which is gone once another attempt has taken the job.
        if home.exists():
            aside = run.folder / f"replaced-{index:03d}"
            shutil.rmtree(aside, ignore_errors=True)
            home.rename(aside)
        made.rename(home)
    sae, sha256 = load_sae(home), sha256_of(home / "sae.safetensors")
    with run.write() as session:
        registry.upsert_sae(
            session,
            job_id=run.id,
            run=index,
            name=name,
            model_id=registry.model(session, model).id,
            config=sae.cfg,
            metrics=metrics,
            folder=str(home.relative_to(run.worker.settings.data)),
            sha256=sha256,
        )
    run.say(f"The SAE is in {home}.")


def _follow(run: Run, made: Sequence[tuple[TrainConfig, str]]) -> None:
    """Queue the harvests that the configs ask for; SAEs of which the nth is to be the same are swept together."""
    for nth in range(max((len(cfg.harvests) for cfg, _ in made), default=0)):
        alike: dict[tuple[str, str, str], list[tuple[TrainConfig, str]]] = {}
        for cfg, name in made:
            if nth < len(cfg.harvests):
                alike.setdefault((cfg.corpus, cfg.rows.hash(), cfg.harvests[nth].hash()), []).append((cfg, name))
        for members in alike.values():
            first = members[0][0]
            config = first.harvests[nth]
            job = HarvestJob(saes=tuple(name for _, name in members), corpus=first.corpus, rows=first.rows, harvest=config)
            model = run.worker.model_shape(first.model)
            swept = [estimates.Swept(cfg.site.layer, cfg.expansion * model.d_in, cfg.k) for cfg, _ in members] if model else []
            seconds = estimates.harvest_seconds(config, swept, first.rows, model, run.worker.speed, cached=True) if model else {}
            run.worker.jobs.enqueue_harvest(job, parent=run.id, seconds_left=sum(seconds.values()) or None)
    for checkpoints in run.folder.glob("runs/*/checkpoints"):
        shutil.rmtree(checkpoints, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- sweep job


def sweep_job(run: Run) -> None:
    """Many training runs on one stream of activations: all are trained, then each is evaluated and published."""
    cfg = SweepConfig.model_validate(run.job.config)
    trained = run.step("train", lambda: _train_sweep(run, cfg))
    runs = cfg.runs(trained["n_layers"])
    made = [
        (index, one, name)
        for index, (one, name) in enumerate(zip(runs, run_names(run.id, cfg, runs), strict=True))
        if index not in trained["diverged"]
    ]
    for nth, (index, one, name) in enumerate(made):
        metrics = run.step(f"evaluate {index}", partial(_evaluate, run, one, index, nth, len(made)))
        run.step(f"publish {index}", partial(_publish_sae, run, one.model, name, metrics, index))
    run.step("follow", lambda: _follow(run, [(one, name) for _, one, name in made]))
    shutil.rmtree(run.folder / "runs", ignore_errors=True)


def _train_sweep(run: Run, cfg: SweepConfig) -> dict[str, Any]:
    """Train every run; how many layers the model has, which says what the runs are, and which of them diverged."""
    lens = _lens(run, cfg.base.model)
    runs, shape, speed = cfg.runs(lens.info.n_layers), Shape.of(lens.info), run.worker.speed
    for one in runs:
        lens.check_layer(one.site.layer)
        one.check_width(lens.info.d_in)
    run.clock = estimates.Clock(estimates.sweep_seconds(runs, shape, speed))
    need = doctor.sweep_needs(runs, shape, speed).disk
    room.need_room(run.worker.settings, need - room.size_of(run.folder))
    rows = _rows(run, lens, cfg.base.corpus, cfg.base)
    run.say(f"{len(runs)} SAEs are trained on one stream of activations.")
    _train_all(run, runs, lens, rows)
    lost = [index for index in range(len(runs)) if diverged(run.folder, index)]
    return {"n_layers": lens.info.n_layers, "diverged": lost}


# ------------------------------------------------------------------------------------------------------------ import job


def import_job(run: Run) -> None:
    """A peer's SAE, made one of ours; or dashboards of one that is here, made a harvest."""
    if "sae" in run.job.config:
        import_dashboards(run, DashboardsJob.model_validate(run.job.config))
        return
    cfg = ImportJob.model_validate(run.job.config)
    run.step("convert", lambda: _convert(run, cfg))
    run.step("publish", lambda: _publish_sae(run, cfg.model, jobs.sae_name(run.id), {}))


def _convert(run: Run, cfg: ImportJob) -> None:
    run.report(Progress("convert", 0, 2, "parts"))
    # What can be wrong with the files is said before the model is loaded.
    if (place := Path(cfg.location)).exists():
        room.need_room(run.worker.settings, room.size_of(place), "This import")
    peer = open_peer(fetched(cfg.location, cfg.revision), cfg.format, cfg.scale)
    run.report(Progress("convert", 1, 2, "parts"))
    sae = convert(peer, _lens(run, cfg.model), cfg.location, layer=cfg.layer, folded=cfg.folded)
    save_sae(sae, made_by(run.folder, 0))
    run.say(f"{peer.path} is {peer.format}'s: {sae.cfg.d_sae:,} features on layer {sae.cfg.site.layer}, {sae.cfg.arch}.")
    for note in sae.cfg.imported.notes if sae.cfg.imported else ():
        run.say(note)
    run.report(Progress("convert", 2, 2, "parts"))


def import_dashboards(run: Run, cfg: DashboardsJob) -> None:
    """File by file, each a durable step; published when every feature is there."""
    layout = dashboards.look(Path(cfg.location))
    worker = run.worker
    with worker.db.read() as session:
        record = registry.sae(session, cfg.sae)
    if sqlite_path(worker.settings.url):
        room.need_room(worker.settings, record.config.d_sae * harvest_plan.FEATURE_IN_DATABASE, "This import")
    if record.config.d_sae <= max(layout.skipped, default=-1):
        raise SAEMismatch(
            f"{layout.folder} is of an SAE with more than the {record.config.d_sae:,} features of {cfg.sae}.", field="sae"
        )
    sae = load_sae(worker.settings.data / record.folder)
    shares = attribution.head_norm_shares(sae.W_dec, sae.cfg.n_heads)
    near = attribution.decoder_neighbours(sae.W_dec, NEIGHBOURS)
    pairs = [
        [[idx, round(cosine, 4)] for idx, cosine in zip(*one, strict=True)]
        for one in zip(near.indices.tolist(), near.cosines.tolist(), strict=True)
    ]
    about = dashboards.About(shares.numpy(), pairs)
    harvest_id: int = run.step("begin", lambda: _begin_dashboards(run, cfg, record, layout))
    texts = imports.Texts.of(worker.db, harvest_id)
    covered: set[int] = set()
    with Readers(layout, about, imports.unwritten(worker.db, harvest_id, layout.parts)) as readers:
        for done, number in enumerate(layout.parts):
            run.report(Progress("read", done, len(layout.parts), "files"))
            covered.update(run.step(f"read {number}", partial(_read_dashboards, run, record, readers, number, harvest_id, texts)))
    run.step("check", lambda: _check_covered(run, cfg, covered, layout, record))
    dead = (dashboards.feature_record(index, about) for index in sorted(layout.skipped - covered))
    run.step("dead", lambda: imports.write_dead(worker.db, harvest_id, dead, run.fence))
    run.step("count", lambda: imports.count_up(worker.db, harvest_id, run.fence))
    run.step("search", lambda: search.write(worker.db, harvest_id, run.fence))
    run.step("publish", lambda: harvests.publish(worker.db, harvest_id, 0, run.fence))
    run.say(f"Published: {worker.settings.address}/saes/{record.name}.")


def _begin_dashboards(run: Run, cfg: DashboardsJob, record: registry.SAERecord, layout: dashboards.Layout) -> int:
    with run.write() as session:
        corpus = registry.foreign_corpus(session, cfg.corpus, layout.dataset)
    kept = HarvestConfig(tokens=layout.n_tokens or 1, bands=5, per_band=5, window=max(layout.context, 8))
    totals = HarvestTotals(layout.n_tokens, 0, 0, layout.context)
    harvest_id = harvests.begin(
        run.worker.db, sae_id=record.id, corpus_id=corpus.id, job_id=run.id, config=kept.model_dump(mode="json"), totals=totals,
        fence=run.fence,
    )  # fmt: skip
    imports.note_source(run.worker.db, harvest_id, layout.source, run.fence)
    run.say(f"{layout.folder} holds {len(layout.parts)} files of {layout.format}.")
    return harvest_id


def _read_dashboards(
    run: Run, record: registry.SAERecord, readers: Readers, number: int, harvest_id: int, texts: imports.Texts
) -> list[int]:
    """The features of one file, stored."""
    covered: list[int] = []

    def seen() -> Iterator[Chunk]:
        for chunk in readers.chunks(number):
            covered.extend(feature.idx for feature in chunk.records)
            yield chunk

    imports.write_file(run.worker.db, harvest_id, record.id, number, seen(), texts, run.fence)
    if not covered:  # written before, by an attempt that was killed before it could say so
        covered = [feature.idx for chunk in readers.chunks(number) for feature in chunk.records]
    return covered


def _check_covered(
    run: Run, cfg: DashboardsJob, covered: set[int], layout: dashboards.Layout, record: registry.SAERecord
) -> None:
    if lacking := dashboards.missing_features(covered, layout, record.config.d_sae):
        if not cfg.partial:
            raise UnreadableDashboards(lacking)
        run.say(lacking)


# -------------------------------------------------------------------------------------------------------- evaluation job


def evaluate_job(run: Run) -> None:
    """A measurement of an SAE that exists; it takes the place of the one before."""
    cfg = EvaluateJob.model_validate(run.job.config)
    metrics = run.step("evaluate", lambda: _measure(run, cfg))
    run.step("store", lambda: _store_metrics(run, cfg.sae, metrics))


def _measure(run: Run, cfg: EvaluateJob) -> dict[str, Any]:
    worker, how = run.worker, cfg.evaluate
    with worker.db.read() as session:
        records = {name: registry.sae(session, name) for name in (cfg.sae, *cfg.against)}
        model = registry.model_by_id(session, records[cfg.sae].model_id)
    # What can be wrong with texts is said before the model is loaded.
    texts = [
        read_texts(Path(path), field=how.probe_field, label=how.probe_label, per_label=how.probe_texts) for path in cfg.probes
    ]
    lens = _lens(run, model.name)
    sae = open_sae(worker.settings.data, records[cfg.sae], lens)
    others = {name: load_sae(worker.settings.data / records[name].folder, lens.device) for name in cfg.against}
    for name, other in others.items():
        check_same_site(sae, other, name)
    expected = estimates.evaluate_seconds(cfg, sae.cfg.site.layer, Shape.of(lens.info), worker.speed)
    run.clock = estimates.Clock({"evaluate": expected})
    rows = _rows(run, lens, cfg.corpus, cfg)
    found = run.follow(
        evaluate(
            lens,
            sae,
            rows,
            prose_rows=how.prose_rows,
            repeated_rows=how.repeated_rows,
            dead_tokens=how.dead_tokens,
            batch_rows=how.batch_rows,
            others=others,
            texts=texts,
        )
    )
    return found.model_dump(mode="json") | {"corpus": cfg.corpus}


def _store_metrics(run: Run, sae: str, metrics: dict[str, Any]) -> None:
    with run.write() as session:
        registry.note_metrics(session, sae, metrics)
    for note in metrics["notes"]:
        run.say(note)


# ------------------------------------------------------------------------------------------------------------- study job


def study(run: Run) -> None:
    """A question put to a feature, or to the heads of a model; what is found is kept."""
    cfg = study_job(run.job.config)
    if isinstance(cfg, SpecificityStudy):
        result = run.step("scan", lambda: _specificity(run, cfg))
    elif isinstance(cfg, IoiStudy):
        result = run.step("prompts", lambda: _ioi(run, cfg))
    elif isinstance(cfg, PrefixStudy):
        result = run.step("rows", lambda: _prefix(run, cfg))
    elif isinstance(cfg, HeadsStudy):
        random = run.step("random", lambda: _heads_on_random(run, cfg))
        read = run.step("text", lambda: _heads_in_text(run, cfg)) if cfg.corpus else None
        weights = run.step("weights", lambda: _heads_weights(run, cfg))
        result = run.step("sum up", lambda: _heads(run, cfg, random, read, weights))
    else:
        scores = run.step("synthetic", lambda: _synthetic(run, cfg))
        text = run.step("text", lambda: _in_text(run, cfg, scores)) if cfg.corpus else None
        result = run.step("sum up", lambda: _sum_up(run, cfg, scores, text))
    run.step("store", lambda: _store_study(run, cfg, result))


def _specificity(run: Run, cfg: SpecificityStudy) -> dict[str, Any]:
    worker = run.worker
    with worker.db.read() as session:
        record = registry.sae(session, cfg.sae)
        model = registry.model_by_id(session, record.model_id)
    jobs.check_feature(record, cfg.feature)
    lens = _lens(run, model.name)
    sae = open_sae(worker.settings.data, record, lens)
    rows = _rows(run, lens, cfg.corpus, cfg)
    run.clock = estimates.Clock(
        {"scan": estimates.scan_seconds(cfg.tokens_swept, record.config.site.layer, lens.info, worker.speed)}
    )
    return run.follow(specificity(lens, sae, rows, cfg)).model_dump(mode="json")


def _ioi(run: Run, cfg: IoiStudy) -> dict[str, Any]:
    lens, sae = _lens_and_sae(run, cfg.sae)
    run.clock = estimates.Clock(estimates.ioi_seconds(cfg, sae.cfg.site.layer, lens.info, run.worker.speed))
    return run.follow(ioi(lens, sae, cfg)).model_dump(mode="json")


def _prefix(run: Run, cfg: PrefixStudy) -> dict[str, Any]:
    lens, sae = _lens_and_sae(run, cfg.sae)
    run.clock = estimates.Clock(estimates.prefix_seconds(cfg, sae.cfg.site.layer, lens.info, run.worker.speed))
    return run.follow(prefix(lens, sae, cfg)).model_dump(mode="json")


def _lens_and_sae(run: Run, name: str) -> tuple[Lens, SAE]:
    with run.worker.db.read() as session:
        record = registry.sae(session, name)
        model = registry.model_by_id(session, record.model_id)
    lens = _lens(run, model.name)
    return lens, open_sae(run.worker.settings.data, record, lens)


def _synthetic(run: Run, cfg: InductionStudy) -> dict[str, Any]:
    lens = _lens(run, cfg.model)
    run.clock = estimates.Clock(estimates.induction_seconds(cfg, lens.info, run.worker.speed))
    return run.follow(induction.synthetic(lens, cfg)).model_dump(mode="json")


def _in_text(run: Run, cfg: InductionStudy, scores: dict[str, Any]) -> dict[str, Any]:
    assert cfg.corpus is not None
    lens = _lens(run, cfg.model)
    if not run.clock.expected:
        run.clock = estimates.Clock(estimates.induction_seconds(cfg, lens.info, run.worker.speed))
    rows = _rows(run, lens, cfg.corpus, cfg)
    found = induction.doing_induction(induction.Synthetic.model_validate(scores))
    return run.follow(induction.in_text(lens, rows, cfg, found)).model_dump(mode="json")


def _sum_up(run: Run, cfg: InductionStudy, scores: dict[str, Any], text: dict[str, Any] | None) -> dict[str, Any]:
    seen = None if text is None else induction.InText.model_validate(text)
    found = induction.induction(_lens(run, cfg.model), cfg, induction.Synthetic.model_validate(scores), seen)
    return found.model_dump(mode="json")


def _lens_of(run: Run, cfg: HeadsStudy) -> Lens:
    """The study's model; a worker that goes on with another's study learns how long what is left takes."""
    lens = _lens(run, cfg.model)
    if not run.clock.expected:
        run.clock = estimates.Clock(estimates.heads_seconds(cfg, lens.info, run.worker.speed))
    return lens


def _heads_on_random(run: Run, cfg: HeadsStudy) -> dict[str, Any]:
    return run.follow(head_study.on_random(_lens_of(run, cfg), cfg)).model_dump(mode="json")


def _heads_in_text(run: Run, cfg: HeadsStudy) -> dict[str, Any]:
    assert cfg.corpus is not None
    lens = _lens_of(run, cfg)
    return run.follow(head_study.in_text(lens, _rows(run, lens, cfg.corpus, cfg), cfg)).model_dump(mode="json")


def _heads_weights(run: Run, cfg: HeadsStudy) -> dict[str, Any]:
    return run.follow(head_study.on_weights(_lens_of(run, cfg), cfg)).model_dump(mode="json")


def _heads(
    run: Run, cfg: HeadsStudy, random: dict[str, Any], text: dict[str, Any] | None, weights: dict[str, Any]
) -> dict[str, Any]:
    seen = None if text is None else head_study.Seen.model_validate(text)
    parts = (head_study.Seen.model_validate(random), seen, head_study.Weights.model_validate(weights))
    return head_study.heads(_lens(run, cfg.model), cfg, *parts).model_dump(mode="json")


def _store_study(run: Run, cfg: AnyStudy, result: dict[str, Any]) -> None:
    with run.write() as session:
        of_sae = registry.sae(session, cfg.sae) if isinstance(cfg, SpecificityStudy | SaeStudy) else None
        study_id = studies.write(
            session,
            job_id=run.id,
            kind=cfg.kind,
            title=run.job.title,
            model_id=of_sae.model_id if of_sae else registry.model(session, run.job.config["model"]).id,
            sae_id=of_sae.id if of_sae else None,
            feature=cfg.feature if isinstance(cfg, SpecificityStudy) else None,
            config=run.job.config,
            result=result,
        )
    for note in result["notes"]:
        run.say(note)
    run.say(f"It found: {result['summary']}.")
    run.say(f"See it at http://{run.worker.settings.host}:{run.worker.settings.port}/studies/{study_id}.")


# ----------------------------------------------------------------------------------------------------------- compare job


def compare(run: Run) -> None:
    """The features of two SAEs, matched; what is found is kept as a study is."""
    cfg = CompareJob.model_validate(run.job.config)
    result = run.step("match", lambda: _match(run, cfg))
    run.step("store", lambda: _store_match(run, cfg, result))


def _match(run: Run, cfg: CompareJob) -> dict[str, Any]:
    names = (cfg.sae, cfg.against)
    run.report(Progress("match", 0, 1, "pairs"))
    with run.worker.db.read() as session:
        records = [registry.sae(session, name) for name in names]
        fired = [registry.live_features(session, name) for name in names]
    jobs.check_same_coordinates(*records)
    saes = [load_sae(run.worker.settings.data / record.folder, run.worker.device) for record in records]
    notes = [
        f"{name} has no published harvest, so all its features count, dead ones too."
        for name, live in zip(names, fired, strict=True)
        if live is None
    ]
    live = [torch.arange(sae.cfg.d_sae) if found is None else torch.tensor(found) for sae, found in zip(saes, fired, strict=True)]
    found = match(saes[0].W_dec.detach(), saes[1].W_dec.detach(), live[0], live[1], names, notes).model_dump(mode="json")
    run.report(Progress("match", 1, 1, "pairs"))
    return found


def _store_match(run: Run, cfg: CompareJob, result: dict[str, Any]) -> None:
    with run.write() as session:
        of = registry.sae(session, cfg.sae)
        studies.write(
            session,
            job_id=run.id,
            kind="compare",
            title=run.job.title,
            model_id=of.model_id,
            sae_id=of.id,
            feature=None,
            config=run.job.config,
            result=result,
        )
    run.say(f"It found: {result['summary']}.")
    where = f"compare?a={cfg.sae}&b={cfg.against}"
    run.say(f"See it at http://{run.worker.settings.host}:{run.worker.settings.port}/{where}.")


# ----------------------------------------------------------------------------------------------------------- harvest job


def harvest_job(run: Run) -> None:
    """One sweep, from rows to published harvests. What each step needs is read from disk again if the worker is new."""
    cfg = HarvestJob.model_validate(run.job.config)
    hand = _Hands(run, cfg)

    # ---- sweep and choose: every row once, for all SAEs ----
    run.step("scan", lambda: _share_out(run, hand, "scan"))
    for index in range(len(cfg.saes)):
        run.step(f"choose {index}", partial(hand.choose, index))

    # ---- visit: every row chosen once, for all SAEs ----
    run.step("visit", lambda: _share_out(run, hand, "visit"))
    parts = hand.visits

    # ---- describe, write and publish: SAE after SAE ----
    for index in range(len(cfg.saes)):
        run.step(f"features {index}", partial(hand.features, index, len(parts)))
        harvest_id = run.step(f"begin {index}", partial(hand.begin, index))
        run.step(f"write features {index}", partial(hand.write_features, index, harvest_id, len(parts)))
        run.step(f"write heads {index}", partial(hand.write_heads, index, harvest_id))
        for number in range(len(parts)):
            run.step(f"write {index} {number}", partial(hand.write_part, index, harvest_id, number, len(parts)))
        run.step(f"search {index}", partial(hand.search, harvest_id))
        run.step(f"publish {index}", partial(hand.publish, index, harvest_id, len(parts)))


PARTS_EACH = 2
"""Parts of a phase for each worker: whoever is quicker takes more."""


def _share_out(run: Run, hand: "_Hands", phase: str) -> None:
    """Do a phase of a harvest, shard by shard, with all workers on this kind of device that are there. Each part is a job of its
    own, which writes into its own folder; whoever has the whole takes parts as well, and moves into its folder what others have
    made. What is there is not made again, so it does not matter who was killed when."""
    numbers = [number for number in range(hand.count(phase)) if not hand.there(phase, number)]
    with run.write() as session:
        alive = [
            one for one in store.workers(session, seen_within=SEEN_SECONDS) if one.device.partition(":")[0] == run.worker.kind
        ]
        cut = store.parts(session, run.id, phase)
        if not cut and len(alive) > 1 and len(numbers) > 1:
            n = min(len(numbers), PARTS_EACH * len(alive))
            configs = [
                {"phase": phase, "number": i, "shards": [int(at) for at in share], "saes": list(hand.cfg.saes)}
                for i, share in enumerate(np.array_split(numbers, n))
            ]
            store.add_parts(session, run.id, run.attempt, phase, configs, run.worker.kind)
        elif cut:
            store.add_parts(session, run.id, run.attempt, phase, [], run.worker.kind)
    run.worker.jobs.release()
    while _take_part(run, hand, phase):
        pass
    for number in numbers:  # whose files are lost, or which were never cut
        if not hand.there(phase, number):
            hand.do(phase, number)


def _take_part(run: Run, hand: "_Hands", phase: str) -> bool:
    """Do a part, or wait a while for those who do; False when nothing is left to wait for."""
    run.check()
    with run.worker.db.read() as session:
        parts = store.parts(session, run.id, phase)
    for part in parts:
        if part.status == store.FAILED:
            raise HeadscopeError(part.error or f"A part of it, {part.id}, failed.")
        if part.status == store.DONE:
            hand.gather(part.id)
    if all(part.ended for part in parts):
        return False
    with run.write() as session:
        taken = store.take_part(session, run.id, phase, run.worker.slot.name)
    if taken is None:
        run.report(hand.so_far(phase))
        time.sleep(PART_SECONDS)
        return True
    part, attempt = taken
    for number in part.config["shards"]:
        if not hand.there(phase, number):
            hand.do(phase, number)
    with run.worker.db.write() as session, suppress(Cancelled, Fenced):
        store.finish(session, part.id, attempt)
    return True


def shard_job(run: Run) -> None:
    """A part of another worker's harvest, into a folder of its own."""
    whole = run.job.parent_id or ""
    with run.worker.db.read() as session:
        asked = store.get(session, whole)
    if asked.ended:
        return
    cfg = HarvestJob.model_validate(asked.config)
    run.step("part", lambda: _do_part(run, cfg, whole))


def _do_part(run: Run, cfg: HarvestJob, whole: str) -> None:
    phase, data = run.job.config["phase"], run.worker.settings.data
    while True:
        hand = _Hands(run, cfg, whole)
        try:
            for number in run.job.config["shards"]:
                if not hand.there(phase, number):
                    hand.do(phase, number)
        except OSError:
            if left_by(data, whole) == hand.source:
                raise
            continue  # another worker has taken the whole up, and moved what we read of it
        return


class _Hands:
    """What a harvest's steps hold: model, SAEs, rows; opened once per attempt. Of a part, `whole` is the harvest's job."""

    def __init__(self, run: Run, cfg: HarvestJob, whole: str | None = None) -> None:
        self.run, self.cfg, worker = run, cfg, run.worker
        self.source = left_by(worker.settings.data, whole) if whole else run.folder
        with worker.db.read() as session:
            self.records = [registry.sae(session, name) for name in cfg.saes]
            self.corpus = registry.corpus(session, cfg.corpus)
            model = registry.model_by_id(session, self.records[0].model_id)
        self.lens = _lens(run, model.name)
        self.saes = [open_sae(worker.settings.data, record, self.lens) for record in self.records]
        self.rows = _rows(run, self.lens, cfg.corpus, cfg)
        self.activations = self._cached()
        layers = {sae.cfg.site.layer for sae in self.saes}
        swept = [estimates.Swept(sae.cfg.site.layer, sae.cfg.d_sae, sae.cfg.k or TYPICAL_L0) for sae in self.saes]
        cached = layers <= set(self.activations)
        shape = Shape.of(self.lens.info)
        run.clock = estimates.Clock(estimates.harvest_seconds(cfg.harvest, swept, cfg.rows, shape, worker.speed, cached=cached))
        self._need_room()
        self.files = sweep.files_of(run.folder, len(self.saes))
        self.n_rows = sweep.swept_rows(self.rows, cfg.harvest)
        self.shards = sweep.shards(self.n_rows, cfg.harvest)
        self.phase = run.job.config.get("phase")  # of a part; the whole has none
        # What a scan keeps of the streams goes where it writes; a visit reads what all scans have kept.
        kept = self.source if self.phase == "visit" else run.folder
        self.streams = sweep.streams_of(kept, self.lens, self.saes, self.rows, cfg.harvest, self.activations)
        self._seen, self._counted = sweep.Seen(self.saes), set[int]()
        self._selections: list[sweep.Selection] = []
        self._visits: list[range] = []
        self._table: tuple[int, sweep.FeatureTable] | None = None

    def _need_room(self) -> None:
        """Refuse what will not fit; the database's part only where the database is in the data folder."""
        info, how, settings = self.lens.info, self.cfg.harvest, self.run.worker.settings
        need = 0.0
        for sae in self.saes:
            size = harvest_plan.Size(
                min(how.tokens, len(self.rows.train) * self.rows.context), self.rows.context, sae.cfg.d_sae,
                sae.cfg.k or TYPICAL_L0, sae.cfg.d_in, info.d_model, info.n_heads, info.d_vocab,
            )  # fmt: skip
            parts = harvest_plan.harvest_plan(how, size, None).disk
            need += sum(taken for part, taken in parts.items() if part != "database" or sqlite_path(settings.url))
        room.need_room(settings, need - room.size_of(self.run.folder), "This harvest")

    def _cached(self) -> dict[int, Activations]:
        """By layer, what is left on disk of activations of the same rows."""
        found: dict[int, Activations] = {}
        for record in self.records:
            train = record.config.train
            if train is not None and train.corpus == self.cfg.corpus and train.rows == self.cfg.rows:
                parent = left_by(self.run.worker.settings.data, record.job_id or "none")
                held = _activations(self.run, parent, self.lens, self.rows, train)
                if held is not None:
                    found.setdefault(train.site.layer, held)
        return found

    def count(self, phase: str) -> int:
        """Into how much a phase is cut."""
        return len(self.shards) if phase == "scan" else len(self.visits)

    @property
    def visits(self) -> list[range]:
        """The parts of the visit."""
        if not self._visits:
            self._visits = sweep.visit_parts(self.selections, self.cfg.harvest)
        return self._visits

    def so_far(self, phase: str) -> Progress:
        """How much of a phase is done, whoever did it."""
        of_one, unit = (self.rows.context, "tokens") if phase == "scan" else (1, "rows")
        sizes = [len(one) * of_one for one in (self.shards if phase == "scan" else self.visits)]
        done = sum(size for number, size in enumerate(sizes) if self.there(phase, number))
        return Progress(phase, done, sum(sizes), unit)

    def paths(self, phase: str, number: int) -> list[Path]:
        """What a shard of the scan, or a part of the visit, leaves: a file for each SAE."""
        return [files.shard(self.shards[number]) if phase == "scan" else files.part(number) for files in self.files]

    def there(self, phase: str, number: int) -> bool:
        """Whether it has been done."""
        return all(path.exists() for path in self.paths(phase, number))

    def do(self, phase: str, number: int) -> None:
        """Do it."""
        if phase == "scan":
            self.scan(number)
        else:
            self.visit(number, self.visits[number])

    def gather(self, part: str) -> None:
        """Move into our folder what a part has made in its own, unless it is here already."""
        made = left_by(self.run.worker.settings.data, part)
        for path in sorted(made.rglob("*")) if made.exists() else ():
            if path.is_file() and path.suffix != ".aside":
                place = self.run.folder / path.relative_to(made)
                place.parent.mkdir(exist_ok=True)
                if not place.exists():
                    path.rename(place)
        shutil.rmtree(self.run.worker.settings.data / "jobs" / part, ignore_errors=True)

    def scan(self, number: int) -> None:
        """One shard of the sweep."""
        context, shard = self.rows.context, self.shards[number]
        for other in range(number):  # what was swept before, here or elsewhere, is counted for those who watch
            if other not in self._counted and self.there("scan", other):
                self._seen.add(self.paths("scan", other))
                self._counted.add(other)
        paths = self.paths("scan", number)
        within = _within(self.so_far("scan").done, self.n_rows * context)
        how = self.cfg.harvest, paths, self.activations, self._seen, self.streams
        reports = sweep.scan_shard(self.lens, self.saes, self.rows, shard, *how)
        # What was counted so far is one point, which each report replaces.
        self.run.follow(relayed(reports, lambda report: replace(within(report), step=0)))
        self._counted.add(number)

    def choose(self, index: int) -> None:
        """Merge an SAE's shards and choose its examples."""
        self.run.report(Progress("choose", index, len(self.saes), "SAEs"))
        files = self.files[index]
        paths = [files.shard(shard) for shard in self.shards]
        sweep.choose(paths, self.saes[index], self.rows, self.cfg.harvest, files.selection)

    @property
    def selections(self) -> list[sweep.Selection]:
        """What was chosen of each SAE, without the sums, of which there are many."""
        if not self._selections:
            chosen = [files.selection for files in sweep.files_of(self.source, len(self.saes))]
            self._selections = [sweep.Selection.load(path).without_sums() for path in chosen]
        return self._selections

    def visit(self, number: int, part: range) -> None:
        """The examples of one part, in fp32."""
        paths, selections = [files.part(number) for files in self.files], self.selections
        reports = sweep.visit(self.lens, self.saes, self.rows, selections, part, self.cfg.harvest, paths, self.streams)
        before = self.so_far("visit")
        self.run.follow(relayed(reports, _within(before.done, before.total)))

    def features(self, index: int, n_parts: int) -> None:
        """What is said of every feature of an SAE."""
        self.run.report(Progress("features", index, len(self.saes), "SAEs"))
        files = self.files[index]
        chosen, parts = sweep.Selection.load(files.selection), self.parts(index, n_parts)
        self._table = index, sweep.features(self.lens, self.saes[index], chosen, parts, self.cfg.harvest, files.features)

    def parts(self, index: int, n_parts: int) -> list[Path]:
        """An SAE's files of the visit."""
        return [self.files[index].part(number) for number in range(n_parts)]

    def table(self, index: int) -> sweep.FeatureTable:
        """An SAE's features, as `features` left them."""
        if self._table is None or self._table[0] != index:
            self._table = index, sweep.FeatureTable.load(self.files[index].features)
        return self._table[1]

    def begin(self, index: int) -> int:
        """The harvest's row; its id."""
        return harvests.begin(
            self.run.worker.db,
            sae_id=self.records[index].id,
            corpus_id=self.corpus.id,
            job_id=self.run.id,
            config=self.cfg.harvest.model_dump(mode="json"),
            totals=self.table(index).totals,
            fence=self.run.fence,
        )

    def write_features(self, index: int, harvest_id: int, n_parts: int) -> None:
        """Every feature of an SAE."""
        self._writes(index, 0, n_parts)
        harvests.write_features(self.run.worker.db, harvest_id, self.table(index), self.run.fence)

    def write_heads(self, index: int, harvest_id: int) -> None:
        """What the features of an SAE say of each head."""
        found = heads.summaries(self.table(index), self.saes[index])
        harvests.write_heads(self.run.worker.db, harvest_id, found, self.run.fence)

    def write_part(self, index: int, harvest_id: int, number: int, n_parts: int) -> None:
        """The examples of one part."""
        self._writes(index, number + 1, n_parts)
        rows = sweep.row_records(self.table(index), self.parts(index, n_parts), number)
        harvests.write_part(self.run.worker.db, harvest_id, number, rows, self.run.fence)

    def search(self, harvest_id: int) -> None:
        """What is searched of an SAE's features."""
        search.write(self.run.worker.db, harvest_id, self.run.fence)

    def _writes(self, index: int, done: int, n_parts: int) -> None:
        each = n_parts + 1
        self.run.report(Progress("write", index * each + done, len(self.saes) * each, "parts"))

    def publish(self, index: int, harvest_id: int, n_parts: int) -> None:
        """Readers see it from now on."""
        settings, name = self.run.worker.settings, self.records[index].name
        harvests.publish(self.run.worker.db, harvest_id, n_parts, self.run.fence)
        self.run.say(f"Published: {settings.address}/saes/{name}.")


def _within(before: int, total: int) -> Callable[[Progress], Progress]:
    """A part's reports as reports of the whole, `before` of which was done already."""
    return lambda report: replace(report, done=before + report.done, total=total)


# ------------------------------------------------------------------------------------------------------ what both need


def _train_all(run: Run, cfgs: Sequence[TrainConfig], lens: Lens, rows: Rows) -> None:
    """Train, then see that the curves in the database are whole: a kill loses what was not written yet."""
    run.follow(_training(run, cfgs, lens, rows))
    for index in range(len(cfgs)):
        with run.write() as session:
            known = {step for step, _ in store.points(session, run.id, run=index)}
            curve = [
                (step, {of: value for of, value in values.items() if of not in NOT_TOLD})
                for step, values in curve_of(run.folder, index)
            ]
            missing = [(step, values) for step, values in curve if step not in known]
            store.add_points(session, run.id, run.attempt, missing, run=index)


def _training(run: Run, cfgs: Sequence[TrainConfig], lens: Lens, rows: Rows) -> Generator[Progress, None, list[SAE]]:
    """The SAEs' training, here or in as many processes as the settings say."""
    settings, name = run.worker.settings, cfgs[0].model
    if settings.processes == 1:
        return train_many(cfgs, lens, rows, run.folder, caches(settings.data))
    with run.worker.db.read() as session:
        source = registry.model(session, name).source
    return train_parallel(
        cfgs,
        partial(load_lens, source, name=name, cache=settings.cache),
        partial(Rows.open, rows.folder),
        run.folder,
        caches(settings.data),
        processes=settings.processes,
        device=str(lens.device),
    )


def _lens(run: Run, model: str) -> Lens:
    lens = run.worker.lens(model)
    with run.write() as session:
        registry.note_shape(session, model, lens.info)
    return lens


OfText = TrainConfig | HarvestJob | EvaluateJob | SpecificityStudy | InductionStudy | HeadsStudy


def _rows(run: Run, lens: Lens, corpus: str, cfg: OfText) -> Rows:
    with run.worker.db.read() as session:
        source, without = registry.corpus(session, corpus).source, removals.hashes(session, corpus)
    return run.follow(
        prepare_rows(
            source,
            cfg.rows,
            encode=lens.encode,
            row_start=lens.row_start,
            tokenizer_fingerprint=lens.tokenizer_fingerprint,
            folder=run.worker.settings.data / "rows",
            without=without,
        )
    )


def _activations(run: Run, folder: Path, lens: Lens, rows: Rows, cfg: TrainConfig) -> Activations | None:
    """What is left on disk of the activations that a training run in `folder` read."""
    store = activations_of(cfg, folder, caches(run.worker.settings.data))
    return Activations.open(store, cfg.site.layer, about(lens, rows, cfg))


def caches(data: Path) -> Path:
    """Where activation caches that have a name are."""
    return data / "activations"


def open_sae(data: Path, record: registry.SAERecord, lens: Lens) -> SAE:
    """The SAE's weights, on the model's device, when they fit the model."""
    sae = load_sae(data / record.folder, lens.device)
    check_fits(sae.cfg, lens.info, record.name)
    return sae


# ------------------------------------------------------------------------------------------------------------ the process


class Slot:
    """A worker's name, held by a file lock as long as its process lives. A restarted worker takes its old one again."""

    def __init__(self, name: str, file: IO[str]) -> None:
        self.name, self._file = name, file

    @classmethod
    def take(cls, settings: Settings) -> "Slot":
        """The slot that the settings name; unnamed, the first one that is free."""
        named = "worker_id" in settings.model_fields_set
        names = [settings.worker_id] if named else [f"worker-{n}" for n in range(64)]
        found = cls.first(settings, names)
        if found is None:
            raise SlotTaken(f"Another worker runs as {names[0]}; give this one another name with --id.", field="id")
        return found

    @classmethod
    def first(cls, settings: Settings, names: Sequence[str]) -> "Slot | None":
        """The first of the names that is free; None where each is taken."""
        folder = settings.data / "workers"
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            file = (folder / f"{jobs.slug(name)}.lock").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.close()
                continue
            return cls(name, file)
        return None

    def free(self) -> None:
        """Let another process have it."""
        self._file.close()


def take_gpu(settings: Settings, device: str) -> Slot | None:
    """One of the places that a GPU has for workers, held as long as the process lives; None on other devices.

    Raises SlotTaken where none is free.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return None
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    name = visible[int(index or 0)] if visible else index or "0"
    found = Slot.first(settings, [f"gpu-{socket.gethostname()}-{name}-{n}" for n in range(settings.gpu_workers)])
    if found is None:
        places = f"{settings.gpu_workers} worker{'s' if settings.gpu_workers > 1 else ''}"
        raise SlotTaken(
            f"{device} of this machine has {places} already, as many as HEADSCOPE_GPU_WORKERS allows; choose another device with "
            "--device, or set it higher.",
            field="device",
        )
    return found


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


def gpus() -> list[Gpu]:
    """Memory of the GPUs that this process has begun to use."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return []  # asking would take a few hundred MB of it
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(f"cuda:{index}", total - free, total, torch.cuda.memory_reserved(index)))
    return found


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
