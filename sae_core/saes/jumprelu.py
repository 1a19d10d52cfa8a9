"""JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435) with an L0 target.

    preact = (x - b_dec) W_enc + b_enc
    f      = preact where preact > theta, else 0         one theta > 0 per feature, learnt as log theta
    loss   = sum |x - x_hat|^2 / sum |x - mean|^2  +  l0_coef (L0 / k - 1)^2

Neither the jump nor L0 has a gradient in theta; straight-through estimators give one, through a window of width
`bandwidth` eps around the threshold: with K(v) = 1 for |v| < 1/2, else 0,

    d f / d theta  = -(theta / eps) K((preact - theta) / eps)
    d L0 / d theta = -(1 / eps) K((preact - theta) / eps)  per token

The squared penalty leads L0 to k from either side, so no weight has to be searched for a wanted sparsity. The thresholds
start where 4k features fire per token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sae_core.config import TrainConfig
from sae_core.saes.base import SAE
from sae_core.saes.recipe import Batch, Recipe, Step

START_L0 = 4  # times k
START_TOKENS = 2048  # of the sample, to find the first thresholds


class JumpReLUSAE(SAE):
    """A JumpReLU SAE with one learnt threshold per feature."""


class _Jump(torch.autograd.Function):
    """f(preact, theta) and its straight-through gradients."""

    @staticmethod
    def forward(ctx: Any, preact: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(preact, theta)
        ctx.width = width
        return preact * (preact > theta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        preact, theta = ctx.saved_tensors
        grad = grads[0]
        window = (preact - theta).abs() < ctx.width / 2
        return grad * (preact > theta), -(theta / ctx.width) * (grad * window).sum(0), None


class _Count(torch.autograd.Function):
    """Number of active entries, and its straight-through gradient in theta alone."""

    @staticmethod
    def forward(ctx: Any, preact: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(preact, theta)
        ctx.width = width
        return (preact > theta).sum().to(preact.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        preact, theta = ctx.saved_tensors
        window = (preact - theta).abs() < ctx.width / 2
        return None, -(grads[0] / ctx.width) * window.sum(0), None


Estimator = Callable[[Tensor, Tensor, float], Tensor]
_jump: Estimator = _Jump.apply
_count: Estimator = _Count.apply


class JumpReLURecipe(Recipe):
    """Training with straight-through gradients for the thresholds."""

    def __init__(self, cfg: TrainConfig, d_in: int, device: torch.device, step_dtype: torch.dtype) -> None:
        super().__init__(cfg, d_in, device, step_dtype)
        self.log_theta = torch.zeros(self.d_sae, device=device)
        self.parameters |= {"log_theta": self.log_theta}

    def begin(self, sample: Tensor, mean: Tensor) -> None:
        """b_dec, and thresholds at which START_L0 x k features fire per token."""
        super().begin(sample, mean)
        some = self.preacts(sample[:START_TOKENS]).float().flatten()
        count = min(START_L0 * self.cfg.k * len(sample[:START_TOKENS]), len(some))
        theta = some.kthvalue(len(some) - count + 1).values.clamp_min(1e-3)
        self.log_theta.fill_(float(theta.log()))

    def gradients(self, batch: Batch) -> Step:
        """See the module's equations. L0 of the whole batch enters as a number: d (L0/k - 1)^2 = 2 (L0/k - 1) / k dL0."""
        cfg, x, n, power, ranks = self.cfg, batch.x, batch.tokens(), batch.power(), batch.ranks
        seen: dict[str, Tensor] = {}

        def loss(p: dict[str, Tensor]) -> Tensor:
            preact = self.product(x, p["W_enc_t"], p["b_dec"]) + p["b_enc"]
            theta = p["log_theta"].exp()
            f = _jump(preact, theta, cfg.bandwidth)
            squared = (f @ p["W_dec"] + p["b_dec"] - x).square().sum()
            count = _count(preact, theta, cfg.bandwidth)
            l0 = ranks.sum(count.detach().clone()) / n
            seen.update(f=f.detach(), squared=squared.detach(), l0=l0)
            pull = cfg.l0_coef * 2.0 * (l0 / cfg.k - 1.0) / cfg.k
            return squared / power + pull * count / n

        gradients = self.differentiate(loss)
        squared = ranks.sum(seen["squared"])
        values = {
            "loss": squared / power + cfg.l0_coef * (seen["l0"] / cfg.k - 1.0).square(),
            "fvu": squared / power,
            "l0": seen["l0"],
            "threshold": self.log_theta.exp().mean(),
        }
        return Step(gradients, (seen["f"] > 0).sum(0), values)

    def tensors(self) -> dict[str, Tensor]:
        """With the learnt thresholds."""
        return super().tensors() | {"threshold": self.log_theta.exp()}
