"""Several processes train what one would: real ones, which talk through gloo."""

import errno
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from sae_core import checkpoint, sparse
from sae_core.config import RowsConfig, TrainConfig
from sae_core.errors import CacheMismatch, Diverged, ProcessLost, UsageError
from sae_core.lens import Lens
from sae_core.parallel import check_processes, train_parallel
from sae_core.parallel_rank import _portable
from sae_core.progress import Progress
from sae_core.ranks import Ranks
from sae_core.saes import SAE
from sae_core.train import train, train_many
from tests.core.test_train import CONTEXT, KnownDictionary, config

PATIENCE = 120.0  # seconds, on a machine that has other things to do
N_ROWS = 96


def known_lens() -> Lens:
    """A model whose z comes of a known dictionary; training asks no more of a lens than that it reads z."""
    return cast("Lens", KnownDictionary())


def tokens(n: int = N_ROWS) -> Any:
    """Rows, as each process makes them for itself."""
    train_rows = np.random.default_rng(0).integers(0, 4000, (n, CONTEXT)).astype(np.int32)
    return SimpleNamespace(train=train_rows, heldout=train_rows[:8], context=CONTEXT, row_start=0, fingerprint="r")


def small(n: int = N_ROWS, **changes: Any) -> TrainConfig:
    """A run of 20 steps, two pools, batches that two ranks cannot share evenly, and features that are soon dead."""
    base: dict[str, Any] = {
        "rows": RowsConfig(context=CONTEXT, tokens=n * CONTEXT), "pool_tokens": 32 * CONTEXT * 2, "batch": 127, "passes": 2,
        "expansion": 4, "collect_rows": 7, "dead_tokens": 130, "checkpoint_steps": 5, "aux_k": 5, "aux_coef": 0.5,
        "k_anneal": 0.1,  # a gentle start: else a choice that rounding tips over is soon a different SAE
    }  # fmt: skip
    chosen = base | changes
    if chosen.get("arch", "batchtopk") not in ("topk", "batchtopk", "matryoshka"):
        del chosen["aux_k"], chosen["aux_coef"], chosen["k_anneal"]
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


def tied() -> torch.Tensor:
    """Pre-activations many of which are equal, as they are in bfloat16; the first half's are larger."""
    drawn = torch.randint(-4, 5, (50, 64), generator=torch.Generator().manual_seed(0)).float()
    drawn[:25] += 1
    return drawn


def _rank(rank: int, folder: Path) -> None:
    """One of two processes that train every case."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE)
    )
    ranks = Ranks(rank, 2)
    for name, cfg in CASES.items():
        for _ in train(cfg, known_lens(), tokens(), folder / name, ranks=ranks):
            pass
    code, cut = sparse.batch_top_k(tied()[ranks.part(50)], 333, guess=5.0, ranks=ranks)
    torch.save((code.value, cut), folder / f"tied-{rank}.pt")
    ranks.wait()
    os._exit(0)  # as sae_core.parallel_rank does: a thread of gloo that is still there when Python ends aborts the process


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of what one process made, and of what two made together."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_rank, args=(rank, two), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for name, cfg in CASES.items():
        for _ in train(cfg, known_lens(), tokens(), one / name):
            pass
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    return one, two


def test_equal_values_at_the_cut_are_kept_by_one_rank_only(both: tuple[Path, Path]) -> None:
    (first, cut), (second, other) = (torch.load(both[1] / f"tied-{rank}.pt") for rank in range(2))
    whole, expected = sparse.batch_top_k(tied(), 333)
    assert cut == other == expected
    assert (tied() == cut).sum() > 100
    assert len(first) > len(second) > 0
    assert torch.equal(torch.cat([first, second]).sort().values, whole.value.sort().values)


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
            assert torch.allclose(one.tensors[tensor].double(), two.tensors[tensor].double(), rtol=1e-5, atol=1e-6), (
                name,
                tensor,
            )


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
    """One token's z is infinite, in a batch of rows that is not rank 0's."""
    lens, words = known(device), tokens().train
    once = [word for word in words[20] if (words == word).sum() == 1]
    lens.table[once[0]] = torch.inf
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


def test_with_as_many_runs_as_ranks_each_rank_trains_its_own(tmp_path: Path) -> None:
    cfgs = [small(arch="topk", seed=1), small(seed=2, site={"layer": 1}), small(seed=3, passes=1)]
    alone = train_many(cfgs, known_lens(), tokens(), tmp_path / "one")
    expected = finish(alone)[1]
    reports, saes = finish(started(cfgs, tmp_path / "two"))
    for one, two in zip(expected, saes, strict=True):
        for a, b in zip(one.buffers(), two.buffers(), strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)
    trained = [report for report in reports if report.phase == "train"]
    assert {report.run for report in trained if report.values} == {0, 1, 2}
    assert trained[-1].done == trained[-1].total == (20 + 20 + 10) * 127
    for run in range(3):
        lines = [(tmp_path / name / f"runs/{run:03d}/metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
        assert len(lines[0]) == len(lines[1])


def test_an_error_of_a_rank_arrives_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(Diverged) as alone:
        finish(train_many([small()], infinite("cpu"), tokens(), tmp_path / "one"))
    with pytest.raises(Diverged) as together:
        finish(started([small()], tmp_path / "two", infinite))
    assert str(together.value) == str(alone.value)
    assert "read_z" not in str(together.value)
    assert "processes that train together" in together.value.__notes__[0]


def test_errors_travel_with_their_class_their_field_and_their_number() -> None:
    refused = pickle.loads(pickle.dumps(_portable(CacheMismatch("It differs.", field="cache"))))
    assert (type(refused), str(refused), refused.field) == (CacheMismatch, "It differs.", "cache")
    full = pickle.loads(pickle.dumps(_portable(OSError(errno.ENOSPC, "No space left on device"))))
    assert full.errno == errno.ENOSPC

    class Local(Exception):
        """Another process cannot know it."""

    assert "Local: lost" in str(_portable(Local("lost")))


def ranks_of(parent: int) -> list[int]:
    """Process numbers of the ranks that torchrun, a child of `parent`, has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"sae_core.parallel_rank" not in (folder / "cmdline").read_bytes():
                continue
            above = parent_of(int(folder.name))
            if above != parent and parent_of(above) == parent:
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return sorted(found)


def parent_of(number: int) -> int:
    return int(Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[1])


def gone(numbers: list[int], seconds: float) -> bool:
    """Whether these processes end within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(lives(number) for number in numbers):
            return True
        time.sleep(0.05)
    return False


def lives(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until(work: Generator[Progress, None, Any], reached: Callable[[Progress], bool]) -> None:
    """Follow the work until a report is what is waited for."""
    while not reached(next(work)):
        pass


def beyond(phase: str, step: int, report: Progress) -> bool:
    """Whether a report is of that phase, and of tokens that come after so many steps."""
    return report.phase == phase and report.done > step * 127


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
LONG = small(n=288, passes=8, checkpoint_steps=9)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Progress], list[SAE], Path]:
    """What two processes say and make of the long run when nobody interferes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return *finish(started([LONG], folder, n=288)), folder


def same(one: list[SAE], two: list[SAE], atol: float = 0.0) -> bool:
    return all(
        torch.allclose(x, y, rtol=atol, atol=atol)
        for a, b in zip(one, two, strict=True)
        for x, y in zip(a.buffers(), b.buffers(), strict=True)
    )


def test_processes_that_torchrun_starts_make_and_say_what_one_does(
    undisturbed: tuple[list[Progress], list[SAE], Path], tmp_path: Path
) -> None:
    reports, saes, folder = undisturbed
    assert same(saes, finish(train_many([LONG], known_lens(), tokens(288), tmp_path))[1], 1e-6)
    told = [report.values for report in reports if report.values]
    assert [values["loss"] for values in told] == [point["loss"] for point in curve(folder)]
    trained = [report for report in reports if report.phase == "train"]
    assert trained[-1].done == trained[-1].total == (4 * 56 + 24) * 127
    assert {report.phase for report in reports} == {"start", "collect", "train"}


@linux
def test_when_a_rank_is_killed_all_go_on_from_the_last_checkpoint(
    undisturbed: tuple[list[Progress], list[SAE], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once by themselves; when it happens again, after they are started again."""
    monkeypatch.setattr("sae_core.parallel.RESTARTS", 1)
    work = started([LONG], tmp_path, n=288)
    until(work, lambda report: report.phase == "train" and report.done > 30 * 127)
    before = ranks_of(os.getpid())
    os.kill(before[1], signal.SIGKILL)
    said: list[Progress] = []
    until(work, lambda report: said.append(report) or report.note is not None)  # type: ignore[func-returns-value]
    assert "One of the 2 processes that train together was lost" in str(said[-1].note)
    assert "all of them go on from the last checkpoint" in str(said[-1].note)
    until(work, lambda report: report.phase == "train" and report.done > 80 * 127)
    after = ranks_of(os.getpid())
    assert not set(before) & set(after)
    os.kill(after[0], signal.SIGKILL)
    with pytest.raises(ProcessLost, match="run the job again, and it goes on from its last checkpoint"):
        finish(work)
    assert not any(lives(rank) for rank in before + after)
    assert checkpoint.newest_step(tmp_path / "runs/000/checkpoints") >= 72
    assert same(finish(started([LONG], tmp_path, n=288))[1], undisturbed[1])


ONE_POOL = small(n=288, passes=8, checkpoint_steps=10**6, pool_tokens=288 * CONTEXT)


@linux
def test_closed_it_ends_its_ranks_with_a_checkpoint(tmp_path: Path) -> None:
    """In one pool no checkpoint is due before the end: what there is was written when it was closed."""
    two, one = (tmp_path / name / "runs/000/checkpoints" for name in ("two", "one"))
    alone = finish(train_many([ONE_POOL], known_lens(), tokens(288), tmp_path / "one"))[1]
    for phase in ("collect", "train"):
        work = started([ONE_POOL], tmp_path / "two", partial(known, seconds=0.02), n=288)
        until(work, partial(beyond, phase, 23))
        ranks = ranks_of(os.getpid())
        assert len(ranks) == 2
        work.close()
        assert not any(lives(rank) for rank in ranks)
        kept = checkpoint.newest_step(two)
        assert kept == 0 if phase == "collect" else 23 < kept < checkpoint.newest_step(one)
    by_one = finish(train_many([ONE_POOL], known_lens(), tokens(288), tmp_path / "two"))[1]
    assert same(by_one, alone, 1e-6), "one process goes on where two were"


PARENT = """
import sys
from pathlib import Path
from tests.core.test_ranks import LONG, known, started
from functools import partial
for report in started([LONG], Path(sys.argv[1]), partial(known, seconds=0.02), n=288):
    print(report.phase, flush=True)
"""


@linux
def test_ranks_do_not_outlive_whoever_started_them(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent:
        for line in parent.stdout:
            if line.strip() == "train":
                break
        ranks = ranks_of(parent.pid)
        torchrun = parent_of(ranks[0])
        parent.kill()
    assert len(ranks) == 2
    assert gone([*ranks, torchrun], 10)


def test_too_few_gpus_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_processes(2, "cuda:0")
    with pytest.raises(UsageError, match="4 processes need a GPU each, and there are 2"):
        check_processes(4, "cuda:0")
    with pytest.raises(UsageError, match="not mps"):
        check_processes(2, "mps")
