"""Real worker processes, killed, stopped and replaced: what they leave behind ends like an undisturbed run."""

import hashlib
import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from server.db import Database
from server.jobs import VERSION, sae_name
from server.store import jobs as store
from server.tables import SAE, Example, Feature, Harvest
from tests.jobs.conftest import Home, WorkerProcess, make_home, start, tiny_config, wait_for
from tests.jobs.test_worker import steps_of

Start = Callable[..., WorkerProcess]
LONG = tiny_config(passes=4)


def weights(home: Home, job_id: str) -> str:
    """sha256 of the SAE that the job made."""
    return hashlib.sha256((home.settings.data / "saes" / sae_name(job_id) / "sae.safetensors").read_bytes()).hexdigest()


def published(db: Database) -> list[tuple[Any, ...]]:
    """Every example of the published harvest, with all its numbers and bytes."""
    columns = [c for c in Example.__table__.c if c.name not in ("id", "feature_id", "context_id")]
    query = (
        sa.select(Feature.idx, Feature.n_fired, Feature.max_act, Feature.family, *columns)
        .join(Feature, Feature.id == Example.feature_id)
        .join(SAE, SAE.harvest_id == Feature.harvest_id)
        .order_by(Feature.idx, Example.band, Example.rank)
    )
    with db.read() as session:
        return [tuple(row) for row in session.execute(query)]


def harvest_of(home: Home, train_id: str) -> str:
    """Id of the harvest that follows from the training job."""
    with home.db.read() as session:
        return next((job.id for job in store.children(session, train_id)), "")


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_text: Path
) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    """Weights and examples of a run that nothing happened to."""
    home = make_home(tmp_path_factory.mktemp("undisturbed"), tiny_folder, tiny_text)
    job_id = home.jobs.enqueue_train(LONG)
    worker = WorkerProcess(home.settings)
    try:
        assert home.wait(job_id) == "done", home.error(job_id)
        wait_for(lambda: harvest_of(home, job_id))
        assert home.wait(harvest_of(home, job_id)) == "done", home.error(harvest_of(home, job_id))
        status, said = worker.stop()
        assert status == 0, said
    finally:
        worker.kill()
    examples = published(home.db)
    assert len(examples) > 100
    yield weights(home, job_id), examples
    home.jobs.close()
    home.db.close()


def begun(home: Home, job_id: str) -> Callable[[], bool]:
    """Whether the training has left a checkpoint but is far from its end."""
    return lambda: any((home.folder(job_id) / "runs/000/checkpoints").glob("step-*"))


def told(home: Home, job_id: str) -> int:
    """The newest step of the training's curve."""
    path = home.folder(job_id) / "runs/000/metrics.jsonl"
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return max((json.loads(line)["step"] for line in whole), default=0)


def test_killed_in_training_it_resumes_to_the_same_weights(
    home: Home, worker_process: Start, undisturbed: tuple[str, list[tuple[Any, ...]]]
) -> None:
    job_id = home.jobs.enqueue_train(LONG)
    first = worker_process(home.settings)
    wait_for(begun(home, job_id))
    first.kill()
    assert home.status(job_id) == "running"
    worker_process(home.settings)
    assert home.wait(job_id) == "done", home.error(job_id)
    assert home.jobs.get(job_id).attempt == 2
    assert weights(home, job_id) == undisturbed[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_leave_it_saves_its_place_and_goes_on_to_the_same_weights(
    home: Home, worker_process: Start, undisturbed: tuple[str, list[tuple[Any, ...]]], number: int
) -> None:
    job_id = home.jobs.enqueue_train(LONG)
    first = worker_process(home.settings)
    wait_for(lambda: told(home, job_id) > LONG.checkpoint_steps)
    status, said = first.stop(number)
    assert (status, "Traceback" in said) == (0, False), said
    assert home.status(job_id) == "running"
    saved = max(int(path.name.split("-")[1]) for path in (home.folder(job_id) / "runs/000/checkpoints").glob("step-*"))
    assert saved >= told(home, job_id), "it wrote a checkpoint at the step where it was stopped"
    with home.db.read() as session:
        assert store.workers(session) == []
    worker_process(home.settings)
    assert home.wait(job_id) == "done", home.error(job_id)
    assert weights(home, job_id) == undisturbed[0]


@pytest.mark.parametrize("pattern", ["scan-*.npz", "visit-*.npz"])
def test_killed_in_a_harvest_it_ends_with_the_same_examples(
    home: Home, worker_process: Start, undisturbed: tuple[str, list[tuple[Any, ...]]], pattern: str
) -> None:
    job_id = home.jobs.enqueue_train(LONG)
    first = worker_process(home.settings)
    wait_for(lambda: (h := harvest_of(home, job_id)) and any(home.folder(h).glob(pattern)))
    first.kill()
    harvest_id = harvest_of(home, job_id)
    assert home.status(harvest_id) == "running"
    with home.db.read() as session:
        assert session.scalar(sa.select(SAE.harvest_id)) is None, "nothing is published by half"
    worker_process(home.settings)
    assert home.wait(harvest_id) == "done", home.error(harvest_id)
    assert published(home.db) == undisturbed[1]
    steps = [step for step in steps_of(home, harvest_id) if not re.fullmatch(r"write 0 \d+", step)]
    begin, end = ["scan", "choose 0", "visit", "features 0", "begin 0"], ["search 0", "publish 0"]
    assert (VERSION, steps) == ("3", [*begin, "write features 0", "write heads 0", *end])
    with home.db.read() as session:
        assert session.scalars(sa.select(Harvest.status)).all() == ["published"]
    wait_for(lambda: not home.folder(harvest_id).exists() and not home.folder(job_id).exists())


def test_the_jobs_of_a_dead_worker_are_taken_over_by_another(home: Home, worker_process: Start) -> None:
    from server import worker

    job_id = home.jobs.enqueue_train(tiny_config(passes=4, harvests=()))
    first = worker_process(home.settings, "--id", "gone")
    wait_for(begun(home, job_id))
    first.kill()
    other = worker.Worker(home.settings.model_copy(update={"beat_seconds": 0.2, "silent_seconds": 1.0}), home.db)
    start(other)
    try:
        assert home.wait(job_id) == "done", home.error(job_id)
    finally:
        other.close()
    record = home.jobs.get(job_id)
    assert (record.worker, record.attempt) == ("worker-0", 2)
    with home.db.read() as session:
        assert store.workers(session) == []
