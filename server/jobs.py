"""Enqueue, cancel and run jobs again: a thin face over DBOS, which holds the queue and the durable steps. No torch.

A job is two rows: ours (`job`), which people see and which fences what workers write, and DBOS's workflow of the same
id, which says who runs it and which steps are done. Ours is written first; `release()` gives DBOS whatever it lacks, so a
crash between the two loses nothing. Enqueueing an id that exists changes nothing in either.
"""

import logging
import re
from functools import cached_property

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer, EnqueueOptions
from dbos import error as dbos_error

from sae_core.config import HarvestJob, TrainConfig
from sae_core.errors import DatabaseTooOld, LayerOutOfRange
from server.db import Database
from server.settings import Settings
from server.store import jobs as store
from server.store import registry
from server.store.jobs import JobRecord

APP = "headscope"
VERSION = "1"  # of the workflows: raise it when their steps change, so that old jobs are not resumed by new code
QUEUE = "gpu"
PRIORITY = {"harvest": 1, "train": 2}  # what a person waits for comes before new work
NAME_LENGTH = 60


class Jobs:
    """What the web and the command line do with jobs."""

    def __init__(self, settings: Settings, db: Database) -> None:
        self._settings, self._db = settings, db

    def enqueue_train(self, cfg: TrainConfig, *, name: str | None = None) -> str:
        """Queue a training run and give its id. `name` is the SAE's; left out, it tells model, layer and config."""
        with self._db.write() as session:
            model = registry.model(session, cfg.model)
            registry.corpus(session, cfg.corpus)
            if model.n_layers is not None and cfg.site.layer >= model.n_layers:
                raise LayerOutOfRange(
                    f"{cfg.model} has layers 0 to {model.n_layers - 1}; there is no layer {cfg.site.layer}.", field="layer"
                )
            base = slug(name) if name else default_name(cfg)
            taken = store.ids_like(session, f"train-{base}-")
            names = registry.sae_names(session)
            n = next(
                n for n in range(1, 10**6) if f"train-{base}-{n}" not in taken and sae_name(f"train-{base}-{n}") not in names
            )
            job_id = f"train-{base}-{n}"
            title = f"Train {sae_name(job_id)} on {cfg.model}, layer {cfg.site.layer}"
            store.create(session, job_id, "train", title, cfg.model_dump(mode="json"))
        self.release()
        return job_id

    def enqueue_harvest(self, cfg: HarvestJob, parent: str | None = None, *, seconds_left: float | None = None) -> str:
        """Queue a harvest and give its id, which follows from the SAE and the config: asked twice, it runs once."""
        job_id = harvest_id(cfg)
        with self._db.write() as session:
            registry.sae(session, cfg.sae)
            registry.corpus(session, cfg.corpus)
            title = f"Harvest {cfg.sae} over {cfg.harvest.tokens:,} tokens of {cfg.corpus}"
            store.create(
                session, job_id, "harvest", title, cfg.model_dump(mode="json"), parent_id=parent, seconds_left=seconds_left
            )
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

    def retry(self, job_id: str) -> JobRecord:
        """Run a failed or cancelled job again, from what it left on disk."""
        with self._db.write() as session:
            store.requeue(session, job_id)
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

    def release(self) -> None:
        """Hand DBOS every queued job that may start and that it does not have yet."""
        with self._db.read() as session:
            ready = store.ready(session)
        for job in ready:
            options = EnqueueOptions(
                queue_name=QUEUE, workflow_name=job.kind, workflow_id=job.id, app_version=VERSION, priority=PRIORITY[job.kind]
            )
            self.client.enqueue(options, job.id)

    @cached_property
    def client(self) -> DBOSClient:
        """DBOS from outside: it only writes to the queue."""
        quiet()
        try:
            client = DBOSClient(
                system_database_url=self._settings.jobs_url,
                serializer=DBOSPortableJSONSerializer(),
                application_name=APP,
                retry_connection_errors=False,
            )
            client.list_workflows(limit=1, load_input=False, load_output=False)
        except (sa.exc.DBAPIError, dbos_error.DBOSException) as error:
            raise DatabaseTooOld("The job queue's tables are missing or old; run `headscope db upgrade`.") from error
        return client

    def close(self) -> None:
        """Give the queue's connections back."""
        if "client" in self.__dict__:
            self.client.destroy()
            del self.client


def upgrade(settings: Settings, db: Database) -> None:
    """Bring both databases, ours and DBOS's, to the newest version."""
    db.upgrade()
    quiet()
    DBOS.migrate(settings.jobs_url)


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


def sae_name(train_id: str) -> str:
    """The name of the SAE that a training job makes: `train-x-1` makes `x`, `train-x-2` makes `x-2`."""
    base, n = train_id.removeprefix("train-").rsplit("-", 1)
    return base if n == "1" else f"{base}-{n}"


def harvest_id(cfg: HarvestJob) -> str:
    """The one id of this harvest of this SAE."""
    return f"harvest-{cfg.sae}-{cfg.hash()}"
