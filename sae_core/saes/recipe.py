"""What every architecture shares in training: parameters on scaled z, how they start, the gradients of one batch.

x [n, d_in] is s z, with s the run's scale. The encoder is kept transposed, W_enc_t [d_sae, d_in], so that a feature's
weights are one contiguous row in both directions. A recipe knows nothing of optimizers, schedules or files: `trainer.py`
asks it for gradients and applies them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core import sparse
from sae_core.config import TrainConfig
from sae_core.ranks import ALONE, Ranks

MEDIAN_ROUNDS = 50  # of Weiszfeld's iteration, which gains about a digit in five


class Step(NamedTuple):
    """What one batch says."""

    gradients: dict[str, Tensor]
    """By parameter name, already of the sum over all ranks' loss once added up."""
    fired: Tensor
    """int64 [d_sae]: tokens of this rank's part on which each feature fired."""
    values: dict[str, Tensor]
    """0-d figures of the whole batch: `loss`, `fvu`, `l0`, and what the architecture adds."""


class Batch(NamedTuple):
    """What a recipe may look at in one step; each architecture reads what it needs."""

    x: Tensor
    """[n, d_in], this rank's part of the batch."""
    mean: Tensor
    """[d_in], the mean of x over the pool."""
    k: float
    """Active features per token now, as annealed (top-k family)."""
    l1: float
    """Factor on the L1 weight now, 0 to 1 (relu, gated)."""
    dead: Tensor
    """int64 [m], the features that have not fired for long (top-k family)."""
    ranks: Ranks = ALONE
    """Those who hold the other parts."""

    def tokens(self) -> int:
        """How many tokens the whole batch has; every rank must ask."""
        return self.ranks.count(len(self.x))

    def power(self) -> Tensor:
        """sum |x - mean|^2 over the whole batch, which FVU divides by; every rank must ask."""
        return self.ranks.sum((self.x - self.mean).square().sum())


class Recipe(ABC):
    """An SAE in training. `parameters` are what the optimizer moves, `facts` the scalars a checkpoint needs besides."""

    calibrated = False
    """Whether its threshold is found after training, so that k features fire per token."""

    def __init__(self, cfg: TrainConfig, d_in: int, device: torch.device, step_dtype: torch.dtype) -> None:
        self.cfg, self.d_in, self.d_sae, self.dtype = cfg, d_in, cfg.expansion * d_in, step_dtype
        generator = torch.Generator().manual_seed(cfg.seed)
        if cfg.tied_init:
            W_dec = torch.randn(self.d_sae, d_in, generator=generator)
        else:  # Kaiming uniform, as published: bound sqrt(6 / fan-in), which PyTorch reads as d_sae for W_enc [d_in, d_sae]
            W_dec = 2 * torch.rand(self.d_sae, d_in, generator=generator) - 1
            W_enc_t = (2 * torch.rand(self.d_sae, d_in, generator=generator) - 1) * math.sqrt(6 / self.d_sae)
        self.W_dec = (W_dec / W_dec.norm(dim=1, keepdim=True)).to(device)
        self.W_enc_t = self.W_dec.clone() if cfg.tied_init else W_enc_t.to(device)
        self.b_enc = torch.zeros(self.d_sae, device=device)
        self.b_dec = torch.zeros(d_in, device=device)
        self.parameters = {"W_enc_t": self.W_enc_t, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        self.facts: dict[str, float] = {}

    # ---- the start ----

    def begin(self, sample: Tensor, mean: Tensor) -> None:
        """Start from what a sample of x [m, d_in] and the mean [d_in] of all of it say: b_dec, the active subspace;
        subclasses add their thresholds."""
        if self.cfg.b_dec_init == "mean":
            self.b_dec.copy_(mean)
        elif self.cfg.b_dec_init == "geometric_median":
            self.b_dec.copy_(geometric_median(sample))
        if self.cfg.active_subspace:
            basis = principal_directions(sample, max(1, round(self.cfg.active_subspace * self.d_in)))
            rows = (self.W_dec @ basis.T) @ basis
            self.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
            if self.cfg.tied_init:
                self.W_enc_t.copy_(self.W_dec)

    # ---- one batch ----

    @abstractmethod
    def gradients(self, batch: Batch) -> Step:
        """Gradients of the loss on this rank's part of a batch. The loss is normalised by the whole batch, so that gradients
        of the parts add up to the gradient of the whole."""

    def preacts(self, x: Tensor) -> Tensor:
        """[n, d_sae], the product in the step's precision."""
        weights = self.W_enc_t.to(self.dtype)
        preacts: Tensor = (x - self.b_dec).to(self.dtype) @ weights.T + self.b_enc.to(self.dtype)
        return preacts

    def on_the_sphere(self, gradient: Tensor) -> Tensor:
        """The decoder's gradient without its part along each unit row (Bricken et al. 2023), in place."""
        return sparse.on_the_sphere(gradient, self.W_dec)

    def normalise(self) -> None:
        """Make the decoder's rows unit again, after the optimizer has moved them."""
        sparse.normalise(self.W_dec)

    # ---- the end ----

    def tensors(self) -> dict[str, Tensor]:
        """W_enc, b_enc, W_dec, b_dec, threshold of an SAE on x; a calibrated threshold is put in by the caller."""
        return {
            "W_enc": self.W_enc_t.T,
            "b_enc": self.b_enc,
            "W_dec": self.W_dec,
            "b_dec": self.b_dec,
            "threshold": torch.zeros(self.d_sae, device=self.b_enc.device),
        }

    # ---- for losses whose gradients autograd finds ----

    def differentiate(self, loss: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, Tensor]:
        """Gradients of a loss that is written as a function of the parameters."""
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in self.parameters.items()}
        with torch.enable_grad():
            found = torch.autograd.grad(loss(leaves), list(leaves.values()))
        return dict(zip(leaves, found, strict=True))

    def product(self, x: Tensor, W_enc_t: Tensor, b_dec: Tensor) -> Tensor:
        """(x - b_dec) W_enc as float32, the product in the step's precision; differentiable."""
        product: Tensor = ((x - b_dec).to(self.dtype) @ W_enc_t.to(self.dtype).T).float()
        return product


def geometric_median(sample: Tensor) -> Tensor:
    """The point [d_in] with the least sum of distances to the sample [m, d_in] (Weiszfeld 1937)."""
    points = sample.double()
    median = points.mean(0)
    for _ in range(MEDIAN_ROUNDS):
        weights = 1.0 / (points - median).norm(dim=1).clamp_min(1e-9)
        median = (points * weights[:, None]).sum(0) / weights.sum()
    return median.float()


def principal_directions(sample: Tensor, n: int) -> Tensor:
    """[n, d_in]: orthonormal directions of largest variance of the sample [m, d_in], largest first."""
    points = sample.double()
    points = points - points.mean(0)
    _, vectors = torch.linalg.eigh(points.T @ points)
    leading: Tensor = vectors[:, -n:].flip(1).T.float()
    return leading
