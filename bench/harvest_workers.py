"""How much sooner two and four workers end a harvest than one: whole jobs, from queued to published, on a copy of HEADSCOPE_DATA.

The first published SAE that was harvested here is harvested again, `tokens` of its rows with all else as it was, by workers that
are processes of their own with `threads` threads each, or with a GPU each where there are several. Each number of workers does it
twice and the second time counts: by then they hold model and SAE. More workers than cores or GPUs cannot be quicker.

`tokens=65536` and `threads=1` take other sizes.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import sqlalchemy as sa
import torch

from bench._served import Figure
from sae_core.config import HarvestJob
from server.db import Database, sqlite_path
from server.jobs import Jobs
from server.settings import Settings
from server.store import jobs as store
from server.tables import SAE, Harvest, Job

WORKERS = (1, 2, 4)
SHARDS = 16
"""Into which each pass is cut: what can be shared out."""
PATIENCE = 300
"""Seconds that workers have to begin."""


def run(tokens: int = 65_536, threads: int = 1) -> dict[str, Figure]:
    """Seconds of one worker, and what share of them more take."""
    source = Settings()
    if sqlite_path(source.url) is None:
        sys.exit("This benchmark copies a data folder with SQLite; set HEADSCOPE_DATA to one, and no HEADSCOPE_DATABASE_URL.")
    with tempfile.TemporaryDirectory(prefix="headscope-bench-") as folder:
        settings = source.model_copy(update={"data": Path(folder) / "data"})
        shutil.copytree(source.data, settings.data, ignore=shutil.ignore_patterns("jobs", "logs"))
        seconds = measured(settings, tokens, threads, WORKERS)
    alone, *more = seconds.items()
    figures: dict[str, Figure] = {"one_worker": {"value": round(alone[1], 1), "unit": "s", "target": None}}
    for n, took in more:
        figures[f"workers_{n}_vs_1"] = {"value": round(took / alone[1], 3), "unit": "x", "target": None}
    return figures | {"cores": {"value": len(os.sched_getaffinity(0)), "unit": "", "target": None}}


def measured(settings: Settings, tokens: int, threads: int, counts: Sequence[int]) -> dict[int, float]:
    """Seconds from queued to published by so many workers, the counts ascending. The folder is written into."""
    db = Database(settings.url)
    queue = Jobs(settings, db)
    queue.forget_workers()
    job_id = queue.enqueue_harvest(_shortened(db, tokens))
    seconds: dict[int, float] = {}
    with ExitStack() as workers:
        workers.callback(db.close)
        workers.callback(queue.close)
        for n in counts:
            for number in range(max(seconds, default=0), n):
                workers.enter_context(_worker(settings, number, threads))
            deadline = time.monotonic() + PATIENCE
            while _heard(db) < n:
                if time.monotonic() > deadline:
                    sys.exit(f"Of {n} workers {_heard(db)} began in {PATIENCE} s; what they said is above.")
                time.sleep(0.1)
            for turn in range(2):
                seconds[n] = _harvested(queue, job_id)
                print(f"  {n} at it, turn {turn + 1}: {seconds[n]:.1f} s", file=sys.stderr, flush=True)
    return seconds


def _shortened(db: Database, tokens: int) -> HarvestJob:
    """The harvest that was published first, over fewer tokens and in more shards."""
    with db.read() as session:
        config = session.scalars(
            sa.select(Job.config)
            .join(Harvest, Harvest.job_id == Job.id)
            .join(SAE, SAE.harvest_id == Harvest.id)
            .where(Job.kind == "harvest")
            .order_by(SAE.id)
        ).first()
    if config is None:
        sys.exit("Nothing that was harvested here is published; run `make demo` first, or set HEADSCOPE_DATA.")
    cfg = HarvestJob.model_validate(config)
    shard = max(cfg.harvest.batch_rows, tokens // cfg.rows.context // SHARDS)
    return cfg.model_copy(update={"harvest": cfg.harvest.model_copy(update={"tokens": tokens, "shard_rows": shard})})


@contextmanager
def _worker(settings: Settings, number: int, threads: int) -> Iterator[None]:
    """`headscope worker`, until the end."""
    gpus = torch.cuda.device_count()
    environment = os.environ | {
        "HEADSCOPE_DATA": str(settings.data), "HEADSCOPE_CACHE": str(settings.cache), "OMP_NUM_THREADS": str(threads),
        "HEADSCOPE_DEVICE": f"cuda:{number % gpus}" if gpus else "cpu",
    }  # fmt: skip
    command = [sys.executable, "-m", "server.cli", "worker", "--id", f"bench{number}"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _heard(db: Database) -> int:
    with db.read() as session:
        return len(store.workers(session))


def _harvested(queue: Jobs, job_id: str) -> float:
    """Seconds of the whole job, which is done anew if it was done already."""
    begun = time.perf_counter()
    if queue.get(job_id).ended:
        queue.retry(job_id, even_done=True)
    while not (job := queue.get(job_id)).ended:
        time.sleep(0.05)
    if job.status != "done":
        sys.exit(f"{job_id} is {job.status}: {job.error}")
    return time.perf_counter() - begun
