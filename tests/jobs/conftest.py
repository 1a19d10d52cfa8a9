"""A tiny model and a tiny corpus, registered; real worker processes on them."""

import os
import random
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from sae_core.config import CorpusSource, HarvestConfig, ModelSource, RowsConfig, Site, TrainConfig
from server.db import Database
from server.job_folders import left_by
from server.jobs import Jobs
from server.settings import Settings
from server.store import jobs as store
from server.store import registry
from server.worker import Worker
from tests.core.tiny_models import save_tiny
from tests.processes import Command
from tests.upgraded import upgraded

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "home", "fast"]
SEED = 5


def write_text(path: Path, documents: int = 400) -> Path:
    """Documents of random words, some of them repeating themselves."""
    draw = random.Random(SEED)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(40, 120))) for _ in range(documents)]
    path.write_text("\n\n".join(texts))
    return path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer on disk."""
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file."""
    return write_text(tmp_path_factory.mktemp("corpus") / "words.txt")


HARVEST = HarvestConfig(
    tokens=8192, top_k=3, bands=2, per_band=1, shard_rows=16, batch_rows=8, neighbours=2, logits=2, model_dtype="float32"
)


def tiny_config(*, tokens: int = 16_384, passes: int = 2, harvests: tuple[HarvestConfig, ...] = (HARVEST,)) -> TrainConfig:
    """A run of a few seconds on the tiny model; more `tokens` and `passes` make it long enough to be killed in."""
    return TrainConfig(
        model="tiny",
        corpus="words",
        site=Site(layer=1),
        rows=RowsConfig(context=32, tokens=tokens, heldout_tokens=1024),
        expansion=2,
        k=8,
        passes=passes,
        batch=64,
        pool_tokens=tokens,
        checkpoint_steps=100,
        model_dtype="float32",
        step_dtype="float32",
        harvests=harvests,
    )


@dataclass
class Home:
    """A data folder with both databases, the tiny model and the tiny corpus."""

    settings: Settings
    db: Database
    jobs: Jobs

    def status(self, job_id: str) -> str:
        """The job's status now."""
        return self.jobs.get(job_id).status

    def wait(self, job_id: str, *statuses: str, seconds: float = 120) -> str:
        """Until the job has one of the statuses."""
        return wait_for(lambda: (found := self.status(job_id)) in (statuses or store.ENDED) and found, seconds)

    def folder(self, job_id: str) -> Path:
        """Where the job keeps its files."""
        return left_by(self.settings.data, job_id)

    def error(self, job_id: str) -> str | None:
        """The sentence it failed with."""
        return self.jobs.get(job_id).error


def start(worker: Worker) -> None:
    """Start a worker from a thread of its own: the browser tests leave an event loop in this one, where DBOS refuses."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(worker.start).result()


def wait_for(found: Callable[[], str | bool | None], seconds: float = 120) -> str:
    """Poll until `found` gives something true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return str(value)
        time.sleep(0.02)
    raise TimeoutError(f"waited {seconds} s in vain")


def make_home(folder: Path, model: Path, text: Path) -> Home:
    settings = Settings(data=folder / "data", cache=folder / "cache").prepare()
    db = upgraded(settings)
    with db.write() as session:
        registry.add_model(session, "tiny", ModelSource(location=str(model)))
        registry.add_corpus(session, "words", CorpusSource(location=str(text)))
    return Home(settings, db, Jobs(settings, db))


@pytest.fixture
def home(tmp_path: Path, tiny_folder: Path, tiny_text: Path) -> Iterator[Home]:
    """A data folder ready for jobs."""
    made = make_home(tmp_path, tiny_folder, tiny_text)
    yield made
    made.jobs.close()
    made.db.close()


class WorkerProcess:
    """`headscope worker` as a process of its own, with one thread, so that every run rounds alike."""

    def __init__(self, settings: Settings, *arguments: str) -> None:
        quiet = {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "HEADSCOPE_CACHE": str(settings.cache),
            "HEADSCOPE_DEVICE": "cpu",
            "HEADSCOPE_BEAT_SECONDS": str(settings.beat_seconds),
            "HEADSCOPE_SILENT_SECONDS": str(settings.silent_seconds),
        }
        self._said = settings.data / f"said-{uuid.uuid4().hex}.txt"
        self.process = Command("worker", "--data", settings.data, *arguments, env=os.environ | quiet, stdout=self._said)

    def kill(self) -> None:
        """Gone, without a chance to say anything."""
        self.process.kill()
        self.process.wait(30)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Asked to leave; its exit status and what it printed."""
        self.process.send_signal(number)
        return self.process.wait(60), self._said.read_text()


@pytest.fixture
def worker_process() -> Iterator[Callable[..., WorkerProcess]]:
    """Starts worker processes; whatever is left of them is killed at the end."""
    started: list[WorkerProcess] = []

    def start(settings: Settings, *arguments: str) -> WorkerProcess:
        started.append(WorkerProcess(settings, *arguments))
        return started[-1]

    yield start
    for worker in started:
        if worker.process.poll() is None:
            worker.kill()
