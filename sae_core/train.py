"""The training loop, told top to bottom: collect, scale, step, checkpoint, calibrate, fold, save.

    x = s z          s makes the mean |x| equal sqrt(d_in), unless scaling is off

What a step does is in `trainer.py`, what a loss is in `saes/`. One stream of activations can feed many SAEs: of other
layers, architectures, sizes. A model pass then reads all layers asked for, and the runs train on each pool one after the
other, so that one SAE's parameters and moments are in memory at a time.

At the end a threshold that the batch decided in training is calibrated on training tokens, so that k features fire per
token on average, and s is folded into b_enc, b_dec and the thresholds: the saved SAE reads raw z.

    <folder>/run.json                     the precisions that `auto` meant when the run began
    <folder>/activations/                 z on disk (`activations.py`), unless a named cache holds it
    <folder>/runs/000/scaling.json        s and the norm limit
                     /checkpoints/        to go on from
                     /metrics.jsonl       one line per point of the curves
                     /sae/                the result
"""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_core import checkpoint
from sae_core.activations import Store, about
from sae_core.config import STREAM, SAEConfig, TrainConfig
from sae_core.corpus import Rows
from sae_core.errors import Diverged, EmptyCorpus, UsageError
from sae_core.machine import resolve_dtype
from sae_core.progress import Progress
from sae_core.ranks import ALONE, Ranks, Stopped
from sae_core.saes import ARCHITECTURES, SAE, load_sae, row_starts, save_sae
from sae_core.trainer import Stats, Trainer

if TYPE_CHECKING:
    from sae_core.lens import Lens

CALIBRATION_TOKENS = (
    32_768  # that a threshold is found on: a million firings at k = 32, which settle L0 to a quarter of a percent
)
CALIBRATION_ENTRIES = 2**24  # pre-activations held at once
SAMPLE_TOKENS = 65_536  # that the start of an SAE is computed from
REPORT_STEPS = 4  # steps between points of the curves
ACTIVATIONS = "activations"  # name of a run's own store, beside its runs


class Scaling(NamedTuple):
    """What the first pool says about z; fixed for the whole run."""

    scale: float
    """s: x = s z has mean norm sqrt(d_in)."""
    max_norm: float | None
    """|z| beyond which a position is excluded."""


def train(
    cfg: TrainConfig, lens: "Lens", rows: Rows, folder: Path, caches: Path | None = None, ranks: Ranks = ALONE
) -> Generator[Progress, None, SAE]:
    """Train one SAE on z of `rows` at `cfg.site`; yields after every model pass and every step, returns the saved SAE.

    Everything it needs to go on is in `folder`: called again after any interruption it ends with the same weights, bit
    for bit on the CPU. Closing the generator writes a checkpoint first. Named caches are folders in `caches`.
    """
    (sae,) = yield from train_many([cfg], lens, rows, folder, caches, ranks)
    return sae


def train_many(
    cfgs: Sequence[TrainConfig], lens: "Lens", rows: Rows, folder: Path, caches: Path | None = None, ranks: Ranks = ALONE
) -> Generator[Progress, None, list[SAE]]:
    """`train` for several SAEs on one stream of activations: the configs must agree in what is read (`STREAM`).

    Progress in `train` counts the tokens of all runs together and says whose values it brings.

    With several `ranks` each collects a part of every pool. Where there are as many runs as ranks, each rank then trains
    runs of its own, and reports of them alone; where there are fewer, all ranks train each run together, on a part of every
    batch, and rank 0 reports. The results are those of one process but for the order in which sums are rounded. A rank that
    is told to stop saves a checkpoint and raises Stopped.

    A run among several that diverges is given up, which a note says and `diverged` tells afterwards; the others go on, and
    their SAEs are what is returned. Raises Diverged where none is left.
    """
    together = len(cfgs) < ranks.size
    # ---- what is fixed for the run: refused here, if at all, before anything is read ----
    for name in STREAM:
        if len({repr(getattr(cfg, name)) for cfg in cfgs}) > 1:
            raise UsageError(f"Runs on one stream of activations must agree in {name}.", field=name)
    for cfg in cfgs:
        lens.check_layer(cfg.site.layer)
        cfg.check_width(lens.info.n_heads * lens.info.d_head)
    stream = _Stream(cfgs[0], lens, rows, folder, caches)
    dtypes = ranks.in_turn(lambda: _dtypes(cfgs, lens, folder / "run.json", stream))
    by = ranks if together else ranks.alone()
    runs = ranks.in_turn(lambda: [_Run(cfg, i, lens, stream, folder, dtypes[i + 1], by) for i, cfg in enumerate(cfgs)])
    mine = [run for run in runs if together or ranks.mine(run.index)]
    for run in mine:
        run.as_of_all = partial(_of_all, runs=runs, mine=mine, run=run)
    parts = about(lens, rows, cfgs[0]) | {"dtype": str(dtypes[0]).removeprefix("torch.")}
    ranks.in_turn(lambda: stream.store.claim(parts))

    # ---- pool by pool: collect for every layer, then train each SAE on it ----
    for index in range(len(stream.starts)):
        waiting = [run for run in runs if run.needs(index)]
        layers = sorted({run.cfg.site.layer for run in waiting})
        yield from stream.collect(index, layers, dtypes[0], ranks)
        for layer in layers:
            read = _Read(stream.store.pool(layer, index).tensor(), stream.starts_in(index))
            for run in waiting:
                if run.cfg.site.layer == layer and run in mine:
                    try:
                        yield from run.train_on(read, index)  # `from`, so that what a caller throws in reaches the steps
                    except Diverged as error:
                        if together or len(runs) == 1:
                            raise
                        yield run.given_up(error)
        for run in waiting:
            run.passed(index)
        ranks.wait()
        if ranks.rank == 0 and index < len(stream.starts) - 1 and stream.own:
            for layer in layers:
                stream.store.pool(layer, index).delete()
    lost = [diverged(folder, run.index) for run in runs]
    if all(lost):
        raise Diverged(lost[0] or "")
    return [load_sae(made_by(folder, run.index), lens.device) for run, why in zip(runs, lost, strict=True) if why is None]


def made_by(folder: Path, index: int) -> Path:
    """Where the SAE of a run's number `index` is saved."""
    return folder / "runs" / f"{index:03d}" / "sae"


def diverged(folder: Path, index: int) -> str | None:
    """Why a run's number `index` was given up; None where it was not."""
    path = folder / "runs" / f"{index:03d}" / "diverged.txt"
    return path.read_text() if path.exists() else None


def curve_of(folder: Path, index: int) -> list[tuple[int, dict[str, float]]]:
    """The curves of a run's number `index`: (step, values by name)."""
    path = folder / "runs" / f"{index:03d}" / "metrics.jsonl"
    points = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(point.pop("step"), point) for point in points]


def activations_of(cfg: TrainConfig, folder: Path, caches: Path | None) -> Path:
    """Where a run in `folder` keeps the activations it reads."""
    return folder / ACTIVATIONS if cfg.cache is None else (caches or folder.parent) / cfg.cache


class _Stream:
    """The activations that all runs read, pool by pool."""

    def __init__(self, cfg: TrainConfig, lens: "Lens", rows: Rows, folder: Path, caches: Path | None) -> None:
        self.cfg, self.lens, self.rows, self.own = cfg, lens, rows, cfg.cache is None
        self.store = Store(activations_of(cfg, folder, caches))
        self.n_rows = min(cfg.rows.tokens // rows.context, len(rows.train))
        self.pool_rows = min(max(cfg.pool_tokens // rows.context, 1), max(self.n_rows, 1))
        self.starts = range(0, self.n_rows, self.pool_rows)

    def rows_in(self, index: int) -> int:
        """Rows in a pool."""
        return min(self.pool_rows, self.n_rows - self.starts[index])

    def starts_in(self, index: int) -> Tensor:
        """bool [rows, pos] of a pool: where its rows begin, or begin anew."""
        first = self.starts[index]
        return row_starts(self.rows.train[first : first + self.rows_in(index)], self.rows.row_start)

    def collect(self, index: int, layers: Sequence[int], dtype: torch.dtype, ranks: Ranks) -> Iterator[Progress]:
        """Fill a pool for the layers that lack it."""
        first = self.starts[index]
        part = self.rows.train[first : first + self.rows_in(index)]
        total = self.n_rows * self.rows.context
        for report in self.store.collect(self.lens, part, first, layers, index, dtype, self.cfg.collect_rows, ranks):
            yield Progress(report.phase, report.done, total, rate=report.rate)


def _dtypes(cfgs: Sequence[TrainConfig], lens: "Lens", path: Path, stream: _Stream) -> list[torch.dtype]:
    """Precision of the model pass, then of each run's step. A resumed run keeps those it began with, whatever a new probe
    would say, and a run that reads a cache takes the cache's."""

    if not path.exists():
        chosen = [resolve_dtype(cfgs[0].model_dtype, lens.device), *(resolve_dtype(c.step_dtype, lens.device) for c in cfgs)]
        names = [str(dtype).removeprefix("torch.") for dtype in chosen]
        held = stream.store.folder / "about.json"
        if cfgs[0].model_dtype == "auto" and held.exists():
            names[0] = json.loads(held.read_text())["dtype"]
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".aside")
        aside.write_text(json.dumps(names))
        aside.rename(path)
    return [getattr(torch, name) for name in json.loads(path.read_text())]


class _Read:
    """A pool of one layer's z, and which of its positions are trained on."""

    def __init__(self, z: Tensor, starts: Tensor) -> None:
        self.z, self.starts, self.flat = z, starts, z.view(-1, z.shape[-1])
        self._found: dict[tuple[float | None, bool], tuple[Tensor, Tensor]] = {}

    def positions(self, max_norm: float | None, exclude_start: bool) -> tuple[Tensor, Tensor]:
        """int64: flat indices of the positions to train on, and the mean z over them (fp64 sums), float32 [d_in]."""
        key = (max_norm, exclude_start)
        if key not in self._found:
            limit = math.inf if max_norm is None else max_norm
            keep = torch.cat([part.float().norm(dim=-1) <= limit for part in torch.split(self.z, 512)])
            if exclude_start:
                keep &= ~self.starts
            valid = keep.view(-1).nonzero().squeeze(1)
            sums = torch.stack([self.flat[part].double().sum(0) for part in torch.split(valid, 65_536)])
            self._found[key] = valid, (sums.sum(0) / len(valid)).float()
        return self._found[key]


class _Run:
    """One SAE of a stream: its place in the schedule and its folder."""

    def __init__(
        self,
        cfg: TrainConfig,
        index: int,
        lens: "Lens",
        stream: _Stream,
        folder: Path,
        step_dtype: torch.dtype,
        ranks: Ranks,
    ) -> None:
        self.cfg, self.index, self.lens, self.ranks, self.step_dtype = cfg, index, lens, ranks, step_dtype
        self.folder = folder / "runs" / f"{index:03d}"
        self.folder.mkdir(parents=True, exist_ok=True)
        in_row = stream.rows.context - int(cfg.exclude_start)
        per_pool = [cfg.passes * (stream.rows_in(i) * in_row // cfg.batch) for i in range(len(stream.starts))]
        self.bounds = [sum(per_pool[:i]) for i in range(len(per_pool) + 1)]
        self.total = self.bounds[-1]
        if self.total == 0:
            raise EmptyCorpus(
                f"The corpus gives {stream.n_rows * stream.rows.context} tokens, less than one batch of {cfg.batch}; "
                "add text or lower the batch.",
                field="corpus",
            )
        self.dead_tokens = cfg.dead_tokens or min(10_000_000, max(self.total * cfg.batch // 20, 8 * cfg.batch))
        saved, self._notes = checkpoint.newest(self.folder / "checkpoints")  # drops what cannot be read
        self.steps_done = saved.step if saved else 0
        self.as_of_all: Callable[[Progress], Progress] = lambda report: report
        self.done = (self.folder / "sae" / "cfg.json").exists() or (self.folder / "diverged.txt").exists()

    def needs(self, pool: int) -> bool:
        """Whether there are steps to do on a pool; the last one calibrates too, the first one scales."""
        if self.done:
            return False
        first = pool == 0 and not (self.folder / "scaling.json").exists()
        return first or self.steps_done < self.bounds[pool + 1] or pool == len(self.bounds) - 2

    def passed(self, pool: int) -> None:
        """A pool has been trained on, perhaps by another rank."""
        self.steps_done = max(self.steps_done, self.bounds[pool + 1])
        self.done = self.done or pool == len(self.bounds) - 2

    def train_on(self, read: _Read, pool: int) -> Iterator[Progress]:
        """The steps of one pool, from wherever they were left; after the last pool's the SAE is saved."""
        cfg, lens, d_in = self.cfg, self.lens, read.flat.shape[-1]
        scaling = self.ranks.in_turn(lambda: _scaling(self.folder / "scaling.json", read, cfg))
        valid, mean_z = read.positions(scaling.max_norm, cfg.exclude_start)
        mean = mean_z.to(lens.device) * scaling.scale

        def x_at(positions: Tensor) -> Tensor:
            return read.flat[positions].to(lens.device).float() * scaling.scale

        def draw(n: int, seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return x_at(valid[torch.randint(len(valid), (n,), generator=generator)])

        trainer = Trainer(cfg, d_in, lens.device, self.step_dtype, self.ranks)
        saved, _ = checkpoint.newest(self.folder / "checkpoints")
        while self._notes:
            note = self._notes.pop(0)
            if self.ranks.rank == 0:
                yield self._report(note=note)
        if saved:
            trainer.load(saved)
        else:
            sample = valid[:: max(len(valid) // SAMPLE_TOKENS, 1)][:SAMPLE_TOKENS]
            trainer.recipe.begin(x_at(sample), mean)
            for parameter in trainer.parameters.values():
                self.ranks.same(parameter)
        curve = _Curve(self.folder / "metrics.jsonl", trainer.steps_done) if self.ranks.rank == 0 else None

        # ---- the steps: `passes` times over the pool, in a fresh order each time ----
        start, end = self.bounds[pool], self.bounds[pool + 1]
        per_pass = max((end - start) // cfg.passes, 1)
        order: tuple[int, Tensor] | None = None
        clock: deque[float] = deque([time.monotonic()], maxlen=16)
        try:
            for step in range(max(start, trainer.steps_done), end):
                if self.ranks.stop():
                    self._save(trainer)
                    raise Stopped
                which, at = divmod(step - start, per_pass)
                if order is None or order[0] != which:
                    generator = torch.Generator().manual_seed((cfg.seed * 1_000_003 + pool) * 1_009 + which)
                    order = (which, valid[torch.randperm(len(valid), generator=generator)])
                picked = torch.arange(at * cfg.batch, (at + 1) * cfg.batch) % len(valid)
                x = x_at(order[1][picked[self.ranks.part(cfg.batch)]])

                k, l1 = _k(cfg, step, self.total), _l1(cfg, step, self.total)
                rate = trainer.rate(step, self.total)
                stats = trainer.step(x, mean, rate, k, self.dead_tokens, l1=l1, tokens=cfg.batch)
                revived = trainer.count_firings(cfg.batch, draw)

                self.steps_done = trainer.steps_done
                clock.append(time.monotonic())
                values = {}
                if step % REPORT_STEPS == 0 or step == self.total - 1:
                    values = self._values(stats, trainer)
                    if curve:
                        curve.add(step + 1, values | {"lr": rate, "k": k})
                if trainer.steps_done % cfg.checkpoint_steps == 0 or trainer.steps_done == end:
                    self._save(trainer)
                speed = (len(clock) - 1) * cfg.batch / max(clock[-1] - clock[0], 1e-9)
                said = f"Step {step + 1}: pointed {revived} dead features elsewhere." if revived else None
                if self.ranks.rank == 0:
                    yield self._report(speed, values, said)
        except GeneratorExit:
            self._save(trainer)
            raise

        # ---- the end: calibrate, fold, save ----
        if pool == len(self.bounds) - 2 and self.ranks.rank == 0:
            tensors = trainer.recipe.tensors()
            if trainer.recipe.calibrated:
                tensors["threshold"] = torch.full_like(tensors["threshold"], _calibrate(tensors, x_at, valid, cfg.k))
            save_sae(_fold(tensors, scaling, cfg, lens), self.folder / "sae")

    def _values(self, stats: Stats, trainer: Trainer) -> dict[str, float]:
        """The step's figures as numbers; raises Diverged where they are none."""
        values = {name: float(value) for name, value in stats.values.items()}
        if not math.isfinite(values["loss"]):
            self._diverged(f"gave a loss of {values['loss']}")
        return values | {"dead": float((trainer.silent >= self.dead_tokens).float().mean())}

    def _save(self, trainer: Trainer) -> None:
        """A checkpoint; never one of parameters that are no numbers."""
        if not trainer.finite():
            self._diverged("made parameters that are not finite")
        if self.ranks.rank == 0:
            checkpoint.save(self.folder / "checkpoints", trainer.state())

    def _diverged(self, what: str) -> None:
        kept = checkpoint.newest_step(self.folder / "checkpoints")
        last = (
            f"The last good checkpoint is step {kept}, in {self.folder / 'checkpoints'}" if kept else "No checkpoint was kept yet"
        )
        raise Diverged(
            f"Training on {self.cfg.site.hook} {what} at step {self.steps_done}. {last}; lower lr, or train with "
            "step_dtype float32."
        )

    def given_up(self, error: Diverged) -> Progress:
        """Leave the run as it is for good; a report that says so."""
        (self.folder / "diverged.txt").write_text(str(error))
        self.done = True
        return self._report(note=f"{error} It is given up; the other runs go on.")

    def _report(self, rate: float = 0.0, values: dict[str, float] | None = None, note: str | None = None) -> Progress:
        batch, step = self.cfg.batch, self.steps_done if values else None
        report = Progress("train", self.steps_done * batch, self.total * batch, "tokens", rate, values or {}, step, note=note)
        return self.as_of_all(report)


def _of_all(report: Progress, runs: Sequence[_Run], mine: Sequence[_Run], run: _Run) -> Progress:
    """A run's report as a report of all runs, of which this rank knows how far its own are."""
    if len(runs) == 1:
        return report
    done = sum(r.steps_done * r.cfg.batch for r in mine)
    total = sum(r.total * r.cfg.batch for r in runs)
    return Progress("train", done, total, "tokens", report.rate, report.values, report.step, run.index, report.note)


class _Curve:
    """`metrics.jsonl`: a line of figures per point. Lines after the step that a run goes on from are dropped."""

    def __init__(self, path: Path, steps_done: int) -> None:
        self._path = path
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= steps_done]
            path.write_text("".join(f"{line}\n" for line in kept))

    def add(self, step: int, values: dict[str, float]) -> None:
        """One line."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")


def _k(cfg: TrainConfig, step: int, total: int) -> float:
    """From 4k down to k over the first `k_anneal` of the steps: features find their place before they compete."""
    left = 1.0 - step / (cfg.k_anneal * total) if cfg.k_anneal else 0.0
    return cfg.k * (1.0 + 3.0 * max(0.0, left))


def _l1(cfg: TrainConfig, step: int, total: int) -> float:
    """The penalty's share of its weight: from 0 to 1 over the first `l1_warmup` of the steps."""
    return min(1.0, (step + 1) / max(cfg.l1_warmup * total, 1.0))


def _scaling(path: Path, read: _Read, cfg: TrainConfig) -> Scaling:
    """Scale and norm limit, measured on the first pool once and kept on disk."""
    if not path.exists():
        norms = torch.cat([part.float().norm(dim=-1) for part in torch.split(read.z, 512)])
        norms = norms[~read.starts] if cfg.exclude_start else norms.flatten()
        max_norm = None if cfg.sink_norm is None else cfg.sink_norm * float(norms.median())
        kept = norms if max_norm is None else norms[norms <= max_norm]
        scale = math.sqrt(read.z.shape[-1]) / float(kept.mean()) if cfg.scaling else 1.0
        aside = path.with_suffix(".aside")
        aside.write_text(json.dumps({"scale": scale, "max_norm": max_norm}))
        aside.rename(path)
    return Scaling(**json.loads(path.read_text()))


def _calibrate(tensors: dict[str, Tensor], x_at: Callable[[Tensor], Tensor], valid: Tensor, k: int) -> float:
    """The threshold on x at which k features fire per token, on average over a fixed sample of training tokens.

    Only the largest entries can decide it: the first part's 4k largest per token bound the answer from below, and cut off
    the rest of every part. Parts are small, so that neither pre-activations nor their sorting fill the memory.
    """
    sample = valid[:: max(len(valid) // CALIBRATION_TOKENS, 1)][:CALIBRATION_TOKENS]
    weights, bias = tensors["W_enc"], tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]
    candidates: list[Tensor] = []
    low = 0.0
    for part in torch.split(sample, max(CALIBRATION_ENTRIES // weights.shape[1], 1)):
        preacts = x_at(part) @ weights + bias
        if not candidates:
            count = min(4 * k * len(part), preacts.numel())
            low = max(float(preacts.flatten().topk(count, sorted=False).values.min()), 0.0)
        candidates.append(preacts[preacts > low])
    values, wanted = torch.cat(candidates), len(sample) * k
    return float(values.topk(wanted + 1, sorted=False).values.min()) if len(values) > wanted else low


def _fold(tensors: dict[str, Tensor], scaling: Scaling, cfg: TrainConfig, lens: "Lens") -> SAE:
    """The SAE on raw z: pre-activations, b_dec and thresholds divided by s, so that features are in units of z."""
    s, info = scaling.scale, lens.info
    folded = tensors | {name: tensors[name] / s for name in ("b_enc", "b_dec", "threshold")}
    d_in, d_sae = tensors["W_enc"].shape
    saved = SAEConfig(
        arch=cfg.arch, d_in=d_in, d_sae=d_sae, k=cfg.k, n_heads=info.n_heads, d_head=info.d_head,
        site=cfg.site, model=info.name, model_fingerprint=info.fingerprint, processing=info.processing,
        scale=s, max_norm=scaling.max_norm, exclude_start=cfg.exclude_start, context=cfg.rows.context, train=cfg,
    )  # fmt: skip
    return ARCHITECTURES[cfg.arch](saved, folded).to(lens.device)
