"""A worker whose training runs in several processes: followed, cancelled and killed like one that trains by itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae_core import checkpoint
from sae_core.config import ModelSource
from sae_core.corpus import Rows
from sae_core.lens import load_lens
from sae_core.saes import load_sae
from sae_core.train import made_by, train
from server.jobs import sae_name
from server.store import jobs as store
from tests.core.test_ranks import gone, lives, parent_of, ranks_of
from tests.jobs.conftest import Home, WorkerProcess, tiny_config, wait_for

Start = Callable[..., WorkerProcess]
LONG = tiny_config(tokens=16_384, passes=3, harvests=()).model_copy(update={"k_anneal": 0.1})  # as in tests/core/test_ranks.py
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")


def checkpoints(home: Home, job_id: str) -> Path:
    return home.folder(job_id) / "runs/000/checkpoints"


def training(home: Home, job_id: str, worker: WorkerProcess) -> list[int]:
    """The ranks' process numbers, once the training has left a checkpoint."""
    wait_for(lambda: checkpoint.newest_step(checkpoints(home, job_id)) > 0 or home.error(job_id), 240)
    assert home.status(job_id) == "running", home.error(job_id)
    found = ranks_of(worker.process.pid)
    assert len(found) == 2
    return found


def test_killed_with_its_ranks_it_resumes_to_what_one_process_makes(
    home: Home, worker_process: Start, tiny_folder: Path, tmp_path: Path
) -> None:
    job_id = home.jobs.enqueue_train(LONG)
    first = worker_process(home.settings, "--processes", "2")
    ranks = training(home, job_id, first)
    torchrun = parent_of(ranks[0])
    first.kill()
    assert gone([*ranks, torchrun], 15)
    worker_process(home.settings, "--processes", "2")
    assert home.wait(job_id, seconds=240) == "done", home.error(job_id)
    made = load_sae(home.settings.data / "saes" / sae_name(job_id))

    lens = load_lens(ModelSource(location=str(tiny_folder)), name="tiny", cache=tmp_path)
    (rows,) = (path.parent for path in (home.settings.data / "rows").rglob("rows.json"))
    for _ in train(LONG, lens, Rows.open(rows), tmp_path / "alone"):
        pass
    for one, two in zip(load_sae(made_by(tmp_path / "alone", 0)).buffers(), made.buffers(), strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-5)
    with home.db.read() as session:
        assert len(store.points(session, job_id)) > 10


def test_cancelled_it_ends_its_ranks_and_keeps_a_checkpoint(home: Home, worker_process: Start) -> None:
    job_id = home.jobs.enqueue_train(LONG)
    worker = worker_process(home.settings, "--processes", "2")
    ranks = training(home, job_id, worker)
    home.jobs.cancel(job_id)
    assert gone(ranks, 15)
    assert home.wait(job_id) == "cancelled"
    assert checkpoint.newest_step(checkpoints(home, job_id)) % LONG.checkpoint_steps != 0
    assert lives(worker.process.pid)
    status, said = worker.stop()
    assert (status, "Traceback" in said) == (0, False), said
