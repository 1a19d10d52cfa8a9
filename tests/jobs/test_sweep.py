"""A sweep from the queue to its table: many SAEs on one stream of activations, each published under its own name."""

import pytest

from sae_core.config import RowsConfig, Site, SweepConfig
from sae_core.errors import LayerOutOfRange, UsageError
from server import jobs, worker
from server.store import jobs as store
from server.store import registry
from tests.jobs.conftest import HARVEST, Home, tiny_config, wait_for
from tests.jobs.test_worker import log_of, working

BASE = tiny_config(tokens=8192, passes=1, harvests=())
SWEEP = SweepConfig(base=BASE, layers=(1, 3), archs=("topk", "batchtopk"), ks=(4, 8))
NAMES = {f"s-l{layer:02d}-{arch}-k{k}" for layer in (1, 3) for arch in ("topk", "batchtopk") for k in (4, 8)}


def test_every_run_of_a_sweep_becomes_an_sae_of_its_own(home: Home) -> None:
    job_id = home.jobs.enqueue_sweep(SWEEP, name="s")
    assert job_id == "sweep-s-1"
    with working(home):
        assert home.wait(job_id) == "done", home.error(job_id)
    with home.db.read() as session:
        assert registry.sae_names(session) == NAMES
        saes = {name: registry.sae(session, name) for name in NAMES}
        curves = [store.points(session, job_id, run=run) for run in range(8)]
    assert {sae.job_id for sae in saes.values()} == {job_id}
    for name, sae in saes.items():
        assert name == f"s-l{sae.config.site.layer:02d}-{sae.config.arch}-k{sae.config.k}"
        assert (home.settings.data / sae.folder / "sae.safetensors").exists()
    assert all(curve[-1][1]["loss"] < curve[0][1]["loss"] for curve in curves)
    assert len({curve[-1][1]["loss"] for curve in curves}) == 8, "each run has a curve of its own"
    assert "8 SAEs are trained on one stream of activations." in log_of(home, job_id)
    assert not home.folder(job_id).exists(), "its working files are given back"
