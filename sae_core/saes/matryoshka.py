"""Matryoshka BatchTopK (Bussmann et al. 2025, arXiv 2503.17547): nested dictionaries, each of which reconstructs alone.

The features are cut into groups g = 1 .. G; prefix m holds the groups 1 .. m. With f the BatchTopK code over all features,

    x_hat_m = f[groups 1..m] W_dec[groups 1..m] + b_dec
    loss    = mean over m of sum |x - x_hat_m|^2 / sum |x - mean|^2  +  aux_coef x AuxK

so early features must be worth having on their own and do not leave their general cases to later ones (absorption).
A feature of group g is in the prefixes m >= g, so the gradient at its output is the sum of those of x_hat_g .. x_hat_G.
Inference is BatchTopK's.
"""

from itertools import pairwise

import torch
from torch import Tensor

from sae_core import sparse
from sae_core.config import TrainConfig
from sae_core.saes.base import SAE
from sae_core.saes.batchtopk import BatchTopKRecipe
from sae_core.sparse import Code, Gradients


class MatryoshkaSAE(SAE):
    """A Matryoshka SAE; at inference only its whole dictionary is used."""


class MatryoshkaRecipe(BatchTopKRecipe):
    """Training of nested dictionaries."""

    def __init__(self, cfg: TrainConfig, d_in: int, device: torch.device, step_dtype: torch.dtype) -> None:
        super().__init__(cfg, d_in, device, step_dtype)
        ends = torch.tensor(cfg.groups, dtype=torch.float64).cumsum(0).mul(self.d_sae).round().long().tolist()
        self.bounds = sorted({0, *ends, self.d_sae})
        """First feature of each group, and d_sae."""

    def groups(self, code: Code) -> list[Code]:
        """The code of each group, features counted from the group's first."""
        found = []
        for low, high in pairwise(self.bounds):
            inside = (code.feature >= low) & (code.feature < high)
            found.append(Code(code.token[inside], code.feature[inside] - low, code.value[inside], code.n))
        return found

    def reconstruct(self, code: Code) -> list[Tensor]:
        """x_hat of each prefix."""
        found = [self.b_dec.expand(code.n, -1)]
        for (low, high), part in zip(pairwise(self.bounds), self.groups(code), strict=True):
            found.append(found[-1] + sparse.decode(part, self.W_dec[low:high]))
        return found[1:]

    def backward(self, code: Code, grads_out: list[Tensor], x: Tensor) -> Gradients:
        """Group by group, from the last to the first."""
        parts: list[Gradients] = []
        total = torch.zeros_like(x)
        b_dec = torch.zeros_like(self.b_dec)
        groups = list(zip(pairwise(self.bounds), self.groups(code), grads_out, strict=True))
        for (low, high), part, grad_out in reversed(groups):
            total = total + grad_out
            found = sparse.backward(part, total, x, self.W_enc_t[low:high], self.W_dec[low:high], self.b_dec)
            # `backward` counts b_dec once as an output of this group: only the encoder's share belongs to it
            b_dec += found.b_dec - total.sum(0)
            parts.append(found)
        parts.reverse()
        return Gradients(
            W_enc_t=torch.cat([part.W_enc_t for part in parts]),
            b_enc=torch.cat([part.b_enc for part in parts]),
            W_dec=torch.cat([part.W_dec for part in parts]),
            b_dec=b_dec + total.sum(0),
        )
