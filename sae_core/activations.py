"""Rows of tokens to z on disk: collected once in pools, then shuffled, trained on more than once, and swept by a harvest.

A pool is one `.npy` file [rows, context, d_in] beside a small JSON that counts the rows that are in it for good. A run
that was killed goes on after the last row counted; since each model pass has the same rows in the same batch shape, the
file ends up the same, bit for bit, as in an undisturbed run on the same machine.
"""

import json
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_core.progress import Progress

if TYPE_CHECKING:
    from sae_core.lens import Lens

FLUSH_ROWS = 256  # rows between two counts; what a kill can cost
STORED: dict[torch.dtype, np.dtype[Any]] = {
    torch.bfloat16: np.dtype("<u2"),
    torch.float32: np.dtype("<f4"),
}  # numpy has no bfloat16: its bits, as integers


class Pool:
    """z of the training rows `first .. first + n`, on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count_path = path.with_suffix(".json")

    @property
    def state(self) -> dict[str, int]:
        """`first`, `rows`, `done`, `layer`; empty before the pool is begun."""
        return json.loads(self.count_path.read_text()) if self.count_path.exists() else {}

    @property
    def complete(self) -> bool:
        """Whether every row is in it."""
        state = self.state
        return bool(state) and state["done"] == state["rows"] and self.path.exists()

    def _count(self, state: dict[str, int]) -> None:
        aside = self.count_path.with_suffix(".aside")
        aside.write_text(json.dumps(state))
        aside.rename(self.count_path)

    def collect(
        self, lens: "Lens", rows: NDArray[np.int32], first: int, layer: int, dtype: torch.dtype, batch_rows: int
    ) -> Generator[Progress, None, None]:
        """Fill the pool with z of `rows` [n, context] at `layer`; yields progress in tokens after every model pass."""
        n, context = rows.shape
        shape = (n, context, lens.info.n_heads * lens.info.d_head)
        state = self.state
        if not state or not self.path.exists():
            state = {"first": first, "rows": n, "done": 0, "layer": layer}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(self.path, "w+", STORED[dtype], shape).flush()
            _reserve(self.path)
            self._count(state)
        file = np.lib.format.open_memmap(self.path, "r+")
        begun, start = time.monotonic(), state["done"]
        for low in range(start, n, batch_rows):
            high = min(low + batch_rows, n)
            tokens = torch.from_numpy(rows[low:high].astype(np.int64)).to(lens.device)
            z = lens.read_z(tokens, [layer], dtype)[layer].cpu()
            file[low:high] = z.view(torch.uint16).numpy() if dtype == torch.bfloat16 else z.numpy()
            if high == n or high - state["done"] >= FLUSH_ROWS:
                file.flush()
                state["done"] = high
                self._count(state)
            rate = (high - start) * context / max(time.monotonic() - begun, 1e-9)
            yield Progress("collect", (first + high) * context, (first + n) * context, rate=rate)

    def tensor(self) -> Tensor:
        """The whole pool [rows, context, d_in], memory-mapped, in the precision it was collected in."""
        array = np.load(self.path, mmap_mode="c")  # copy-on-write: torch wants a writable buffer, nothing is ever written
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if array.dtype == STORED[torch.bfloat16] else tensor

    def delete(self) -> None:
        """Give the disk back; the count stays, so that a resumed run does not collect it again."""
        self.path.unlink(missing_ok=True)


def _reserve(path: Path) -> None:
    """Claim the disk that a sparse file will need. Writing through a memory map to a disk that is full kills the process
    (SIGBUS); asked for here, it is an OSError that can be said in a sentence."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError:
                path.unlink()
                raise


class Activations:
    """The pools that a training run left, as one range of training rows, for a harvest that sweeps the same rows."""

    def __init__(self, pools: list[Pool]) -> None:
        self._pools = [(pool.state["first"], pool.tensor()) for pool in pools]

    @classmethod
    def open(cls, folder: Path) -> "Activations | None":
        """What is complete and contiguous from row 0 in a training run's folder; None if nothing is."""
        pools: list[Pool] = []
        for path in sorted(folder.glob("pool-*.npy")):
            pool = Pool(path)
            if not pool.complete or pool.state["first"] != sum(p.state["rows"] for p in pools):
                break
            pools.append(pool)
        return cls(pools) if pools else None

    @property
    def n_rows(self) -> int:
        """Training rows 0 .. n_rows are here."""
        first, last = self._pools[-1]
        return first + len(last)

    def read_z(self, first_row: int, last_row: int) -> Tensor:
        """z [rows, context, d_in] of rows first_row .. last_row (exclusive), in the precision collected."""
        parts = [
            z[max(first_row - first, 0) : last_row - first]
            for first, z in self._pools
            if first < last_row and first_row < first + len(z)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]
