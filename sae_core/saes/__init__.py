"""One file per architecture; `base.py` holds what all of them share."""

from sae_core.saes.base import SAE, SparseActs, load_sae, save_sae
from sae_core.saes.batchtopk import BatchTopKSAE

ARCHITECTURES: dict[str, type[SAE]] = {"batchtopk": BatchTopKSAE}

__all__ = ["ARCHITECTURES", "SAE", "BatchTopKSAE", "SparseActs", "load_sae", "save_sae"]
