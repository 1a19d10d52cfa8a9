"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014): one path says whether a feature is on, another how strongly.

    u     = (x - b_dec) W_enc                           shared directions
    gate  = u + b_gate,      mag = exp(r) u + b_enc     per feature
    f     = 1[gate > 0] ReLU(mag),    x_hat = f W_dec + b_dec
    loss  = mean over tokens of  sum_d (x_hat - x)^2  +  l1 sum_i ReLU(gate_i)
            +  sum_d (ReLU(gate) W_dec + b_dec - x)^2    with the decoder and b_dec held fixed

The step function passes no gradient, so the gate learns from the last two terms, and f is not shrunk by the penalty.
Since both paths share u, gate > 0 is mag > b_enc - exp(r) b_gate: a trained gated SAE is a JumpReLU SAE with encoder
exp(r) W_enc and threshold max(0, b_enc - exp(r) b_gate) (the paper's appendix E), and is saved as that.
"""

import torch
from torch import Tensor

from sae_core.config import TrainConfig
from sae_core.saes.base import SAE
from sae_core.saes.recipe import Batch, Step
from sae_core.saes.relu import L1Recipe


class GatedSAE(SAE):
    """A gated SAE as the thresholded SAE that it is equal to."""


class GatedRecipe(L1Recipe):
    """Training with two paths."""

    def __init__(self, cfg: TrainConfig, d_in: int, device: torch.device, step_dtype: torch.dtype) -> None:
        super().__init__(cfg, d_in, device, step_dtype)
        self.b_gate = torch.zeros(self.d_sae, device=device)
        self.r = torch.zeros(self.d_sae, device=device)
        self.parameters |= {"b_gate": self.b_gate, "r": self.r}

    def gradients(self, batch: Batch) -> Step:
        """See the module's equations."""
        x, n, weight, ranks = batch.x, batch.tokens(), self.weight(batch), batch.ranks
        seen: dict[str, Tensor] = {}

        def loss(p: dict[str, Tensor]) -> Tensor:
            u = self.product(x, p["W_enc_t"], p["b_dec"])
            gate = u + p["b_gate"]
            f = (gate > 0) * torch.relu(p["r"].exp() * u + p["b_enc"])
            squared = (f @ p["W_dec"] + p["b_dec"] - x).square().sum()
            on = torch.relu(gate)
            penalty = on.sum()
            guide = (on @ p["W_dec"].detach() + p["b_dec"].detach() - x).square().sum()
            seen.update(f=f.detach(), squared=squared.detach(), rest=(weight * penalty + guide).detach())
            return (squared + weight * penalty + guide) / n

        gradients = self.differentiate(loss)
        fired = (seen["f"] > 0).sum(0)
        squared, rest = ranks.sum(seen["squared"]), ranks.sum(seen["rest"])
        values = {
            "loss": (squared + rest) / n,
            "fvu": squared / batch.power(),
            "l0": ranks.sum(fired.sum().float()) / n,
            "l1": torch.tensor(weight),
        }
        self.lead(values["l0"], batch)
        return Step(gradients, fired, values)

    def tensors(self) -> dict[str, Tensor]:
        """The equal JumpReLU SAE."""
        gain = self.r.exp()
        return super().tensors() | {
            "W_enc": self.W_enc_t.T * gain,
            "threshold": (self.b_enc - gain * self.b_gate).clamp_min(0.0),
        }
