"""A random SAE on a tiny model and random token rows: what harvest tests sweep."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_core.config import HarvestConfig, SAEConfig, Site
from sae_core.corpus import Rows
from sae_core.lens import Lens
from sae_core.saes.base import SAE
from sae_core.saes.batchtopk import BatchTopKSAE

LAYER = 2
CFG = HarvestConfig(
    top_k=4,
    bands=3,
    per_band=2,
    shard_rows=16,
    batch_rows=4,
    neighbours=3,
    logits=5,
    window=8,
    dfa_entries=6,
    model_dtype="float32",
)
"""A harvest of these rows in two shards, with something in every part."""


def tiny_rows(n: int = 24, context: int = 20, vocabulary: int = 60, seed: int = 0) -> Rows:
    """Rows of random tokens. The last two repeat the first two, as near-duplicates do; every fifth holds the end of a
    document and the row start of the next, as packed rows do."""
    tokens = np.random.default_rng(seed).integers(1, vocabulary, (n, context)).astype(np.int32)
    tokens[:, 0] = 0
    tokens[2::5, context // 2] = 0
    tokens[-2:] = tokens[:2]
    return Rows(Path("none"), context, 0, tokens, tokens[:0], "tiny")


def starts_of(rows: Rows) -> torch.Tensor:
    """bool [n, context]: the row-start tokens of all training rows."""
    return torch.from_numpy(rows.train == rows.row_start)


def z_of(lens: Lens, rows: Rows, layer: int = LAYER) -> torch.Tensor:
    """z [n, context, d_in] of all training rows, in one pass."""
    return lens.read_z(torch.from_numpy(rows.train.astype(np.int64)), [layer])[layer]


def tiny_sae(
    lens: Lens, rows: Rows, *, d_sae: int = 40, density: float = 0.15, dead: int = 3, layer: int = LAYER, seed: int = 1
) -> SAE:
    """An SAE that fires on about `density` of the tokens, whose last `dead` features never do, and that excludes the
    largest few z."""
    info, generator = lens.info, torch.Generator().manual_seed(seed)
    z = z_of(lens, rows, layer).flatten(0, 1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors: dict[str, Any] = {
        "W_enc": draw(info.d_in, d_sae) / z.std() / info.d_in**0.5,
        "b_enc": draw(d_sae) * 0.3,
        "W_dec": torch.nn.functional.normalize(draw(d_sae, info.d_in), dim=1),
        "b_dec": z.mean(0),
    }
    preacts = (z - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    # In the widest gap between two values near the wanted density, so that rounding moves no token across.
    near = preacts.clamp_min(0.01).sort(0).values[int(len(z) * (0.98 - density)) : int(len(z) * (1.02 - density))]
    widest = near.diff(dim=0).argmax(0, keepdim=True)
    tensors["threshold"] = ((near.gather(0, widest) + near.gather(0, widest + 1)) / 2).squeeze(0)
    tensors["threshold"][d_sae - dead :] = torch.inf
    cfg = SAEConfig(
        arch="batchtopk",
        d_in=info.d_in,
        d_sae=d_sae,
        k=8,
        n_heads=info.n_heads,
        d_head=info.d_head,
        site=Site(layer=layer),
        model=info.name,
        model_fingerprint=info.fingerprint,
        processing=info.processing,
        scale=1.0,
        max_norm=float(z.norm(dim=1).quantile(0.98)),
        context=rows.context,
    )
    return BatchTopKSAE(cfg, tensors)
