"""One file per architecture, each with its equations, its inference and its recipe for training.

`base.py` holds what all share at inference, `recipe.py` what all share in training.
"""

from sae_core.config import Arch
from sae_core.saes.base import SAE, SparseActs, check_fits, load_sae, row_starts, save_sae
from sae_core.saes.batchtopk import BatchTopKRecipe, BatchTopKSAE
from sae_core.saes.gated import GatedRecipe, GatedSAE
from sae_core.saes.jumprelu import JumpReLURecipe, JumpReLUSAE
from sae_core.saes.matryoshka import MatryoshkaRecipe, MatryoshkaSAE
from sae_core.saes.recipe import Recipe
from sae_core.saes.relu import ReLURecipe, ReLUSAE
from sae_core.saes.topk import TopKRecipe, TopKSAE

ARCHITECTURES: dict[Arch, type[SAE]] = {
    "relu": ReLUSAE,
    "gated": GatedSAE,
    "topk": TopKSAE,
    "batchtopk": BatchTopKSAE,
    "jumprelu": JumpReLUSAE,
    "matryoshka": MatryoshkaSAE,
}
RECIPES: dict[Arch, type[Recipe]] = {
    "relu": ReLURecipe,
    "gated": GatedRecipe,
    "topk": TopKRecipe,
    "batchtopk": BatchTopKRecipe,
    "jumprelu": JumpReLURecipe,
    "matryoshka": MatryoshkaRecipe,
}

__all__ = [
    "ARCHITECTURES",
    "RECIPES",
    "SAE",
    "BatchTopKSAE",
    "Recipe",
    "SparseActs",
    "check_fits",
    "load_sae",
    "row_starts",
    "save_sae",
]
