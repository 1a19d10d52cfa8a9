"""A job's folder on disk: who was late finds nothing to write into, and whoever goes on has everything."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_core import checkpoint
from sae_core.checkpoint import Checkpoint
from sae_core.errors import Fenced
from server.job_folders import left_by, take_folder


def test_the_next_attempt_has_everything_and_the_late_one_nothing(tmp_path: Path) -> None:
    late = take_folder(tmp_path, "train-x-1", 1)
    (late / "made").write_text("by the first")
    (late / "sae").mkdir()
    mine = take_folder(tmp_path, "train-x-1", 3)
    assert (mine / "made").read_text() == "by the first"
    assert left_by(tmp_path, "train-x-1") == mine
    with pytest.raises(FileNotFoundError):
        (late / "made").write_text("too late")
    with pytest.raises(FileNotFoundError):
        (late / "sae").rename(tmp_path / "published")
    with pytest.raises(Fenced):
        take_folder(tmp_path, "train-x-1", 2)
    assert take_folder(tmp_path, "train-x-1", 3) == mine, "the same attempt may ask again"


def test_a_late_checkpoint_lands_where_nobody_reads(tmp_path: Path) -> None:
    def saved(folder: Path, step: int) -> None:
        checkpoint.save(folder / "checkpoints", Checkpoint(step, {"w": torch.full((2,), float(step))}, {}))

    late = take_folder(tmp_path, "j", 1)
    saved(late, 100)
    mine = take_folder(tmp_path, "j", 2)
    saved(mine, 200)
    saved(late, 300)  # it makes its folder anew
    assert left_by(tmp_path, "j") == mine
    found, _ = checkpoint.newest(take_folder(tmp_path, "j", 4) / "checkpoints")
    assert found is not None
    assert found.step == 200
    assert not late.exists(), "what the late one left is cleared away"


def test_what_a_late_attempt_has_mapped_is_not_what_is_gone_on_with(tmp_path: Path) -> None:
    late = take_folder(tmp_path, "j", 1)
    pools = {name: late / name for name in ("pool-0000.npy", "pool-0001.npy")}
    for number, path in enumerate(pools.values()):
        np.lib.format.open_memmap(path, "w+", np.float32, (4,)).flush()
        path.with_suffix(".json").write_text(json.dumps({"first": 0, "rows": 4, "done": 4 - 2 * number}))
    half, full = np.load(pools["pool-0001.npy"], mmap_mode="r+"), (late / "pool-0000.npy").stat().st_ino
    mine = take_folder(tmp_path, "j", 2)
    half[:] = 7.0
    half.flush()
    assert np.load(mine / "pool-0001.npy").tolist() == [0.0] * 4
    assert (mine / "pool-0000.npy").stat().st_ino == full, "what is whole is not copied"


def test_files_of_a_version_without_attempts_are_taken_along(tmp_path: Path) -> None:
    old = tmp_path / "jobs" / "j" / "runs" / "000"
    old.mkdir(parents=True)
    (old / "run.json").write_text("[]")
    assert (take_folder(tmp_path, "j", 2) / "runs/000/run.json").read_text() == "[]"
    shutil.rmtree(tmp_path / "jobs" / "j")
    assert left_by(tmp_path, "j") == tmp_path / "jobs" / "j"
