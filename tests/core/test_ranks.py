"""Several processes train what one would: real ones, which talk through gloo."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from sae_core import checkpoint
from sae_core.config import RowsConfig, TrainConfig
from sae_core.errors import CacheMismatch, Diverged, ProcessLost, UsageError
from sae_core.parallel import check_processes, train_parallel
from sae_core.progress import Progress
from sae_core.ranks import Ranks
from sae_core.saes import SAE
from sae_core.train import train, train_many
from tests.core.test_train import ACTIVE, CONTEXT, KnownDictionary, config

PATIENCE = 120.0  # seconds, on a machine that has other things to do
N_ROWS = 96


def tokens(n: int = N_ROWS) -> Any:
    """Rows, as each process makes them for itself."""
    train_rows = np.random.default_rng(0).integers(0, 4000, (n, CONTEXT)).astype(np.int32)
    return SimpleNamespace(train=train_rows, heldout=train_rows[:8], context=CONTEXT, row_start=0, fingerprint="r")


def small(n: int = N_ROWS, **changes: Any) -> TrainConfig:
    """A run of 20 steps, two pools, batches that two ranks cannot share evenly, and features that are soon dead."""
    base: dict[str, Any] = {
        "rows": RowsConfig(context=CONTEXT, tokens=n * CONTEXT), "pool_tokens": 32 * CONTEXT * 2, "batch": 127, "passes": 2,
        "expansion": 4, "collect_rows": 7, "dead_tokens": 130, "checkpoint_steps": 5, "aux_k": 5, "aux_coef": 0.5,
    }  # fmt: skip
    chosen = base | changes
    if chosen.get("arch", "batchtopk") not in ("topk", "batchtopk", "matryoshka"):
        del chosen["aux_k"], chosen["aux_coef"]
    return config(**chosen)


CASES = {
    "batchtopk": small(b_dec_init="geometric_median", active_subspace=0.5),
    "topk": small(arch="topk"),
    "matryoshka": small(arch="matryoshka", groups=(0.25, 0.25)),
    "gated": small(arch="gated"),
    "jumprelu": small(arch="jumprelu"),
    "relu": small(
        arch="relu", l1=0.05, resample_steps=6, resample_times=2, dead_frequency=0.02, schedule="restarts", tied_init=False
    ),
}


def _rank(rank: int, folder: Path) -> None:
    """One of two processes that train every case."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE)
    )
    ranks = Ranks(rank, 2)
    for name, cfg in CASES.items():
        for _ in train(cfg, KnownDictionary(), tokens(), folder / name, ranks=ranks):  # type: ignore[arg-type]
            pass
    ranks.wait()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of what one process made, and of what two made together."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_rank, args=(rank, two), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for name, cfg in CASES.items():
        for _ in train(cfg, KnownDictionary(), tokens(), one / name):  # type: ignore[arg-type]
            pass
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    return one, two


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "runs/000/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_make_the_sae_of_one(both: tuple[Path, Path], name: str) -> None:
    one, two = (load_file(folder / name / "runs/000/sae/sae.safetensors") for folder in both)
    assert one.keys() == two.keys()
    for tensor in one:
        assert torch.allclose(one[tensor], two[tensor], rtol=1e-6, atol=1e-6), tensor


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_draw_the_curves_of_one(both: tuple[Path, Path], name: str) -> None:
    one, two = (curve(folder / name) for folder in both)
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    assert (one[-1]["fvu"] < one[0]["fvu"]) or name == "jumprelu"


@pytest.mark.parametrize("name", ["batchtopk", "topk", "matryoshka"])
def test_these_runs_had_dead_features_to_revive(both: tuple[Path, Path], name: str) -> None:
    for folder in both:
        assert sum(point.get("aux", 0.0) > 0.0 for point in curve(folder / name)) >= 3


def test_the_paper_run_resampled(both: tuple[Path, Path]) -> None:
    for folder in both:
        saved, _ = checkpoint.newest(folder / "relu/runs/000/checkpoints")
        assert saved is not None
        assert saved.facts["resampled"] == 2
        assert saved.facts["restarted_at"] == 12


def test_counters_and_moments_agree_too(both: tuple[Path, Path]) -> None:
    for name in CASES:
        one, two = (checkpoint.newest(folder / name / "runs/000/checkpoints")[0] for folder in both)
        assert one is not None
        assert two is not None
        assert one.step == two.step
        assert one.facts.keys() == two.facts.keys()
        for tensor in one.tensors:
            assert torch.allclose(one.tensors[tensor].double(), two.tensors[tensor].double(), rtol=1e-5, atol=1e-6), (name, tensor)


def test_two_ranks_collect_the_bytes_of_one(both: tuple[Path, Path]) -> None:
    one, two = (folder / "topk/activations/layer-00/pool-0001.npy" for folder in both)
    assert one.read_bytes() == two.read_bytes()


# ---- started by torchrun ----


class Slow(KnownDictionary):
    """Reads rows so slowly that there is time to interfere."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def read_z(self, *arguments: Any) -> Any:
        time.sleep(self.seconds)
        return super().read_z(*arguments)


def known(device: str, seconds: float = 0.0) -> Any:
    assert device == "cpu"
    return Slow(seconds)


def infinite(device: str) -> Any:
    lens = known(device)
    lens.table[:] = torch.inf
    return lens


def started(cfgs: list[TrainConfig], folder: Path, load: Any = known, n: int = N_ROWS) -> Generator[Progress, None, list[SAE]]:
    return train_parallel(cfgs, load, partial(tokens, n), folder, processes=2)


def finish(work: Generator[Progress, None, list[SAE]]) -> tuple[list[Progress], list[SAE]]:
    reports = []
    while True:
        try:
            reports.append(next(work))
        except StopIteration as end:
            return reports, end.value


def test_processes_that_torchrun_starts_give_the_same_sae_and_reports(both: tuple[Path, Path], tmp_path: Path) -> None:
    reports, (sae,) = finish(started([CASES["batchtopk"]], tmp_path))
    made = load_file(both[1] / "batchtopk/runs/000/sae/sae.safetensors")
    assert all(torch.equal(made[name], getattr(sae, name)) for name in made), "two processes always round alike"
    told = [report.values for report in reports if report.values]
    assert [values["loss"] for values in told] == [point["loss"] for point in curve(tmp_path)]
    trained = [report for report in reports if report.phase == "train"]
    assert trained[-1].done == trained[-1].total == 20 * 127
