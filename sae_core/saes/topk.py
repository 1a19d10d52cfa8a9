"""TopK (Gao et al. 2024, arXiv 2406.04093): each token keeps its k largest pre-activations, in training and after.

    preact = (x - b_dec) W_enc + b_enc,  x = s z
    f      = preact where it is positive and among the token's k largest, else 0
    loss   = sum |x - x_hat|^2 / sum |x - mean|^2  +  aux_coef x AuxK

AuxK: the k_aux most active dead features reconstruct the error that is left, so that dead features get a gradient.
The step is sparse: only the encoder product touches every feature (`sparse.py`), gradients are written by hand.
"""

import torch
from torch import Tensor

from sae_core import sparse
from sae_core.ranks import Ranks
from sae_core.saes.base import SAE
from sae_core.saes.recipe import Batch, Recipe, Step
from sae_core.sparse import Code, Gradients, Preacts


class TopKSAE(SAE):
    """A TopK SAE: whether a feature is on depends on the token's other features."""

    def least(self, z: Tensor, preacts: Tensor | None = None) -> Tensor | None:
        """Half-way between a token's k-th and (k+1)-th largest pre-activation, so that rounding moves none across."""
        k = self.cfg.k
        if k >= self.cfg.d_sae:
            return None
        top = (self.preacts(z) if preacts is None else preacts).topk(k + 1, dim=-1).values
        return top[..., k - 1 :].mean(-1, keepdim=True)


class TopKRecipe(Recipe):
    """Training of the top-k family; `select`, `reconstruct` and `backward` are what its members change."""

    def select(self, preacts: Preacts, k: float, ranks: Ranks) -> Code:  # noqa: ARG002 - a token's choice is its own
        """The code of a batch from its pre-activations [n, d_sae]."""
        return sparse.top_k(preacts, min(round(k), self.d_sae))

    def reconstruct(self, code: Code) -> list[Tensor]:
        """x_hat [n, d_in] of each nested dictionary, the whole one last; here there is only that."""
        return [sparse.decode(code, self.W_dec) + self.b_dec]

    def backward(self, code: Code, grads_out: list[Tensor], x: Tensor) -> Gradients:
        """Gradients from those at each reconstruction."""
        return sparse.backward(code, grads_out[0], x, self.W_enc_t, self.W_dec, self.b_dec)

    def gradients(self, batch: Batch) -> Step:
        """See the module's equations."""
        cfg, n, power, ranks = self.cfg, batch.tokens(), batch.power(), batch.ranks
        x = batch.x
        preacts = Preacts(x - self.b_dec, self.W_enc_t, self.b_enc, self.dtype)
        code = self.select(preacts, batch.k, ranks)
        residuals = [x_hat - x for x_hat in self.reconstruct(code)]
        scale = 2.0 / (power * len(residuals))
        grads = self.backward(code, [residual * scale for residual in residuals], x)
        values = {"fvu": ranks.sum(residuals[-1].square().sum()) / power, "l0": self.l0(code, n, ranks)}
        values["loss"] = sum((ranks.sum(r.square().sum()) / power for r in residuals[:-1]), values["fvu"]) / len(residuals)
        aux_k = cfg.aux_k if cfg.aux_k is not None else self.d_in // 2
        if aux_k and cfg.aux_coef and len(batch.dead):
            # `auxiliary` divides by its part's error; the batch's loss divides by the whole batch's.
            mine = residuals[-1].square().sum().clamp_min(1e-12)
            share = mine / ranks.sum(mine.clone())
            parameters = (self.W_enc_t, self.W_dec, self.b_dec)
            weight = cfg.aux_coef * share
            loss, grads = sparse.auxiliary(preacts, batch.dead, aux_k, -residuals[-1], x, *parameters, into=grads, weight=weight)
            values["aux"] = ranks.sum(loss * share)
            values["loss"] = values["loss"] + cfg.aux_coef * values["aux"]
        return Step(grads._asdict(), torch.bincount(code.feature, minlength=self.d_sae), values)

    def l0(self, code: Code, n: int, ranks: Ranks) -> Tensor:
        """Active features per token."""
        return ranks.sum(torch.tensor(float(len(code.value)), device=code.value.device)) / n
