"""The training loop, told top to bottom: collect, scale, step, checkpoint, calibrate, fold, save.

    x      = s z                          s makes the mean |x| equal sqrt(d_in)
    loss   = sum |x - x_hat|^2 / sum |x - mean|^2  +  aux_coef x AuxK          per batch
    update = Adam on W_enc, b_enc, W_dec, b_dec; the decoder's gradient loses its part along each unit row before the
             step, and rows are made unit again after it (Bricken et al. 2023)

At the end the threshold is calibrated on training tokens so that k features fire per token on average, and s is
folded into b_enc, b_dec and the threshold: the saved SAE reads raw z.
"""

import json
import math
import time
from collections import deque
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_core import checkpoint, sparse
from sae_core.activations import Pool
from sae_core.checkpoint import Checkpoint
from sae_core.config import SAEConfig, TrainConfig
from sae_core.corpus import Rows
from sae_core.errors import EmptyCorpus
from sae_core.progress import Progress
from sae_core.saes import ARCHITECTURES, SAE, save_sae
from sae_core.sparse import Gradients

if TYPE_CHECKING:
    from sae_core.lens import Lens

CALIBRATION_TOKENS = 131_072
REPORT_STEPS = 4  # steps between points of the curves


class Scaling(NamedTuple):
    """What the first pool says about z; fixed for the whole run."""

    scale: float
    """s: x = s z has mean norm sqrt(d_in)."""
    max_norm: float
    """|z| beyond which a position is excluded."""


class Stats(NamedTuple):
    """One step's figures."""

    fvu: float
    aux: float
    l0: float
    cut: float


class Trainer:
    """Parameters, optimizer and counters of a run; `step` is the whole update."""

    def __init__(self, cfg: TrainConfig, d_in: int, device: torch.device, step_dtype: torch.dtype) -> None:
        self.cfg, self.d_in, self.d_sae, self.step_dtype = cfg, d_in, cfg.expansion * d_in, step_dtype
        generator = torch.Generator().manual_seed(cfg.seed)
        W_dec = torch.randn(self.d_sae, d_in, generator=generator)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        self.W_dec = W_dec.to(device)
        self.W_enc_t = self.W_dec.clone()
        self.b_enc = torch.zeros(self.d_sae, device=device)
        self.b_dec = torch.zeros(d_in, device=device)
        self.parameters = {"W_enc_t": self.W_enc_t, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=cfg.lr, betas=(0.9, 0.999), fused=True)
        self.silent = torch.zeros(self.d_sae, dtype=torch.int64, device=device)  # tokens since each feature last fired
        self.cut = 0.0  # smallest value kept in the last batch
        self.steps_done = 0

    def step(self, x: Tensor, mean: Tensor, lr: float, k: float, dead_tokens: int) -> Stats:
        """One update on x [n, d_in] (scaled z) with `k` active features per token on average."""
        cfg, n = self.cfg, len(x)

        # forward
        centred = x - self.b_dec
        preacts = centred.to(self.step_dtype) @ self.W_enc_t.to(self.step_dtype).T + self.b_enc.to(self.step_dtype)
        code, self.cut = sparse.batch_top_k(preacts, int(n * k), self.cut)
        residual = sparse.decode(code, self.W_dec) + self.b_dec - x
        power = (x - mean).square().sum()
        fvu = residual.square().sum() / power

        # backward
        grads = sparse.backward(code, residual * (2.0 / power), x, self.W_enc_t, self.W_dec, self.b_dec)
        aux = 0.0
        dead = (self.silent >= dead_tokens).nonzero().squeeze(1)
        aux_k = cfg.aux_k if cfg.aux_k is not None else self.d_in // 2
        if aux_k and cfg.aux_coef and len(dead):
            loss, extra = sparse.auxiliary(preacts, dead, aux_k, -residual, x, self.W_enc_t, self.W_dec, self.b_dec)
            grads = Gradients(*(g.add_(e, alpha=cfg.aux_coef) for g, e in zip(grads, extra, strict=True)))
            aux = float(loss)

        # update; the decoder's rows move on the unit sphere
        grads.W_dec.sub_((grads.W_dec * self.W_dec).sum(1, keepdim=True) * self.W_dec)
        for name, parameter in self.parameters.items():
            parameter.grad = getattr(grads, name)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

        self.silent += n
        self.silent[code.feature] = 0
        self.steps_done += 1
        return Stats(float(fvu), aux, len(code.value) / n, self.cut)

    def state(self) -> Checkpoint:
        """Everything, to go on from here."""
        tensors = dict(self.parameters) | {"silent": self.silent}
        for name, parameter in self.parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if self.optimizer.state[parameter]:
                    tensors[f"{name}.{key}"] = self.optimizer.state[parameter][key]
        return Checkpoint(self.steps_done, tensors, {"cut": self.cut})

    def load(self, saved: Checkpoint) -> None:
        """Go on from `saved`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(saved.tensors[name])
            if f"{name}.exp_avg" in saved.tensors:
                moments = {key: saved.tensors[f"{name}.{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(saved.step))} | moments
        self.silent.copy_(saved.tensors["silent"])
        self.cut, self.steps_done = saved.facts["cut"], saved.step


def train(cfg: TrainConfig, lens: "Lens", rows: Rows, folder: Path) -> Generator[Progress, None, SAE]:
    """Train one SAE on z of `rows` at `cfg.site`; yields after every model pass and every step, returns the saved SAE.

    Everything it needs to go on is in `folder`: called again after any interruption it ends with the same weights, bit
    for bit on the CPU. Closing the generator writes a checkpoint first. The SAE is in `folder/sae`.
    """
    from sae_core.lens import resolve_dtype

    # ---- what is fixed for the run ----
    layer, device = cfg.site.layer, lens.device
    lens.check_layer(layer)
    d_in = lens.info.n_heads * lens.info.d_head
    facts = folder / "run.json"
    if not facts.exists():  # a resumed run keeps the precisions it began with, whatever a new probe would say
        folder.mkdir(parents=True, exist_ok=True)
        chosen = {name: str(resolve_dtype(getattr(cfg, name), device)) for name in ("model_dtype", "step_dtype")}
        facts.write_text(json.dumps(chosen))
    model_dtype, step_dtype = (getattr(torch, name.removeprefix("torch.")) for name in json.loads(facts.read_text()).values())

    context = rows.context
    n_rows = min(cfg.rows.tokens // context, len(rows.train))
    pool_rows = min(max(cfg.pool_tokens // context, 1), n_rows)
    steps_per_pool = [
        cfg.passes * (min(pool_rows, n_rows - first) * (context - 1) // cfg.batch) for first in range(0, n_rows, pool_rows)
    ]
    total = sum(steps_per_pool)
    if total == 0:
        raise EmptyCorpus(
            f"The corpus gives {n_rows * context} tokens, less than one batch of {cfg.batch}; add text or lower the batch.",
            field="corpus",
        )
    dead_tokens = cfg.dead_tokens or min(10_000_000, max(total * cfg.batch // 20, 8 * cfg.batch))

    # ---- where we are ----
    trainer = Trainer(cfg, d_in, device, step_dtype)
    saved = checkpoint.newest(folder / "checkpoints")
    if saved:
        trainer.load(saved)

    # ---- pool by pool: collect, then train on it `passes` times in a fresh order each time ----
    scaling: Scaling | None = None
    clock: deque[float] = deque([time.monotonic()], maxlen=16)
    first_step = 0
    for index, first in enumerate(range(0, n_rows, pool_rows)):
        last_step = first_step + steps_per_pool[index]
        pool = Pool(folder / f"pool-{index:04d}.npy")
        final = index == len(steps_per_pool) - 1
        if trainer.steps_done >= last_step and index > 0 and not final:
            first_step = last_step
            continue
        if not pool.complete:
            part = rows.train[first : min(first + pool_rows, n_rows)]
            for report in pool.collect(lens, part, first, layer, model_dtype, cfg.collect_rows):
                yield Progress(report.phase, report.done, n_rows * context, rate=report.rate)
        z = pool.tensor()
        scaling = scaling or _scaling(folder / "scaling.json", z, cfg.sink_norm)
        valid = _valid(z, scaling.max_norm)
        flat, mean = z.view(-1, d_in), _mean(z.view(-1, d_in), valid) * scaling.scale
        if trainer.steps_done == 0:
            trainer.b_dec.copy_(mean)

        per_pass = steps_per_pool[index] // cfg.passes
        order: tuple[int, Tensor] | None = None
        try:
            for step in range(max(first_step, trainer.steps_done), last_step):
                which, at = divmod(step - first_step, per_pass)
                if order is None or order[0] != which:
                    generator = torch.Generator().manual_seed((cfg.seed * 1_000_003 + index) * 1_009 + which)
                    order = (which, valid[torch.randperm(len(valid), generator=generator)])
                picked = torch.arange(at * cfg.batch, (at + 1) * cfg.batch) % len(valid)
                x = flat[order[1][picked]].to(device).float() * scaling.scale

                stats = trainer.step(x, mean, _lr(cfg, step, total), _k(cfg, step, total), dead_tokens)

                clock.append(time.monotonic())
                values = {}
                if step % REPORT_STEPS == 0 or step == total - 1:
                    dead = float((trainer.silent >= dead_tokens).float().mean())
                    values = {"loss": stats.fvu + cfg.aux_coef * stats.aux, "fvu": stats.fvu, "l0": stats.l0, "dead": dead}
                if trainer.steps_done % cfg.checkpoint_steps == 0 or trainer.steps_done == total:
                    checkpoint.save(folder / "checkpoints", trainer.state())
                rate = (len(clock) - 1) * cfg.batch / max(clock[-1] - clock[0], 1e-9)
                yield Progress("train", (step + 1) * cfg.batch, total * cfg.batch, rate=rate, values=values, step=step + 1)
        except GeneratorExit:
            checkpoint.save(folder / "checkpoints", trainer.state())
            raise
        first_step = last_step
        if not final:
            pool.delete()

    # ---- calibrate, fold, save ----
    assert scaling is not None  # total > 0, so the last pool was opened
    theta = _calibrate(trainer, flat, valid, scaling.scale, cfg.k)
    sae = _fold(trainer, theta, scaling, cfg, lens)
    save_sae(sae, folder / "sae")
    return sae


def _lr(cfg: TrainConfig, step: int, total: int) -> float:
    """Linear rise over the first `warmup` of the steps, flat, linear fall to 0 over the last `decay` of them."""
    rise = (step + 1) / max(cfg.warmup * total, 1.0)
    fall = (total - step) / max(cfg.decay * total, 1.0)
    return cfg.lr * min(1.0, rise, fall)


def _k(cfg: TrainConfig, step: int, total: int) -> float:
    """From 4k down to k over the first `k_anneal` of the steps: features find their place before they compete."""
    left = 1.0 - step / (cfg.k_anneal * total) if cfg.k_anneal else 0.0
    return cfg.k * (1.0 + 3.0 * max(0.0, left))


def _valid(z: Tensor, max_norm: float) -> Tensor:
    """int64: flat indices of the positions to train on: no row starts, none beyond `max_norm`."""
    keep = torch.cat([(part.float().norm(dim=-1) <= max_norm) for part in torch.split(z, 512)])
    keep[:, 0] = False
    return keep.view(-1).nonzero().squeeze(1)


def _mean(flat: Tensor, valid: Tensor) -> Tensor:
    """Mean z over the valid positions (fp64 sums), as float32 [d_in]."""
    sums = torch.stack([flat[part].double().sum(0) for part in torch.split(valid, 65_536)])
    return (sums.sum(0) / len(valid)).float()


def _scaling(path: Path, z: Tensor, sink_norm: float) -> Scaling:
    """Scale and norm limit, measured on the first pool once and kept on disk."""
    if not path.exists():
        norms = torch.cat([part[:, 1:].float().norm(dim=-1).flatten() for part in torch.split(z, 512)])
        max_norm = sink_norm * float(norms.median())
        scale = math.sqrt(z.shape[-1]) / float(norms[norms <= max_norm].mean())
        path.write_text(json.dumps({"scale": scale, "max_norm": max_norm}))
    return Scaling(**json.loads(path.read_text()))


def _calibrate(trainer: Trainer, flat: Tensor, valid: Tensor, scale: float, k: int) -> float:
    """The threshold on x at which k features fire per token, on average over a fixed sample of training tokens."""
    sample = valid[:: max(len(valid) // CALIBRATION_TOKENS, 1)][:CALIBRATION_TOKENS]
    weights, bias = trainer.W_enc_t.T.contiguous(), trainer.b_enc - trainer.b_dec @ trainer.W_enc_t.T
    candidates, low = [], 0.5 * trainer.cut
    for part in torch.split(sample, 8192):
        preacts = flat[part].to(bias.device).float() * scale @ weights + bias
        candidates.append(preacts[preacts > low])
    values, wanted = torch.cat(candidates), len(sample) * k
    return float(values.kthvalue(len(values) - wanted).values) if len(values) > wanted else low


def _fold(trainer: Trainer, theta: float, scaling: Scaling, cfg: TrainConfig, lens: "Lens") -> SAE:
    """The SAE on raw z: pre-activations, b_dec and thresholds divided by s, so that features are in units of z."""
    s, info = scaling.scale, lens.info
    tensors = {
        "W_enc": trainer.W_enc_t.T,
        "b_enc": trainer.b_enc / s,
        "W_dec": trainer.W_dec,
        "b_dec": trainer.b_dec / s,
        "threshold": torch.full((trainer.d_sae,), theta / s),
    }
    saved = SAEConfig(
        arch=cfg.arch, d_in=trainer.d_in, d_sae=trainer.d_sae, k=cfg.k, n_heads=info.n_heads, d_head=info.d_head,
        site=cfg.site, model=info.name, model_fingerprint=info.fingerprint, processing=info.processing,
        scale=s, max_norm=scaling.max_norm, context=cfg.rows.context, train=cfg,
    )  # fmt: skip
    return ARCHITECTURES[cfg.arch](saved, tensors).to(lens.device)
