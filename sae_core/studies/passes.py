"""What studies share: which layers, how many rows in a pass, which tokens random rows are made of, and z at one position of each
row."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_core.config import HeadsStudy, InductionStudy, PrefixStudy
from sae_core.errors import UsageError
from sae_core.saes import SAE
from sae_core.studies.proxy import ordinary_tokens

if TYPE_CHECKING:
    from sae_core.lens import Lens, Replace

OfHeads = InductionStudy | HeadsStudy
OfRows = OfHeads | PrefixStudy
DOES = 0.3
"""Share of its attention from which a head does what the score is about. The paper takes 0.3 for "attends"; heads that do it
now and then by another way stay far below that on distinct random tokens."""


def layers_of(cfg: OfHeads, lens: "Lens") -> list[int]:
    """The layers to look at; LayerOutOfRange for one that the model lacks."""
    layers = list(range(lens.info.n_layers)) if cfg.layers == "all" else sorted(cfg.layers)
    for layer in layers:
        lens.check_layer(layer)
    return layers


def rows_at_once(cfg: OfRows, length: int) -> int:
    """Rows of so many tokens in one model pass."""
    return max(1, cfg.pass_tokens // length)


def row_tokens(cfg: OfRows, lens: "Lens", distinct: int) -> NDArray[np.int64]:
    """Ids that a row of `cfg.length` tokens, `distinct` of them different, is drawn from; UsageError where the model takes no
    such row, or has too few tokens."""
    if cfg.length > lens.info.max_context:
        raise UsageError(
            f"{lens.info.name} takes at most {lens.info.max_context} tokens at once, not {cfg.length}; lower --length.",
            field="length",
        )
    ids = np.array(ordinary_tokens(lens))
    if len(ids) < distinct:
        raise UsageError(
            f"{lens.info.name} has {len(ids)} tokens, fewer than the {distinct} distinct ones of a row; lower --length.",
            field="length",
        )
    return ids


def putting(z_at: Tensor, at: Tensor) -> "Replace":
    """A replacement of z [b, pos, d_in] that puts z_at [b, d_in] at one position of each row: row i at at[i], no other."""

    def put(z: Tensor) -> Tensor:
        z = z.clone()
        z[torch.arange(len(z), device=z.device), at.to(z.device)] = z_at.to(z)
        return z

    return put


def codes_at(sae: SAE, z: Tensor) -> Tensor:
    """Activations [n, d_sae] of z [n, d_in], none where the SAE has no features."""
    z = z.to(sae.W_enc.device)
    excluded = sae.excluded(z[:, None], torch.zeros(len(z), 1, dtype=torch.bool))[:, 0]
    return sae.encode(z).masked_fill(excluded[:, None], 0.0).cpu()
