"""Weights & Biases, with an object in the package's place: what it is told, and that its faults stay its own."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sae_core.errors import UsageError
from sae_core.progress import Progress
from server import tracking
from server.commands import environment
from server.settings import Settings
from server.tracking import Tracker


class Recorded:
    """One run over there."""

    def __init__(self, **how: Any) -> None:
        self.how, self.points, self.finished = how, {}, False

    def log(self, values: dict[str, float], step: int) -> None:
        self.points[step] = values

    def finish(self) -> None:
        self.finished = True


class Package(ModuleType):
    """The package, which only remembers."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[Recorded] = []

    def init(self, **how: Any) -> Recorded:
        self.runs.append(Recorded(**how))
        return self.runs[-1]


def point(step: int, run: int | None = None) -> Progress:
    return Progress("train", step, 100, rate=50.0, values={"loss": 1 / step}, step=step, run=run)


def test_each_run_of_a_sweep_has_a_run_there_with_its_points(tmp_path: Path) -> None:
    package = Package()
    tracker = Tracker("mine", "sweep-x-1", {"k": 8}, tmp_path / "wandb", package)
    for report in (point(1, 0), point(5, 0), point(1, 1), Progress("collect", 1, 2)):
        tracker.add(report)
    tracker.close()
    assert [run.how["id"] for run in package.runs] == ["sweep-x-1-000", "sweep-x-1-001"]
    assert [run.points for run in package.runs] == [
        {1: {"loss": 1.0, "rate": 50.0}, 5: {"loss": 0.2, "rate": 50.0}},
        {1: {"loss": 1.0, "rate": 50.0}},
    ]
    assert all(run.finished for run in package.runs)
    assert {(run.how["project"], run.how["group"], run.how["config"]["k"]) for run in package.runs} == {("mine", "sweep-x-1", 8)}


def test_its_faults_end_the_tracking_and_nothing_else(tmp_path: Path) -> None:
    class Broken(Package):
        def init(self, **_: Any) -> Recorded:
            self.runs.append(Recorded())
            raise ConnectionError("no network")

    package = Broken()
    tracker = Tracker("mine", "train-x-1", {}, tmp_path, package)
    for step in (1, 2, 3):
        tracker.add(point(step))
    tracker.close()
    assert len(package.runs) == 1, "it is asked once"


def test_without_the_package_the_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(UsageError, match=r"pip install 'headscope\[wandb\]'"):
        tracking.need_wandb()


def test_nothing_reports_unless_a_project_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "HEADSCOPE_WANDB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "_wandb_mode", None)
    environment.report_to_nobody()
    assert os.environ["WANDB_MODE"] == "disabled"
    monkeypatch.setattr(tracking, "need_wandb", lambda: None)
    environment.allow_wandb(Settings(data=tmp_path))
    assert os.environ["WANDB_MODE"] == "disabled"
    environment.allow_wandb(Settings(data=tmp_path, wandb="mine"))
    assert "WANDB_MODE" not in os.environ


def test_a_mode_that_a_person_set_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(environment, "_wandb_mode", None)
    monkeypatch.setattr(tracking, "need_wandb", lambda: None)
    environment.report_to_nobody()
    environment.allow_wandb(Settings(data=tmp_path, wandb="mine"))
    assert os.environ["WANDB_MODE"] == "offline"


def test_the_package_is_never_imported_otherwise() -> None:
    code = "import sys, server.cli, server.worker, server.tracking; print('wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_real_package_keeps_a_sweeps_runs_offline(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from sae_core.progress import Progress
from server.tracking import Tracker
tracker = Tracker("attention", "sweep-s-1", {"lr": 0.003}, Path(sys.argv[1]))
for run in (0, 1):
    for step in (1, 2, 3):
        tracker.add(Progress("train", step, 3, "steps", values={"loss": run + 1 / step}, step=step, run=run))
tracker.close()
assert not tracker._off
"""
    offline = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=offline, timeout=120)
    kept = sorted(tmp_path.rglob("*.wandb"))
    assert [file.name for file in kept] == ["run-sweep-s-1-000.wandb", "run-sweep-s-1-001.wandb"]
    assert all(file.read_bytes().count(b"loss") >= 3 for file in kept)
