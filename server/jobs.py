"""Enqueue, cancel and run jobs again: a thin face over DBOS, which holds the queue and the durable steps. No torch.

A job is two rows: ours (`job`), which people see and which fences what workers write, and DBOS's workflow of the same
id, which says who runs it and which steps are done. Ours is written first; `release()` gives DBOS whatever it lacks, so a
crash between the two loses nothing. Enqueueing an id that exists changes nothing in either.
"""

import logging
import re
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.config import (
    AS_USUAL,
    AnyStudy,
    CompareJob,
    DashboardsJob,
    EvaluateJob,
    HarvestJob,
    ImportJob,
    InductionStudy,
    IoiStudy,
    SaeStudy,
    SpecificityStudy,
    SweepConfig,
    TrainConfig,
    Wishes,
    said,
)  # fmt: skip
from sae_core.errors import DatabaseTooOld, LayerOutOfRange, NotFound, SAEMismatch, UsageError
from server.db import Database
from server.settings import Settings
from server.store import jobs as store
from server.store import registry
from server.store.jobs import JobRecord
from server.store.sweeps import run_names, sweep_name

if TYPE_CHECKING:
    from dbos import DBOSClient, EnqueueOptions

# DBOS is loaded by what first asks the queue something: it takes a fifth of a second, and a web process that starts asks nothing.
APP = "headscope"
VERSION = "3"  # of the workflows: raise it when their steps change, so that old jobs are not resumed by new code
QUEUE = "gpu"
"""Of jobs that any worker may do; `queue_of` names those of jobs for one kind of device."""
OPEN = ("ENQUEUED", "PENDING", "DELAYED")
"""DBOS's words for a workflow that has not ended."""
NAME_LENGTH = 60
TITLE_LENGTH = 300
SWEEP_NAME_LENGTH = 36  # what tells a run from its siblings is added to it, and both must fit a harvest's id
MANY_LAYERS = 200  # more than any model has, while it is not known how many this one has


class Jobs:
    """What the web and the command line do with jobs."""

    def __init__(self, settings: Settings, db: Database, wishes: Wishes = AS_USUAL) -> None:
        self._settings, self._db, self._wishes = settings, db, wishes

    def _create(
        self,
        session: Session,
        job_id: str,
        kind: str,
        title: str,
        config: dict[str, Any],
        *,
        parent_id: str | None = None,
        seconds_left: float | None = None,
    ) -> None:
        limit = self._settings.job_time_limit if self._wishes.time_limit is None else self._wishes.time_limit
        wishes = self._wishes.model_copy(update={"time_limit": limit})
        store.create(session, job_id, kind, title, config, parent_id=parent_id, seconds_left=seconds_left, wishes=wishes)

    def enqueue_train(self, cfg: TrainConfig, *, name: str | None = None) -> str:
        """Queue a training run and give its id. `name` is the SAE's; left out, it tells model, layer and config."""
        with self._db.write() as session:
            model = registry.model(session, cfg.model)
            registry.corpus(session, cfg.corpus)
            check_shape(model.name, model, (cfg,))
            base = slug(name) if name else default_name(cfg)
            job_id = free_id("train", base, store.ids_like(session, f"train-{base}-"), names_taken(session))
            title = f"Train {sae_name(job_id)} on {cfg.model}, layer {cfg.site.layer}"
            self._create(session, job_id, "train", title, cfg.model_dump(mode="json"))
        self.release()
        return job_id

    def enqueue_import(self, cfg: ImportJob, *, name: str | None = None) -> str:
        """Queue the conversion of a peer's SAE and give the job's id. `name` is what it is called here; left out, it tells where
        it is from."""
        with self._db.write() as session:
            model = registry.model(session, cfg.model)
            if cfg.layer is not None:
                check_layer(model.name, model, cfg.layer)
            base = slug(name or cfg.location.rstrip("/").removesuffix(".pt").removesuffix("/params.npz"))
            job_id = free_id("import", base, store.ids_like(session, f"import-{base}-"), names_taken(session))
            title = f"Import {sae_name(job_id)} for {cfg.model}"
            self._create(session, job_id, "import", title, cfg.model_dump(mode="json"))
        self.release()
        return job_id

    def enqueue_dashboards(self, cfg: DashboardsJob) -> str:
        """Queue dashboards to be made a harvest and give the job's id: asked twice, it runs once."""
        job_id = f"dashboards-{cfg.sae}-{cfg.hash()}"
        with self._db.write() as session:
            registry.sae(session, cfg.sae)
            title = f"Import dashboards of {cfg.sae}"
            self._create(session, job_id, "import", title, cfg.model_dump(mode="json"))
        self.release()
        return job_id

    def enqueue_sweep(self, cfg: SweepConfig, *, name: str | None = None) -> str:
        """Queue many training runs on one stream of activations and give the job's id. `name` is the sweep's; its SAEs are
        called by it and by what tells each from the others."""
        with self._db.write() as session:
            model = registry.model(session, cfg.base.model)
            registry.corpus(session, cfg.base.corpus)
            runs = cfg.runs(model.n_layers or MANY_LAYERS)
            check_shape(model.name, model, runs)
            base = (slug(name) if name else default_sweep_name(cfg))[:SWEEP_NAME_LENGTH].rstrip("-._")
            taken, names = store.ids_like(session, f"sweep-{base}-"), names_taken(session)
            n = next(
                n
                for n in range(1, 10**6)
                if (job_id := f"sweep-{base}-{n}") not in taken and names.isdisjoint(run_names(job_id, cfg, runs))
            )
            job_id = f"sweep-{base}-{n}"
            known = cfg.layers != "all" or model.n_layers is not None
            title = f"Sweep {sweep_name(job_id)}: {f'{len(runs)} SAEs' if known else 'SAEs'} on {cfg.base.model}, {_layers(cfg)}"
            self._create(session, job_id, "sweep", title, cfg.model_dump(mode="json"))
        self.release()
        return job_id

    def enqueue_harvest(self, cfg: HarvestJob, parent: str | None = None, *, seconds_left: float | None = None) -> str:
        """Queue a harvest and give its id, which follows from the SAEs and the config: asked twice, it runs once.

        Raises UsageError where the SAEs read different models.
        """
        job_id = harvest_id(cfg)
        with self._db.write() as session:
            models = {(record := registry.sae(session, name)).model_id: record.name for name in cfg.saes}
            if len(models) > 1:
                names = " and ".join(sorted(models.values())[:2])
                raise UsageError(
                    f"{names} read different models, and a harvest is one pass through one; harvest each on its own.", field="sae"
                )
            registry.corpus(session, cfg.corpus)
            swept = (
                cfg.saes[0]
                if len(cfg.saes) == 1
                else f"{len(cfg.saes)} SAEs of {registry.model_by_id(session, next(iter(models))).name}"
            )
            title = f"Harvest {swept} over {cfg.harvest.tokens:,} tokens of {cfg.corpus}"
            self._create(
                session, job_id, "harvest", title, cfg.model_dump(mode="json"), parent_id=parent, seconds_left=seconds_left
            )
        self.release()
        return job_id

    def enqueue_evaluate(self, cfg: EvaluateJob, *, seconds_left: float | None = None) -> str:
        """Queue a measurement of an SAE that exists and give its id. Asked again after it has ended, it is made again: another
        one may have replaced its numbers meanwhile."""
        with self._db.write() as session:
            for name in (cfg.sae, *cfg.against):
                registry.sae(session, name)
            registry.corpus(session, cfg.corpus)
            base = f"evaluate-{cfg.sae}-{cfg.hash()}"
            n = 1 + store.n_ended(session, f"{base}-")
            title = f"Evaluate {cfg.sae} on {cfg.corpus}"
            self._create(session, f"{base}-{n}", "evaluate", title, cfg.model_dump(mode="json"), seconds_left=seconds_left)
        self.release()
        return f"{base}-{n}"

    def enqueue_study(self, cfg: AnyStudy) -> str:
        """Queue a study and give its id, which follows from the config: asked twice, it runs once."""
        job_id = study_id(cfg)
        with self._db.write() as session:
            if isinstance(cfg, SpecificityStudy):
                check_feature(registry.sae(session, cfg.sae), cfg.feature)
                title = f"Feature {cfg.feature} of {cfg.sae} against: {said(cfg.proxies)}"
            elif isinstance(cfg, SaeStudy):
                model = registry.model_by_id(session, registry.sae(session, cfg.sae).model_id)
                for layer in cfg.layers if isinstance(cfg, IoiStudy) else ():
                    check_layer(model.name, model, layer)
                what = "Indirect object" if isinstance(cfg, IoiStudy) else "Induction features and their prefixes"
                title = f"{what}: {cfg.sae}"
            else:
                model = registry.model(session, cfg.model)
                for layer in () if cfg.layers == "all" else cfg.layers:
                    check_layer(model.name, model, layer)
                what = "Induction heads" if isinstance(cfg, InductionStudy) else "What heads do: those"
                title = f"{what} of {cfg.model}, {_named(cfg.layers)}"
            corpus = None if isinstance(cfg, SaeStudy) else cfg.corpus
            if corpus is not None:
                registry.corpus(session, corpus)
            shown = title if len(title) <= TITLE_LENGTH else f"{title[: TITLE_LENGTH - 1]}…"
            self._create(session, job_id, "study", shown, cfg.model_dump(mode="json"))
        self.release()
        return job_id

    def enqueue_compare(self, cfg: CompareJob) -> str:
        """Queue the matching of two SAEs' features and give the job's id, which follows from their harvests: asked twice, it
        runs once, and again after a new harvest.

        Raises SAEMismatch where they read different sites.
        """
        with self._db.write() as session:
            ours, theirs = (registry.sae(session, name) for name in (cfg.sae, cfg.against))
            check_same_coordinates(ours, theirs)
            seen = sorted(id for id in registry.harvests_of(session, (ours.id, theirs.id)))
            job_id = f"compare-{ours.id}-{theirs.id}-{'-'.join(map(str, seen)) or 'all'}"
            title = f"Match features of {cfg.sae} and {cfg.against}"
            self._create(session, job_id, "compare", title, cfg.model_dump(mode="json"))
        self.release()
        return job_id

    def cancel(self, job_id: str) -> JobRecord:
        """Cancel a job, queued or running; a worker that runs it notices at its next batch. An ended job stays as it is."""
        with self._db.write() as session:
            cancelled = store.cancel(session, job_id)
        if cancelled:
            self.client.cancel_workflow(job_id)
            self.release()
        return self.get(job_id)

    def retry(self, job_id: str, *, even_done: bool = False) -> JobRecord:
        """Run a failed or cancelled job again, from what it left on disk; `even_done`, when what it made was deleted."""
        with self._db.write() as session:
            store.requeue(session, job_id, even_done=even_done)
        self.client.delete_workflow(job_id)  # DBOS keeps an ended workflow's id; a fresh one may not reuse it
        self.release()
        return self.get(job_id)

    def get(self, job_id: str) -> JobRecord:
        """The job; `UnknownJob` without one."""
        with self._db.read() as session:
            return store.get(session, job_id)

    def list(self, limit: int = 100) -> list[JobRecord]:
        """Jobs, newest first."""
        with self._db.read() as session:
            return store.newest(session, limit)

    def worker_alive(self) -> bool:
        """Whether any worker has been heard lately."""
        with self._db.read() as session:
            return bool(store.workers(session, seen_within=20))

    def forget_workers(self) -> None:
        """No worker is alive: those that a backup names are of another machine."""
        with self._db.write() as session:
            for worker in store.workers(session):
                store.leave(session, worker.id)

    def release(self) -> None:
        """Hand DBOS every queued job that may start and that it does not have yet; anew, what it ended or holds for an older
        version of us: a job that is queued has nobody who works at it, and what it left on disk is found again."""
        with self._db.read() as session:
            ready = store.ready(session)
        if not ready:
            return
        found = self.client.list_workflows(workflow_ids=[job.id for job in ready], load_input=False, load_output=False)
        held = {workflow.workflow_id: workflow for workflow in found}
        for job in ready:
            workflow = held.get(job.id)
            if workflow is not None and workflow.status in OPEN and workflow.app_version == VERSION:
                continue
            if workflow is not None:
                self.client.delete_workflow(job.id)
            options: EnqueueOptions = {
                "queue_name": queue_of(job.only_on), "workflow_name": job.kind, "workflow_id": job.id, "app_version": VERSION,
                "priority": job.priority,
            }  # fmt: skip
            self.client.enqueue(options, job.id)

    def gone(self) -> set[str]:
        """Workers that have left, or were thought dead, and still hold a job, by our book or by DBOS's: who was asked to leave in
        the middle of one, perhaps for an upgrade, need not come back for it."""
        held = self.client.list_workflows(status="PENDING", load_input=False, load_output=False)  # before who is there is asked
        with self._db.read() as session:
            there = {worker.id for worker in store.workers(session)}
            return ({workflow.executor_id for workflow in held if workflow.executor_id} | store.at_work(session)) - there

    def settle(self, *, restored: bool = False) -> tuple[str, ...]:
        """Put into today's queue the open jobs that no worker of today would take, and name them: those that an older version of
        the workflows queued or began; `restored`, after a backup was put back, every open job, since the two databases were not
        read at one moment. What was running begins anew, from what is on disk of it."""
        flows = self.client.list_workflows(status=["ENQUEUED", "PENDING", "DELAYED"], load_input=False, load_output=False)
        old = {flow.workflow_id for flow in flows if flow.app_version != VERSION}
        why = "it was put back from a backup." if restored else "this version of Headscope takes its steps differently."
        with self._db.write() as session:
            moved = [job.id for job in store.all_open(session) if restored or job.id in old]
            for job_id in moved:
                store.give_back(session, job_id, why)
        gone = [flow.workflow_id for flow in flows] if restored else []
        for job_id in dict.fromkeys([*moved, *gone]):
            self.client.delete_workflow(job_id)
        self.release()
        return tuple(moved)

    @cached_property
    def client(self) -> "DBOSClient":
        """DBOS from outside: it only writes to the queue."""
        from dbos import DBOSClient, DBOSPortableJSONSerializer, error

        quiet()
        try:
            client = DBOSClient(
                system_database_url=self._settings.jobs_url,
                serializer=DBOSPortableJSONSerializer(),
                application_name=APP,
                retry_connection_errors=False,
            )
            client.list_workflows(limit=1, load_input=False, load_output=False)
        except (sa.exc.DBAPIError, error.DBOSException) as what:
            raise DatabaseTooOld("The job queue's tables are missing or old; run `headscope db upgrade`.") from what
        return client

    def close(self) -> None:
        """Give the queue's connections back."""
        if "client" in self.__dict__:
            self.client.destroy()
            del self.client


def queue_of(device: str | None) -> str:
    """The queue of jobs for one kind of device, or for any."""
    return f"{QUEUE}-only-{device}" if device else QUEUE


def upgrade(settings: Settings, db: Database) -> None:
    """Bring both databases, ours and DBOS's, to the newest version."""
    from dbos import DBOS

    db.refuse_newer()
    quiet()
    DBOS.migrate(settings.jobs_url)
    db.upgrade()  # last: who waits for it to be up to date needs both
    queue = Jobs(settings, db)
    try:
        queue.settle()
    finally:
        queue.close()


def quiet() -> None:
    """Keep DBOS's own messages off the terminal; a worker sends the important ones to its log file."""
    logger = logging.getLogger("dbos")
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())


def slug(text: str) -> str:
    """`text` as a name that fits an address, a folder and a job id."""
    short = text.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^a-z0-9._]+", "-", short.lower()).strip("-._")[:NAME_LENGTH] or "sae"


def default_name(cfg: TrainConfig) -> str:
    """A name that tells what the SAE reads, and changes with any setting."""
    return f"{slug(cfg.model)[:36]}-l{cfg.site.layer}-{cfg.hash()[:6]}"


def default_sweep_name(cfg: SweepConfig) -> str:
    """The same for a sweep."""
    return f"{slug(cfg.base.model)[:24].rstrip('-._')}-{cfg.hash()[:6]}"


def free_id(kind: str, base: str, taken: Collection[str], names: Collection[str]) -> str:
    """The first id of a job that makes an SAE whose name is free too."""
    ids = (f"{kind}-{base}-{n}" for n in range(1, 10**6))
    return next(job_id for job_id in ids if job_id not in taken and sae_name(job_id) not in names)


def sae_name(job_id: str) -> str:
    """The name of the SAE that a training or an import makes: `train-x-1` makes `x`, `train-x-2` makes `x-2`."""
    base, n = job_id.split("-", 1)[1].rsplit("-", 1)
    return base if n == "1" else f"{base}-{n}"


def names_taken(session: Session) -> set[str]:
    """Names of the SAEs that are there, and of those that open jobs will make."""
    names = registry.sae_names(session)
    for job in store.all_open(session):
        if job.id.startswith(("train-", "import-")):
            names.add(sae_name(job.id))
        elif job.kind == "sweep":
            cfg = SweepConfig.model_validate(job.config)
            names.update(run_names(job.id, cfg, cfg.runs(registry.model(session, cfg.base.model).n_layers or MANY_LAYERS)))
    return names


class Shape(Protocol):
    """What may be known of a model before it is loaded."""

    @property
    def n_layers(self) -> int | None: ...
    @property
    def n_heads(self) -> int | None: ...
    @property
    def d_head(self) -> int | None: ...


def check_shape(name: str, model: Shape, runs: Sequence[TrainConfig]) -> None:
    """Refuse, as far as the model is known, a layer that it lacks and an SAE with fewer features than may be active."""
    for run in runs:
        check_layer(name, model, run.site.layer)
        if model.n_heads is not None and model.d_head is not None:
            run.check_width(model.n_heads * model.d_head)


def check_layer(name: str, model: Shape, layer: int) -> None:
    """Refuse, as far as the model is known, a layer that it lacks."""
    if model.n_layers is not None and layer >= model.n_layers:
        raise LayerOutOfRange(f"{name} has layers 0 to {model.n_layers - 1}; there is no layer {layer}.", field="layer")


def check_same_coordinates(ours: registry.SAERecord, theirs: registry.SAERecord) -> None:
    """Refuse to match SAEs that read different sites: their directions live in different spaces."""
    a, b = ours.config, theirs.config
    if (a.model_fingerprint, a.site, a.d_in) != (b.model_fingerprint, b.site, b.d_in):
        raise SAEMismatch(
            f"{theirs.name} reads layer {b.site.layer} of {b.model}, not layer {a.site.layer} of {a.model}, so their features "
            "cannot be matched; choose two SAEs of one site.",
            field="against",
        )


def check_feature(sae: registry.SAERecord, feature: int) -> None:
    """Refuse a feature that the SAE lacks."""
    if feature >= sae.config.d_sae:
        raise NotFound(
            f"{sae.name} has {sae.config.d_sae:,} features, counted from 0, so there is no feature {feature}.", field="feature"
        )


def _layers(cfg: SweepConfig) -> str:
    return _named(cfg.layers if cfg.layers == "all" else cfg.layers or (cfg.base.site.layer,))


def _named(layers: Sequence[int] | str) -> str:
    if isinstance(layers, str):
        return "all layers"
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def study_id(cfg: AnyStudy) -> str:
    """The one id of this study."""
    if isinstance(cfg, SpecificityStudy):
        of = f"{cfg.sae}-{cfg.feature}"
    else:
        of = slug(cfg.sae if isinstance(cfg, SaeStudy) else cfg.model)
    return f"study-{of}-{cfg.hash()}"


def harvest_id(cfg: HarvestJob) -> str:
    """The one id of this harvest of these SAEs."""
    return f"harvest-{cfg.saes[0] if len(cfg.saes) == 1 else f'{len(cfg.saes)}-saes'}-{cfg.hash()}"
