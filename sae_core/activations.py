"""Rows of tokens to z on disk: collected once in pools, then shuffled, trained on by one or many SAEs, swept by a harvest.

    <store>/about.json                 what these activations are, as a fingerprint's parts
    <store>/layer-05/pool-0000.npy     z [rows, context, d_in] of the training rows `first .. first + rows`
    <store>/layer-05/pool-0000.json    how many of these rows are in it for good

A store belongs to one run, or is a cache with a name that many runs read. Rows are shuffled over documents before they are
cut into pools, so each pool is a fair sample of the corpus, and its tokens are drawn in random order: a shuffled shard.

One model pass fills the pools of all layers asked for. A run that was killed goes on after the last row counted; since each
pass has the same rows in the same batch shape, the files end up the same, bit for bit, as in an undisturbed run on the same
machine.
"""

import fcntl
import json
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_core.config import TrainConfig
from sae_core.corpus import Rows
from sae_core.errors import CacheBusy, CacheMismatch, Diverged
from sae_core.progress import Progress
from sae_core.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from sae_core.lens import Lens

FLUSH_ROWS = 256  # rows between two counts; what a kill can cost
STORED: dict[torch.dtype, np.dtype[Any]] = {
    torch.bfloat16: np.dtype("<u2"),
    torch.float32: np.dtype("<f4"),
}  # numpy has no bfloat16: its bits, as integers


class Pool:
    """One layer's z of the training rows `first .. first + n`, on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count_path = path.with_suffix(".json")

    @property
    def state(self) -> dict[str, int]:
        """`first`, `rows`, `done`; empty before the pool is begun."""
        return json.loads(self.count_path.read_text()) if self.count_path.exists() else {}

    @property
    def complete(self) -> bool:
        """Whether every row is in it."""
        state = self.state
        return bool(state) and state["done"] == state["rows"] and self.path.exists()

    def count(self, state: dict[str, int]) -> None:
        """Say how many rows are in it for good."""
        aside = self.count_path.with_suffix(".aside")
        aside.write_text(json.dumps(state))
        aside.rename(self.count_path)

    def begin(self, first: int, shape: tuple[int, int, int], dtype: torch.dtype) -> int:
        """Make the file, unless it is there; how many rows are in it."""
        state = self.state
        if not state or not self.path.exists():
            state = {"first": first, "rows": shape[0], "done": 0}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(self.path, "w+", STORED[dtype], shape).flush()
            _reserve(self.path)
            self.count(state)
        return state["done"]

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


class Store:
    """The pools of a run, or of a named cache: `pool(layer, index)`, filled by `collect`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def pool(self, layer: int, index: int) -> Pool:
        """One layer's pool, which may not be there yet."""
        return Pool(self.folder / f"layer-{layer:02d}" / f"pool-{index:04d}.npy")

    def claim(self, about: dict[str, Any]) -> None:
        """Say what these activations are, or check that it is what was said before.

        Raises CacheMismatch naming each part that differs: mixed activations would train an SAE on nothing that exists.
        """
        path = self.folder / "about.json"
        differing = self.differing(about)
        if differing is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".aside")
            aside.write_text(json.dumps(about, indent=1))
            aside.rename(path)
        elif differing:
            found = json.loads(path.read_text())
            parts = "; ".join(f"{name} is {found.get(name)} there and {about[name]} here" for name in differing)
            raise CacheMismatch(
                f"The activation cache {self.folder.name} holds other activations: {parts}. "
                "Choose another name, or delete that folder.",
                field="cache",
            )

    def differing(self, about: dict[str, Any]) -> list[str] | None:
        """The parts in which these activations are other ones than `about` says; None where there are none."""
        path = self.folder / "about.json"
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        return [name for name in about if found.get(name) != about[name]]

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Held while rows are written; CacheBusy if another process does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CacheBusy(
                    f"Another run is filling the activation cache {self.folder.name} now; wait for it, or choose another name.",
                    field="cache",
                ) from error
            yield

    def collect(
        self,
        lens: "Lens",
        rows: NDArray[np.int32],
        first: int,
        layers: Sequence[int],
        index: int,
        dtype: torch.dtype,
        batch_rows: int,
        ranks: Ranks = ALONE,
    ) -> Generator[Progress, None, None]:
        """Fill pool `index` of every layer that lacks rows of `rows` [n, context], by one model pass for all of them;
        yields progress in tokens after every pass, on rank 0. Raises Diverged where the model gives values that are not
        finite.

        Several `ranks` take the batches in turn: the batches are those of one process, so z is the same. Rows are counted
        when all ranks have written theirs, so that what is counted is always a beginning of the pool.
        """
        n, context = rows.shape
        lacking = ranks.share(lambda: [layer for layer in layers if not self.pool(layer, index).complete])
        if not lacking:
            return
        with self.filling() if ranks.rank == 0 else nullcontext():
            pools = {layer: self.pool(layer, index) for layer in lacking}
            shape = (n, context, lens.info.n_heads * lens.info.d_head)
            start = counted = ranks.share(lambda: min(pool.begin(first, shape, dtype) for pool in pools.values()))
            files = {layer: np.lib.format.open_memmap(pool.path, "r+") for layer, pool in pools.items()}
            begun = time.monotonic()
            for number, low in enumerate(range(start, n, batch_rows)):
                ranks.check()
                high = min(low + batch_rows, n)
                if ranks.mine(number):
                    tokens = torch.from_numpy(rows[low:high].astype(np.int64)).to(lens.device)
                    for layer, z in lens.read_z(tokens, lacking, dtype).items():
                        if not torch.isfinite(z).all():
                            raise Diverged(_not_finite(layer, first, low, z))
                        here = z.cpu()
                        files[layer][low:high] = here.view(torch.uint16).numpy() if dtype == torch.bfloat16 else here.numpy()
                if high == n or high - counted >= FLUSH_ROWS * ranks.size:
                    for file in files.values():
                        file.flush()
                    ranks.wait()
                    if ranks.rank == 0:
                        for pool in pools.values():
                            pool.count({"first": first, "rows": n, "done": high})
                    counted = high
                rate = (high - start) * context / max(time.monotonic() - begun, 1e-9)
                if ranks.rank == 0:
                    yield Progress("collect", (first + high) * context, (first + n) * context, rate=rate)
            ranks.wait()


def _not_finite(layer: int, first: int, low: int, z: Tensor) -> str:
    row, position = (int(i[0]) for i in (~torch.isfinite(z).all(-1)).nonzero(as_tuple=True))
    return (
        f"The model gives values that are not finite at blocks.{layer}.attn.hook_z, training row {first + low + row}, "
        f"position {position}; read it in float32 (--model-dtype float32), or look at that text."
    )


def about(lens: "Lens", rows: Rows, cfg: TrainConfig) -> dict[str, Any]:
    """What a store's activations are, but for the precision: two that agree in all of this hold the same z for the same row
    and layer."""
    return {
        "model": lens.info.fingerprint,
        "processing": lens.info.processing,
        "site": "hook_z, heads concatenated",
        "tokenizer": lens.tokenizer_fingerprint,
        "rows": rows.fingerprint,
        "context": rows.context,
        "row_start": rows.row_start,
        "pool_tokens": cfg.pool_tokens,
        "collect_rows": cfg.collect_rows,
    }


class Activations:
    """The pools that a training run left, as one range of training rows, for a harvest that sweeps the same rows."""

    def __init__(self, pools: list[Pool]) -> None:
        self._pools = [(pool.state["first"], pool.tensor()) for pool in pools]

    @classmethod
    def open(cls, store: Path, layer: int, wanted: dict[str, Any]) -> "Activations | None":
        """What a store holds of a layer, complete and contiguous from row 0; None if nothing is, or if the store holds
        other activations than those `wanted` (`about`): a cache may have been deleted and made anew under its name."""
        if Store(store).differing(wanted) != []:
            return None
        pools: list[Pool] = []
        for path in sorted((store / f"layer-{layer:02d}").glob("pool-*.npy")):
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
