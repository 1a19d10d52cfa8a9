"""A job's folder on disk belongs to one attempt: `<data>/jobs/<id>/attempt-<n>`. No torch.

Taking a job up renames the folder of the attempt before. A worker that was thought dead and wakes has paths that lead nowhere:
whatever it writes, renames or removes there fails, or lands in a folder that nobody reads. No lock can do that, since whoever
sleeps holds it as long as it likes. What it may have open for writing at that moment is copied, so that it has the old file and
the attempt that goes on has another. In the database the same number refuses its writes (`store.jobs.check`).
"""

import json
import os
import shutil
from pathlib import Path

from sae_core.errors import Fenced

PREFIX = "attempt-"


def left_by(data: Path, job_id: str) -> Path:
    """What the job's newest attempt has on disk; the folder need not be there."""
    base = data / "jobs" / job_id
    found = _attempts(base)
    return found[-1] if found else base


def take_folder(data: Path, job_id: str, attempt: int) -> Path:
    """The attempt's folder, with everything that attempts before it have left. Fenced where a later one has taken it."""
    base = data / "jobs" / job_id
    mine = base / f"{PREFIX}{attempt:06d}"
    base.mkdir(parents=True, exist_ok=True)
    while True:
        found = _attempts(base)
        if not found:
            _begin(base, mine)
        elif found[-1].name > mine.name:
            raise Fenced(f"Job {job_id} has been taken up by a later attempt.")
        elif found[-1] != mine:
            try:
                found[-1].rename(mine)
            except FileNotFoundError:  # another attempt was quicker: look again
                continue
        for stray in _attempts(base)[:-1]:  # made by one that was late
            shutil.rmtree(stray, ignore_errors=True)
        _renew_open_files(mine)
        return mine


def _attempts(base: Path) -> list[Path]:
    return sorted(base.glob(f"{PREFIX}*"))


def _begin(base: Path, mine: Path) -> None:
    """The first attempt's folder; files of a version that had no such folders move into it."""
    older = list(base.iterdir())
    mine.mkdir()
    for path in older:
        path.rename(mine / path.name)


def _renew_open_files(folder: Path) -> None:
    """Copy the pools of activations that are not full: they are written in place, through a map of the file."""
    for path in folder.rglob("pool-*.npy"):
        count = path.with_suffix(".json")
        try:
            state = json.loads(count.read_text())
        except (OSError, ValueError):
            continue
        if state["done"] < state["rows"]:
            aside = path.with_name(f"{path.name}.{os.getpid()}.aside")
            shutil.copyfile(path, aside)
            aside.rename(path)
