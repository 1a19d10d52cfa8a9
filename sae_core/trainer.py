"""One SAE in training: a recipe's parameters, Adam, and the counters that say which features are dead.

    update = Adam on all parameters; the decoder's gradient loses its part along each unit row before the step, and rows
             are made unit again after it (Bricken et al. 2023)

`step` is the whole update. Everything that a run needs to go on bit for bit is in `state()`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core.checkpoint import Checkpoint
from sae_core.config import TrainConfig
from sae_core.ranks import ALONE, Ranks
from sae_core.saes import RECIPES
from sae_core.saes.recipe import Batch

RESTART_STEPS = 1000  # of the published schedule: the rate's cosine rise, at the start and after each resampling
RESTART_FLOOR = 0.1  # ... and what it starts from
RESAMPLE_BATCHES = 100  # drawn to find inputs that are rebuilt badly
RESAMPLE_SCALE = 0.2  # new encoder rows, as a share of the mean norm of the living


class Stats(NamedTuple):
    """One step's figures: 0-d tensors, so that a GPU is not waited for at every step."""

    loss: Tensor
    fvu: Tensor
    l0: Tensor
    values: dict[str, Tensor]
    """All of them by name, those that only one architecture has too."""


class Trainer:
    """Parameters, optimizer and counters of a run; `step` is the whole update."""

    def __init__(self, cfg: TrainConfig, d_in: int, device: torch.device, step_dtype: torch.dtype, ranks: Ranks = ALONE) -> None:
        cfg.check_width(d_in)
        self.cfg, self.d_in, self.d_sae, self.ranks = cfg, d_in, cfg.expansion * d_in, ranks
        self.recipe = RECIPES[cfg.arch](cfg, d_in, device, step_dtype)
        self.parameters = self.recipe.parameters
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)
        self.silent = torch.zeros(self.d_sae, dtype=torch.int64, device=device)  # tokens since each feature last fired
        self.counts = torch.zeros(self.d_sae, dtype=torch.int64, device=device)  # firings since `counted_from`
        self.counted_from = 0  # step
        self.steps_done = 0
        self.restarted_at = 0  # step of the last restart of the learning rate
        self.resampled = 0  # times

    def step(
        self, x: Tensor, mean: Tensor, lr: float, k: float, dead_tokens: int, *, l1: float = 1.0, tokens: int | None = None
    ) -> Stats:
        """One update on x [n, d_in] (scaled z), this rank's part of a batch of `tokens`, with `k` active features per
        token on average (top-k family) or `l1` of the penalty's weight (relu, gated)."""
        recipe = self.recipe
        dead = (self.silent >= dead_tokens).nonzero().squeeze(1)
        found = recipe.gradients(Batch(x, mean, k, l1, dead, self.ranks))
        fired = self.ranks.sum(found.fired)

        recipe.on_the_sphere(found.gradients["W_dec"])
        for name, parameter in self.parameters.items():
            parameter.grad = self.ranks.sum(found.gradients[name])
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        recipe.normalise()

        self.silent += len(x) if tokens is None else tokens
        self.silent[fired > 0] = 0
        self.counts += fired
        self.steps_done += 1
        return Stats(found.values["loss"], found.values["fvu"], found.values["l0"], found.values)

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step of `total`: the config's schedule."""
        cfg = self.cfg
        if cfg.schedule == "restarts":
            done = min((step - self.restarted_at) / RESTART_STEPS, 1.0)
            return cfg.lr * (RESTART_FLOOR + (1 - RESTART_FLOOR) * (1 - math.cos(math.pi * done)) / 2)
        rise = (step + 1) / max(cfg.warmup * total, 1.0)
        fall = (total - step) / max(cfg.decay * total, 1.0)
        return cfg.lr * min(1.0, rise, fall)

    # ---- resampling (Kissane et al. 2024, after Bricken et al. 2023) ----

    def count_firings(self, batch: int, draw: Callable[[int, int], Tensor]) -> int:
        """After a step: keep the window of firings, and resample when it is time; how many features were.

        `draw(n, seed)` gives n of the pool's x. Firings count over the second half of the steps between resamplings.
        """
        cfg, every = self.cfg, self.cfg.resample_steps
        if not every or self.resampled >= cfg.resample_times:
            return 0
        within = self.steps_done % every
        if within == every // 2:
            self.counts.zero_()
            self.counted_from = self.steps_done
        if within:
            return 0
        seen = (self.steps_done - self.counted_from) * batch
        dead = (self.counts <= cfg.dead_frequency * seen).nonzero().squeeze(1)
        self.resampled += 1
        self.restarted_at = self.steps_done
        if len(dead):
            self._resample(dead, draw(RESAMPLE_BATCHES * batch, cfg.seed * 1_000_003 + self.steps_done))
        return len(dead)

    def _resample(self, dead: Tensor, x: Tensor) -> None:
        """Point dead features at inputs that are rebuilt badly: drawn without replacement with probability proportional
        to the squared loss, as unit decoder rows; encoder rows at RESAMPLE_SCALE of the living's mean norm; Adam's moments
        of both, and b_enc, from zero."""
        recipe = self.recipe
        losses = torch.cat([self._losses(part) for part in torch.split(x, self.cfg.batch)])
        weights = losses.double().square().cpu()
        generator = torch.Generator().manual_seed(self.cfg.seed + self.steps_done)
        dead = dead[: int((weights > 0).sum())]  # never more than there are inputs to point at
        chosen = self.ranks.same(torch.multinomial(weights, len(dead), generator=generator).to(x.device))
        toward = x[chosen] - recipe.b_dec
        toward = toward / toward.norm(dim=1, keepdim=True).clamp_min(1e-8)
        alive = torch.ones(self.d_sae, dtype=torch.bool, device=x.device)
        alive[dead] = False
        norm = recipe.W_enc_t[alive].norm(dim=1).mean() if alive.any() else torch.ones((), device=x.device)
        recipe.W_dec[dead] = toward
        recipe.W_enc_t[dead] = toward * norm * RESAMPLE_SCALE
        recipe.b_enc[dead] = 0
        for name in ("W_dec", "W_enc_t", "b_enc"):
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[self.parameters[name]][moment][dead] = 0
        self.silent[dead] = 0

    def _losses(self, x: Tensor) -> Tensor:
        """|x - x_hat|^2 of each x [n, d_in], by a ReLU SAE (the one architecture that resamples)."""
        recipe = self.recipe
        x_hat: Tensor = torch.relu(recipe.preacts(x).float()) @ recipe.W_dec + recipe.b_dec
        return (x_hat - x).square().sum(1)

    # ---- on disk ----

    def state(self) -> Checkpoint:
        """Everything, to go on from here."""
        tensors = dict(self.parameters) | {"silent": self.silent, "counts": self.counts}
        for name, parameter in self.parameters.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if self.optimizer.state[parameter]:
                    tensors[f"{name}.{key}"] = self.optimizer.state[parameter][key]
        facts = {name: getattr(self, name) for name in ("counted_from", "restarted_at", "resampled")}
        return Checkpoint(self.steps_done, tensors, facts | {"recipe": dict(self.recipe.facts)})

    def load(self, saved: Checkpoint) -> None:
        """Go on from `saved`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(saved.tensors[name])
            if f"{name}.exp_avg" in saved.tensors:
                moments = {key: saved.tensors[f"{name}.{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(saved.step), device=parameter.device)} | moments
        self.silent.copy_(saved.tensors["silent"])
        self.counts.copy_(saved.tensors["counts"])
        for name in ("counted_from", "restarted_at", "resampled"):
            setattr(self, name, saved.facts[name])
        self.recipe.facts.update(saved.facts["recipe"])
        self.steps_done = saved.step

    def finite(self) -> bool:
        """Whether every parameter is a number."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters.values())
