"""A training run's state on disk: a folder per step, written aside and renamed, so that what is there is whole."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

KEEP = 2  # the newest, and one more in case the newest cannot be read


class Checkpoint(NamedTuple):
    """What a run needs to go on as if nothing had happened."""

    step: int
    """Steps done."""
    tensors: dict[str, Tensor]
    """Parameters, optimizer moments, dead counters."""
    facts: dict[str, Any]
    """Scalars: the last cut, the optimizer's step count."""


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` under `folder` and drop all but the newest few. Where it cannot be written whole, such as on a
    full disk, the error is raised and what was saved before stays."""
    for old in folder.glob("aside-*"):
        shutil.rmtree(old, ignore_errors=True)
    aside = folder / f"aside-{os.getpid()}"
    aside.mkdir(parents=True)
    try:
        save_file({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}, aside / "state.safetensors")
        (aside / "state.json").write_text(json.dumps({"step": checkpoint.step} | checkpoint.facts))
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    final = folder / f"step-{checkpoint.step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    for old in steps(folder)[KEEP:]:
        shutil.rmtree(old)


def steps(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def newest_step(folder: Path) -> int:
    """Steps done at the newest checkpoint, by its name; 0 without one."""
    found = steps(folder)
    return int(found[0].name.removeprefix("step-")) if found else 0


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that can be read, None if there is none, and a sentence for each that cannot be: it is
    removed, so that the run counts on from the one that is used."""
    notes: list[str] = []
    for path in steps(folder):
        try:
            facts = json.loads((path / "state.json").read_text())
            return Checkpoint(facts.pop("step"), load_file(path / "state.safetensors"), facts), notes
        except (OSError, ValueError, KeyError, SafetensorError) as error:  # a torn write of a power cut
            notes.append(f"The checkpoint {path} cannot be read ({error}); going on from the one before it.")
            shutil.rmtree(path, ignore_errors=True)
    return None, notes
