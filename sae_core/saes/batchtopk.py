"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): the n k largest pre-activations of a batch of n tokens stay.

training   preact = (x - b_dec) W_enc + b_enc,  x = s z
           f = preact where it is among the n k largest positive ones of the batch, else 0
inference  f = preact where preact > theta, else 0: the batch's cut replaced by its calibrated value, so that
           a token's activations do not depend on its neighbours in the batch
"""

from torch import Tensor

from sae_core.saes.base import SAE, SparseActs


class BatchTopKSAE(SAE):
    """A BatchTopK SAE with its threshold for inference."""

    def activate(self, preacts: Tensor, features: Tensor) -> Tensor:
        """preact where it exceeds the feature's threshold, else 0."""
        return preacts * (preacts > self.threshold[features])

    def encode_sparse(self, z: Tensor) -> SparseActs:
        """The nonzero activations of z [n, d_in], without the dense product that `activate` would write."""
        preacts = self.preacts(z)
        token, feature = (preacts > self.threshold).nonzero(as_tuple=True)
        return SparseActs(token, feature, preacts[token, feature])
