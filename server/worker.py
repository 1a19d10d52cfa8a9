"""The worker: DBOS workflows that turn a job into work of `sae_core` and results in the store.

What happens to a training job, top to bottom:

    train      resolve model and corpus, load the model, cut rows, train           one durable step; it resumes itself
    evaluate   measure the SAE                                                     from <data>/jobs/<id>
    publish    move the SAE to <data>/saes/<name>, write its row
    follow     queue the config's harvests; each replaces the one before

A sweep trains many SAEs in one such step, then evaluates and publishes one after the other. An evaluation of an SAE that
exists measures it and puts the numbers in the place of the old ones. And what happens to a harvest: scan (a step per shard),
choose, visit (a step per part), features, write (a step per part), publish.

Steps run at least once, their effects appear once: every write checks in its own transaction that this attempt still owns
the job (`Fenced` otherwise), files are written aside and renamed, rows are found by job id. A worker's name is a slot with
a file lock; another worker takes the jobs of a slot that has been silent for a minute.
"""

import fcntl
import logging
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import sqlalchemy as sa
import torch
from dbos import DBOS, DBOSConfig, DBOSPortableJSONSerializer, PortableWorkflowError
from sqlalchemy.orm import Session

from sae_core import harvest as sweep
from sae_core import machine
from sae_core.activations import Activations, about
from sae_core.config import EvaluateJob, HarvestJob, SweepConfig, TrainConfig
from sae_core.corpus import Rows, prepare_rows
from sae_core.errors import Cancelled, DiskFull, Fenced, HeadscopeError, SAEMismatch, SlotTaken
from sae_core.evaluate import evaluate
from sae_core.lens import Lens, load_lens
from sae_core.parallel import check_processes, train_parallel
from sae_core.probes import read_texts
from sae_core.progress import Progress, relayed
from sae_core.saes import SAE, load_sae
from sae_core.stability import check_same_site
from sae_core.train import activations_of, curve_of, diverged, made_by, train_many
from server import doctor, estimates, jobs
from server.db import Database
from server.downloads import sha256_of
from server.estimates import Shape
from server.settings import Settings
from server.store import harvests, registry
from server.store import jobs as store
from server.store.jobs import JobRecord
from server.store.sweeps import run_names
from server.tracking import Tracker

log = logging.getLogger("headscope.worker")
R = TypeVar("R")

BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0  # after which a slot counts as dead
REPORT_SECONDS = 2.0  # between two writes of progress
AGAIN_SECONDS = 10.0  # between two tries to write to a database that refuses
RETAKE = 50  # times that a job is taken up before it counts as one that takes its worker down
NO_ROOM = (27, 28, 122)  # EFBIG, ENOSPC, EDQUOT
SAID = {
    "prepare": "Cutting the corpus into rows of tokens.",
    "collect": "Reading attention outputs.",
    "train": "Training.",
    "evaluate": "Evaluating on held-out rows and on repeated random tokens.",
    "scan": "Sweeping the corpus for firings.",
    "choose": "Choosing examples.",
    "visit": "Visiting the chosen rows with attention patterns.",
    "features": "Describing the features.",
    "write": "Writing to the database.",
}


class Leave(BaseException):
    """Stop working at a job here without ending it. Not an `Exception`, so that DBOS records no outcome."""


class Failed(Exception):
    """The job has been marked as failed; DBOS may record the step as such."""


# ------------------------------------------------------------------------------------------------------ one job's attempt


class Run:
    """One attempt of this worker at one job: its fenced writes, its progress, its durable steps."""

    def __init__(self, worker: "Worker", job: JobRecord, attempt: int) -> None:
        self.worker, self.job, self.attempt, self.id = worker, job, attempt, job.id
        self.folder = worker.settings.data / "jobs" / job.id
        self.clock = estimates.Clock({})
        kept, project = worker.settings.data / "logs", worker.settings.wandb
        self.tracker = Tracker(project, job.id, job.config, kept) if project and job.kind in ("train", "sweep") else None
        self._phase: str | None = None
        self._said: set[str] = set()
        self._stored = 0.0
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
        with self.worker.db.read() as session:
            store.still_ours(session, self.id, self.attempt)

    def step(self, name: str, work: Callable[[], R]) -> R:
        """A durable step: once recorded as done, it is not run again. It runs at least once."""
        return DBOS.run_step({"name": name}, self._guarded, work)

    def _guarded(self, work: Callable[[], R]) -> R:
        try:
            self.check()
            return work()
        except (Cancelled, Fenced) as error:
            raise Leave from error
        except Exception as error:
            self.fail(error)
            raise Failed(str(error)) from error

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
        """The job ends with a sentence."""
        log.error("%s failed", self.id, exc_info=error)
        while True:
            try:
                with self.worker.db.write() as session:
                    return store.fail(session, self.id, self.attempt, sentence(error, self.worker))
            except (Cancelled, Fenced) as other:
                raise Leave from other
            except sa.exc.OperationalError:  # a full disk, a database that is away: say it when it can be said
                log.exception("%s cannot be marked as failed now; trying again", self.id)
                if self.worker.stopping.wait(AGAIN_SECONDS):
                    raise Leave from error


def sentence(error: Exception, worker: "Worker") -> str:
    """What a person reads about `error`."""
    if isinstance(error, HeadscopeError):
        return str(error)
    if isinstance(error, PortableWorkflowError):
        return str(error.message)
    if (isinstance(error, OSError) and error.errno in NO_ROOM) or "disk is full" in str(error):
        return str(no_room(worker.settings))
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
    run.step("publish", lambda: _publish_sae(run, cfg, name, metrics))
    run.step("follow", lambda: _follow(run, cfg, name))


def _train(run: Run, cfg: TrainConfig) -> None:
    lens = _lens(run, cfg.model)
    lens.check_layer(cfg.site.layer)
    run.clock = estimates.Clock(estimates.train_seconds(cfg, Shape.of(lens.info), run.worker.speed))
    need = doctor.needs(cfg, Shape.of(lens.info), run.worker.speed).disk
    doctor.need_room(run.worker.settings.data, need - _size(run.folder))
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


def _publish_sae(run: Run, cfg: TrainConfig, name: str, metrics: dict[str, Any], index: int = 0) -> None:
    home, made = run.worker.settings.data / "saes" / name, made_by(run.folder, index)
    home.parent.mkdir(parents=True, exist_ok=True)
    if made.exists():  # else it was moved before a crash
        shutil.rmtree(home, ignore_errors=True)
        made.rename(home)
    sae, sha256 = load_sae(home), sha256_of(home / "sae.safetensors")
    with run.write() as session:
        registry.upsert_sae(
            session,
            job_id=run.id,
            run=index,
            name=name,
            model_id=registry.model(session, cfg.model).id,
            config=sae.cfg,
            metrics=metrics,
            folder=str(home.relative_to(run.worker.settings.data)),
            sha256=sha256,
        )
    run.say(f"The SAE is in {home}.")


def _follow(run: Run, cfg: TrainConfig, name: str) -> None:
    for config in cfg.harvests:
        job = HarvestJob(sae=name, corpus=cfg.corpus, rows=cfg.rows, harvest=config)
        model = run.worker.model_shape(cfg.model)
        seconds = estimates.harvest_seconds(config, cfg, model, run.worker.speed, cached=True) if model else {}
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
        run.step(f"publish {index}", partial(_publish_sae, run, one, name, metrics, index))
    for index, one, name in made:
        run.step(f"follow {index}", partial(_follow, run, one, name))
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
    doctor.need_room(run.worker.settings.data, need - _size(run.folder))
    rows = _rows(run, lens, cfg.base.corpus, cfg.base)
    run.say(f"{len(runs)} SAEs are trained on one stream of activations.")
    _train_all(run, runs, lens, rows)
    lost = [index for index in range(len(runs)) if diverged(run.folder, index)]
    return {"n_layers": lens.info.n_layers, "diverged": lost}


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


# ----------------------------------------------------------------------------------------------------------- harvest job


def harvest_job(run: Run) -> None:
    """One sweep, from rows to a published harvest. What each step needs is read from disk again if the worker is new."""
    cfg = HarvestJob.model_validate(run.job.config)
    hand = _Hands(run, cfg)
    files, config = sweep.Files(run.folder), cfg.harvest

    # ---- sweep and choose ----
    shards = sweep.shards(hand.n_rows, config)
    for shard in shards:
        run.step(f"scan {shard.start}", partial(hand.scan, shard, files.shard(shard)))
    run.step("choose", lambda: hand.choose([files.shard(shard) for shard in shards], files.selection))

    # ---- visit and describe ----
    parts = sweep.visit_parts([hand.selection(files.selection)], config)
    paths = [files.part(index) for index in range(len(parts))]
    for part, path in zip(parts, paths, strict=True):
        run.step(f"visit {part.start}", partial(hand.visit, files.selection, part, path))
    run.step("features", lambda: hand.features(files, paths))

    # ---- write and publish ----
    harvest_id = run.step("begin", lambda: hand.begin(files))
    run.step("write features", lambda: hand.write_features(harvest_id, files, len(paths)))
    for index in range(len(paths)):
        run.step(f"write {index}", partial(hand.write_part, harvest_id, files, paths, index))
    run.step("publish", lambda: hand.publish(harvest_id, len(paths)))


class _Hands:
    """What a harvest's steps hold: model, SAE, rows; opened once per attempt."""

    def __init__(self, run: Run, cfg: HarvestJob) -> None:
        self.run, self.cfg, worker = run, cfg, run.worker
        with worker.db.read() as session:
            self.record = registry.sae(session, cfg.sae)
            self.corpus = registry.corpus(session, cfg.corpus)
            model = registry.model_by_id(session, self.record.model_id)
        self.lens = _lens(run, model.name)
        self.sae = open_sae(worker.settings.data, self.record, self.lens)
        train = self.record.config.train
        parent = worker.settings.data / "jobs" / (self.record.job_id or "none")
        same_rows = train is not None and train.corpus == cfg.corpus and train.rows == cfg.rows
        self.rows = _rows(run, self.lens, cfg.corpus, cfg)
        self.activations = _activations(run, parent, self.lens, self.rows, train) if train is not None and same_rows else None
        if train is not None:
            expected = estimates.harvest_seconds(
                cfg.harvest, train, Shape.of(self.lens.info), worker.speed, cached=self.activations is not None
            )
            run.clock = estimates.Clock(expected)
        self.n_rows = sweep.swept_rows(self.rows, cfg.harvest)
        self._chosen: sweep.Selection | None = None
        self._table: sweep.FeatureTable | None = None

    def scan(self, shard: range, path: Path) -> None:
        """One shard of the sweep."""
        context = self.rows.context
        reports = sweep.scan_shard(self.lens, self.sae, self.rows, shard, self.cfg.harvest, path, self.activations)
        self.run.follow(relayed(reports, _within(shard.start * context, self.n_rows * context)))

    def choose(self, shards: list[Path], path: Path) -> None:
        """Merge the shards and choose examples."""
        self.run.report(Progress("choose", 0, 1, "steps"))
        self._chosen = sweep.choose(shards, self.sae, self.rows, self.cfg.harvest, path)

    def selection(self, path: Path) -> sweep.Selection:
        """What was chosen."""
        if self._chosen is None:
            self._chosen = sweep.Selection.load(path)
        return self._chosen

    def visit(self, selection: Path, part: range, path: Path) -> None:
        """The examples of one part, in fp32."""
        chosen = self.selection(selection)
        reports = sweep.visit(self.lens, [self.sae], self.rows, [chosen], part, self.cfg.harvest, [path])
        self.run.follow(relayed(reports, _within(part.start, len(chosen.rows))))

    def features(self, files: sweep.Files, parts: list[Path]) -> None:
        """What is said of every feature."""
        self.run.report(Progress("features", 0, 1, "steps"))
        chosen = self.selection(files.selection)
        self._table = sweep.features(self.lens, self.sae, chosen, parts, self.cfg.harvest, files.features)

    def table(self, files: sweep.Files) -> sweep.FeatureTable:
        """The features, as `features` left them."""
        if self._table is None:
            self._table = sweep.FeatureTable.load(files.features)
        return self._table

    def begin(self, files: sweep.Files) -> int:
        """The harvest's row; its id."""
        return harvests.begin(
            self.run.worker.db,
            sae_id=self.record.id,
            corpus_id=self.corpus.id,
            job_id=self.run.id,
            config=self.cfg.harvest.model_dump(mode="json"),
            totals=self.table(files).totals,
            fence=self.run.fence,
        )

    def write_features(self, harvest_id: int, files: sweep.Files, n_parts: int) -> None:
        """Every feature."""
        self.run.report(Progress("write", 0, n_parts + 1, "parts"))
        harvests.write_features(self.run.worker.db, harvest_id, self.table(files), self.run.fence)

    def write_part(self, harvest_id: int, files: sweep.Files, paths: list[Path], index: int) -> None:
        """The examples of one part."""
        self.run.report(Progress("write", index + 1, len(paths) + 1, "parts"))
        rows = sweep.row_records(self.table(files), paths, index)
        harvests.write_part(self.run.worker.db, harvest_id, index, rows, self.run.fence)

    def publish(self, harvest_id: int, n_parts: int) -> None:
        """Readers see it from now on."""
        harvests.publish(self.run.worker.db, harvest_id, n_parts, self.run.fence)
        self.run.say(f"Published: http://{self.run.worker.settings.host}:{self.run.worker.settings.port}/saes/{self.cfg.sae}.")


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
            missing = [(step, values) for step, values in curve_of(run.folder, index) if step not in known]
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


def _rows(run: Run, lens: Lens, corpus: str, cfg: TrainConfig | HarvestJob | EvaluateJob) -> Rows:
    with run.worker.db.read() as session:
        source = registry.corpus(session, corpus).source
    return run.follow(
        prepare_rows(
            source,
            cfg.rows,
            encode=lens.encode,
            row_start=lens.row_start,
            tokenizer_fingerprint=lens.tokenizer_fingerprint,
            folder=run.worker.settings.data / "rows",
        )
    )


def _activations(run: Run, folder: Path, lens: Lens, rows: Rows, cfg: TrainConfig) -> Activations | None:
    """What is left on disk of the activations that a training run in `folder` read."""
    store = activations_of(cfg, folder, caches(run.worker.settings.data))
    return Activations.open(store, cfg.site.layer, about(lens, rows, cfg))


def caches(data: Path) -> Path:
    """Where activation caches that have a name are."""
    return data / "activations"


def _size(folder: Path) -> int:
    """Bytes that the folder takes on disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def open_sae(data: Path, record: registry.SAERecord, lens: Lens) -> SAE:
    """The SAE's weights, on the model's device, when they fit the model."""
    sae = load_sae(data / record.folder, lens.device)
    if sae.cfg.d_in != lens.info.d_in or sae.cfg.model_fingerprint != lens.info.fingerprint:
        raise SAEMismatch(
            f"The SAE {record.name} was trained on other weights than those of {lens.info.name} now; "
            "put the old weights back, or train a new SAE.",
            field="sae",
        )
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
        raise SlotTaken(f"Another worker runs as {names[0]}; give this one another name with --id.", field="id")

    def free(self) -> None:
        """Let another process have it."""
        self._file.close()


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
        self._loaded: tuple[registry.ModelRecord, Lens] | None = None
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    @property
    def busy(self) -> bool:
        """Whether a job is worked at."""
        return self._busy.locked()

    def start(self) -> None:
        """Take the slot's unfinished jobs up again, then take new ones from the queue."""
        global _worker
        assert _worker is None, "one worker per process: DBOS is a singleton"
        _worker = self
        _log_to(self.log_path)
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
        DBOS(config=config)
        DBOS.launch()
        DBOS.register_queue(jobs.QUEUE, worker_concurrency=1, polling_interval_sec=0.5)
        tidy(self.settings.data, self.db)
        self.jobs.release()
        self._heart.start()
        log.info("%s takes jobs on %s", self.slot.name, self.device)

    def close(self) -> None:
        """Stop at the next batch, keep what is needed to go on, and free the slot."""
        global _worker
        self.stopping.set()
        with self._busy:
            DBOS.destroy()
        self._heart.join()
        with self.db.write() as session:
            store.leave(session, self.slot.name)
        self.jobs.close()
        self.slot.free()
        _worker = None
        log.info("%s has stopped", self.slot.name)

    def work(self, job_id: str, tell: Callable[[Run], None]) -> str:
        """Make an attempt at a job; the status it ends with."""
        with self._busy:
            if self.stopping.is_set():
                raise Leave
            try:
                with self.db.write() as session:
                    attempt = store.start_attempt(session, job_id, self.slot.name)
            except Cancelled:
                return "ended before"
            run = Run(self, self.jobs.get(job_id), attempt)
            try:
                if attempt % RETAKE == 0:
                    raise HeadscopeError(f"It was taken up {RETAKE} times and never ended; see the worker's log.")
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
                if run.tracker:
                    run.tracker.close()
                if not self.stopping.is_set():
                    self.jobs.release()  # what waited for this job may start
            return "done"

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
        while not self.stopping.wait(BEAT_SECONDS):
            try:
                with self.db.write() as session:
                    store.beat(session, self.slot.name, self.device, os.getpid())
                    silent = store.silent_workers(session, SILENT_SECONDS)
                for slot in silent:
                    take_over(slot, self.db)
                if silent:
                    self.jobs.release()
            except Exception:  # a database that is away for a while must not stop the heart
                log.exception("the heartbeat failed; trying again")


def tidy(data: Path, db: Database) -> None:
    """Give back the disk of jobs that are done: their folders, unless a job that follows will still read them."""
    for folder in (data / "jobs").glob("*"):
        with db.read() as session:
            job = store.find(session, folder.name)
            followers = store.children(session, folder.name)
        if job and job.status == store.DONE and all(follower.ended for follower in followers):
            shutil.rmtree(folder, ignore_errors=True)


def take_over(slot: str, db: Database) -> int:
    """Put the jobs of a dead slot back into the queue; how many there were.

    DBOS does this by itself only with its commercial service; the call is private, hence the pinned minor version and
    this one place. A worker that was only asleep is shut out by its attempt number.
    """
    moved = DBOS._recover_pending_workflows([slot])
    with db.write() as session:
        store.leave(session, slot)
    log.warning("%s has been silent for %d seconds; took over %d jobs", slot, SILENT_SECONDS, len(moved))
    return len(moved)


_worker: Worker | None = None


@DBOS.workflow(name="train", max_recovery_attempts=None)
def train_workflow(job_id: str) -> str:
    """DBOS's entry to `train_job`."""
    assert _worker is not None
    return _worker.work(job_id, train_job)


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


@DBOS.workflow(name="harvest", max_recovery_attempts=None)
def harvest_workflow(job_id: str) -> str:
    """DBOS's entry to `harvest_job`."""
    assert _worker is not None
    return _worker.work(job_id, harvest_job)


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
    worker.start()
    stop.wait()
    worker.close()


def _log_to(path: Path) -> None:
    """Ours and DBOS's important lines go to the worker's log file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    jobs.quiet()
    for name, level in (("headscope", logging.INFO), ("dbos", logging.WARNING)):
        logger = logging.getLogger(name)
        for old in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
            logger.removeHandler(old)
            old.close()
        logger.addHandler(handler)
        logger.setLevel(level)
