"""ReLU with an L1 penalty, the paper's own (Kissane et al. 2024, section 2; Bricken et al. 2023).

    f     = ReLU((x - b_dec) W_enc + b_enc)
    x_hat = f W_dec + b_dec
    loss  = mean over tokens of sum_d (x_hat - x)^2  +  l1 x mean over tokens of sum_i f_i

summed over dimensions and averaged over tokens, which is what the published weights of the penalty refer to. The
published recipe (raw z, untied start, b_dec from zero, cosine restarts, resampling of dead features) is what the
`kissane-...` presets set. With l1 = None the weight is not fixed but led: see `L1Weight`.
"""

import math

import torch
from torch import Tensor

from sae_core.config import TrainConfig
from sae_core.saes.base import SAE
from sae_core.saes.recipe import Batch, Recipe, Step

PULL, GAIN, SMOOTH = 2.0, 0.03, 0.8  # of the led weight; measured on known dictionaries (LOG.md)


class ReLUSAE(SAE):
    """f = ReLU(preact): the thresholds are 0."""


class L1Recipe(Recipe):
    """What the two architectures with an L1 penalty share: its weight.

    A given `l1` is kept. Without one the weight follows L0: with e the smoothed log(L0 / k), at most 1 in size,

        weight = base x exp(PULL e),    base <- base x exp(GAIN log(L0 / k))  after each step

    so too many active features raise it, too few lower it, and at rest L0 = k. The first factor acts at once and damps what
    the second, which alone finds the level, would overshoot. So architectures can be compared at equal L0 without a search
    over weights.
    """

    def __init__(self, cfg: TrainConfig, d_in: int, device: torch.device, step_dtype: torch.dtype) -> None:
        super().__init__(cfg, d_in, device, step_dtype)
        self.facts |= {"l1": 1.0 if cfg.l1 is None else cfg.l1, "off": 0.0}

    def weight(self, batch: Batch) -> float:
        """The weight of the penalty now."""
        return self.facts["l1"] * math.exp(PULL * self.facts["off"]) * batch.l1

    def lead(self, l0: Tensor, batch: Batch) -> None:
        """Move the weight after a step that had `l0` active features per token; not while it is being warmed up."""
        if self.cfg.l1 is None and batch.l1 == 1.0:
            off = max(-1.0, min(1.0, math.log(max(float(l0), 1e-3) / self.cfg.k)))
            self.facts["off"] = SMOOTH * self.facts["off"] + (1 - SMOOTH) * off
            self.facts["l1"] *= math.exp(GAIN * off)


class ReLURecipe(L1Recipe):
    """Training by autograd: nothing in the code is sparse until late."""

    def gradients(self, batch: Batch) -> Step:
        """See the module's equations."""
        x, n, weight, ranks = batch.x, batch.tokens(), self.weight(batch), batch.ranks
        seen: dict[str, Tensor] = {}

        def loss(p: dict[str, Tensor]) -> Tensor:
            f = torch.relu(self.product(x, p["W_enc_t"], p["b_dec"]) + p["b_enc"])
            squared = (f @ p["W_dec"] + p["b_dec"] - x).square().sum()
            penalty = f.sum()
            seen.update(f=f.detach(), squared=squared.detach(), penalty=penalty.detach())
            return (squared + weight * penalty) / n

        gradients = self.differentiate(loss)
        fired = (seen["f"] > 0).sum(0)
        squared, penalty = ranks.sum(seen["squared"]), ranks.sum(seen["penalty"])
        values = {
            "loss": (squared + weight * penalty) / n,
            "fvu": squared / batch.power(),
            "l0": ranks.sum(fired.sum().float()) / n,
            "l1": torch.tensor(weight),
        }
        self.lead(values["l0"], batch)
        return Step(gradients, fired, values)
