"""What an activation cache on disk costs a training step, and what it saves a second run.

`cache_vs_memory`: tokens per second of the steps of a real `train()` that reads a named cache, as a share of the same
steps (`Trainer.step`, same config) on activations that lie in memory as ready batches: shuffled, scaled, float32. A step
from the cache reads its tokens at random places of a memory-mapped file, widens and scales them, reports, and writes the
curve. The two advance in turns, a block of four steps each; the median over pairs of blocks is the figure. The file is
thrown out of the system's page cache first, where the system lets us.

`cache_vs_recompute`: seconds of a first run, which passes the text through the model, over seconds of a second run of the
same config, which finds the cache. Its bound is (model pass + steps) / steps of the first run: what would be left if
reading cost nothing. Both train once over the tokens; the model is loaded and the text is tokens before. Two rounds.

SmolLM2-135M-Instruct, d_sae 4,608, k = 32, batch 4,096, in the precisions that `auto` chooses here. AuxK stays out of it
(no feature is called dead). `layer=17` takes another layer than 17, `steps=25` the steps of one run over the tokens.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench import _smollm2
from sae_core.config import RowsConfig, Site, TrainConfig
from sae_core.machine import resolve_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from sae_core.corpus import Rows
    from sae_core.lens import Lens

CONTEXT, BATCH, BLOCK, ROUNDS = 128, 4096, 4, 2
NEVER = 1_000_000_000  # tokens after which a feature is dead


def run(layer: int = 17, steps: int = 25) -> dict[str, dict[str, object]]:
    """Fill a cache, read it, and compare."""
    lens = _smollm2.lens()
    n_rows = -(-steps * BATCH // (CONTEXT - 1))
    shape = RowsConfig(context=CONTEXT, tokens=n_rows * CONTEXT, heldout_tokens=0)
    with tempfile.TemporaryDirectory(prefix="headscope-bench-") as name:
        place = Path(name)
        rows = _smollm2.rows(lens, shape, place / "rows")
        first, second, passes, trains = [], [], [], []
        for i in range(ROUNDS):
            cfg = _config(layer, shape, f"round-{i}")
            phases = _phases(cfg, lens, rows, place, f"first-{i}")
            first.append(sum(phases.values()))
            passes.append(phases["collect"])
            trains.append(first[-1] - phases["collect"])
            second.append(sum(_phases(cfg, lens, rows, place, f"second-{i}").values()))
        shares, speed = _shares(_config(layer, shape, "round-0", repeats=4), lens, rows, place)
        size = sum(file.stat().st_size for file in (place / "caches" / "round-0").rglob("*.npy"))
    gains = [a / b for a, b in zip(first, second, strict=True)]
    bounds = [(p + t) / t for p, t in zip(passes, trains, strict=True)]
    return {
        "cache_vs_memory": {"value": round(statistics.median(shares), 3), "unit": "x", "target": ">= 0.9"},
        "cache_vs_recompute": {"value": round(statistics.median(gains), 2), "unit": "x", "target": None},
        "cache_vs_recompute_bound": {"value": round(statistics.median(bounds), 2), "unit": "x", "target": None},
        "speed_from_cache": {"value": round(speed), "unit": "tokens/s", "target": None},
        "bytes_per_token": {"value": round(size / (n_rows * CONTEXT)), "unit": "B", "target": None},
    }


def _config(layer: int, shape: RowsConfig, cache: str, repeats: int = 1) -> TrainConfig:
    return TrainConfig(
        model=_smollm2.NAME,
        corpus="demo-text",
        site=Site(layer=layer),
        rows=shape,
        expansion=8,
        k=32,
        batch=BATCH,
        passes=repeats,
        dead_tokens=NEVER,
        checkpoint_steps=NEVER,
        cache=cache,
        harvests=(),
    )


def _phases(cfg: TrainConfig, lens: "Lens", rows: "Rows", place: Path, name: str) -> dict[str, float]:
    """Seconds of a whole training run by what went on: `collect`, `train`, and `end` for calibration and saving."""
    from sae_core.train import train

    phases = {"collect": 0.0, "train": 0.0}
    mark = time.perf_counter()
    for report in train(cfg, lens, rows, place / name, place / "caches"):
        now = time.perf_counter()
        phases[report.phase] += now - mark
        mark = now
    phases["end"] = time.perf_counter() - mark
    shown = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases.items())
    print(f"  {name}: {sum(phases.values()):.1f} s ({shown})", file=sys.stderr, flush=True)
    return phases


def _shares(cfg: TrainConfig, lens: "Lens", rows: "Rows", place: Path) -> tuple[list[float], float]:
    """Speed from the cache as a share of speed in memory, block by block, and the median speed from the cache."""
    import torch

    from sae_core.activations import Store
    from sae_core.train import train

    caches = place / "caches"
    z = Store(caches / str(cfg.cache)).pool(cfg.site.layer, 0).tensor()
    x, scale = _in_memory(z)
    print(f"  cached in {str(z.dtype).removeprefix('torch.')}, |z| scaled by {scale:.3f}", file=sys.stderr, flush=True)
    n_steps = len(x) // BATCH * cfg.passes
    memory = _memory_steps(cfg, x, n_steps, lens.device)
    del z
    _forget(next((caches / str(cfg.cache)).rglob("*.npy")))
    running = train(cfg, lens, rows, place / "paired", caches)
    next(running)  # opening the file, finding the scale, and one step
    next(memory)
    cached_times, memory_times = [], []
    for _ in range(n_steps // BLOCK - 1):
        for steps, times in ((running, cached_times), (memory, memory_times)):
            begun = time.perf_counter()
            for _ in range(BLOCK):
                next(steps)
            times.append(time.perf_counter() - begun)
    running.close()
    assert torch.is_tensor(x)  # kept until here, as the steps in memory read it
    shares = [in_memory / cached for in_memory, cached in zip(memory_times, cached_times, strict=True)]
    return shares, BLOCK * BATCH / statistics.median(cached_times)


def _in_memory(z: "Tensor") -> "tuple[Tensor, float]":
    """z [rows, context, d_in] as training sees it, ready in memory: scaled, shuffled, float32 [n, d_in]; and the scale."""
    import torch

    flat = z[:, 1:].reshape(-1, z.shape[-1]).float()
    norms = flat.norm(dim=1)
    flat = flat[norms <= 10 * norms.median()]
    scale = z.shape[-1] ** 0.5 / float(norms.mean())
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
    return flat[order] * scale, scale


def _memory_steps(cfg: TrainConfig, x: "Tensor", n: int, device: object) -> Iterator[None]:
    """The same steps on ready batches."""
    import torch

    from sae_core.trainer import Trainer

    place = torch.device(str(device))
    trainer = Trainer(cfg, x.shape[1], place, resolve_dtype(cfg.step_dtype, place))
    mean = x.mean(0)
    trainer.recipe.begin(x[:BATCH], mean)
    for step in range(n):
        at = step % (len(x) // BATCH) * BATCH
        trainer.step(x[at : at + BATCH], mean, trainer.rate(step, n), cfg.k, NEVER)
        yield


def _forget(path: Path) -> None:
    """Drop a file from the system's page cache, where the system can (not on macOS)."""
    if hasattr(os, "posix_fadvise"):
        os.sync()
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
