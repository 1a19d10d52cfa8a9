"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): the n k largest pre-activations of a batch of n tokens stay.

training   preact = (x - b_dec) W_enc + b_enc,  x = s z
           f = preact where it is among the n k largest positive ones of the batch, else 0
           loss as in `topk.py`
inference  f = preact where preact > theta, else 0: the batch's cut replaced by its calibrated value, so that
           a token's activations do not depend on its neighbours in the batch
"""

import torch

from sae_core import sparse
from sae_core.config import TrainConfig
from sae_core.ranks import Ranks
from sae_core.saes.base import SAE
from sae_core.saes.topk import TopKRecipe
from sae_core.sparse import Code, Preacts


class BatchTopKSAE(SAE):
    """A BatchTopK SAE with its threshold for inference."""


class BatchTopKRecipe(TopKRecipe):
    """Training with a cut that the whole batch shares."""

    calibrated = True

    def __init__(self, cfg: TrainConfig, d_in: int, device: torch.device, step_dtype: torch.dtype) -> None:
        super().__init__(cfg, d_in, device, step_dtype)
        self.facts["cut"] = 0.0  # smallest value kept in the last batch

    def select(self, preacts: Preacts, k: float, ranks: Ranks) -> Code:
        """The largest n k of the batch, over all ranks."""
        count = int(ranks.count(len(preacts)) * k)
        code, cut = sparse.batch_top_k(preacts, count, self.facts["cut"], ranks)
        self.facts["cut"] = cut
        return code
