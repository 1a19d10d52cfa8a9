"""Optional: a training job's curves in Weights & Biases, one run there for each SAE. The package is imported only where a
project is named, and what goes wrong with it never stops a training. No torch."""

import importlib
import importlib.util
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

from sae_core.errors import UsageError
from sae_core.progress import Progress

log = logging.getLogger("headscope.tracking")


def need_wandb() -> None:
    """Raise unless the package is installed."""
    if importlib.util.find_spec("wandb") is None:
        raise UsageError(
            "--wandb needs a package that is not installed here; run `pip install 'headscope[wandb]'`.", field="wandb"
        )


class Tracker:
    """Sends points of a job's curves as they come. `WANDB_MODE=offline` keeps them in `folder` instead."""

    def __init__(self, project: str, job_id: str, config: dict[str, Any], folder: Path, wandb: ModuleType | None = None) -> None:
        self._project, self._job, self._config, self._folder = project, job_id, config, folder
        self._wandb: Any = wandb
        self._runs: dict[int, Any] = {}
        self._off = False

    def add(self, progress: Progress) -> None:
        """The point that a report brings, if it brings one."""
        if self._off or not progress.values or progress.step is None:
            return
        try:
            self._run(progress.run or 0).log(dict(progress.values) | {"rate": progress.rate}, step=progress.step)
        except Exception:  # its service, its files, its package: none of them is worth a training
            log.exception("Weights & Biases failed; %s goes on without it", self._job)
            self._off = True

    def close(self) -> None:
        """Say that no more will come."""
        runs, self._runs = list(self._runs.values()), {}
        for run in runs:
            try:
                run.finish()
            except Exception:
                log.exception("Weights & Biases failed to finish %s", self._job)

    def _run(self, index: int) -> Any:
        if index not in self._runs:
            self._wandb = self._wandb or importlib.import_module("wandb")
            self._folder.mkdir(parents=True, exist_ok=True)
            self._runs[index] = self._wandb.init(
                project=self._project,
                id=f"{self._job}-{index:03d}",
                name=f"{self._job}-{index:03d}",
                group=self._job,
                config=self._config | {"run": index},
                dir=str(self._folder),
                resume="allow",  # a job that is taken up again goes on in the same run
                reinit="create_new",  # a sweep's runs are open beside each other
            )
        return self._runs[index]
