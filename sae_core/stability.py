"""Whether two trainings find the same features: decoder directions of two SAEs on one site, matched.

For each live feature of `a` the nearest live feature of `b` by decoder cosine, and back. A pair that choose each other is
mutual. Reported: mean and median of the largest cosine seen from `a`, the shares of `a`'s features with one above 0.7 and
0.9, the share that has a mutual partner, and the mean cosine of mutual pairs. Dead features point where initialisation left
them, so they are left out on both sides.

Mutual pairs rather than an optimal assignment (Hungarian): that costs the cube of the number of features, minutes at 24,000,
and differs only for features without a counterpart, whose cosine is low either way.
"""

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from sae_core.errors import SAEMismatch
from sae_core.measures import nearest
from sae_core.saes import SAE


class Stability(BaseModel):
    """How far one SAE's features are found again in another."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    against: str
    """Name of the other SAE."""
    features: int
    """Live features here."""
    others: int
    """Live features there."""
    mean: float | None
    """Mean over our features of the largest cosine with one of theirs; None where either side has none."""
    median: float | None
    """Its median."""
    above_07: float | None
    """Share of our features with a cosine above 0.7."""
    above_09: float | None
    """Share above 0.9."""
    mutual: float | None
    """Share of our features whose nearest has them as its nearest."""
    mutual_mean: float | None
    """Mean cosine of these pairs."""


def check_same_site(a: SAE, b: SAE, name: str) -> None:
    """Raise SAEMismatch where the two do not read the same coordinates."""
    ours, theirs = a.cfg, b.cfg
    if (ours.model_fingerprint, ours.site, ours.d_in) != (theirs.model_fingerprint, theirs.site, theirs.d_in):
        raise SAEMismatch(
            f"{name} reads layer {theirs.site.layer} of {theirs.model}, not layer {ours.site.layer} of {ours.model}, so their "
            "features cannot be matched; name an SAE trained on the same site of the same weights.",
            field="against",
        )


def stability(a: Tensor, b: Tensor, against: str) -> Stability:
    """Match decoder rows a [n, d] of one SAE's live features with those of another, b [m, d]."""
    if not len(a) or not len(b):
        none = dict.fromkeys(("mean", "median", "above_07", "above_09", "mutual", "mutual_mean"))
        return Stability(against=against, features=len(a), others=len(b), **none)
    best, there = nearest(a, b)
    _, back = nearest(b, a)
    mutual = back[there] == torch.arange(len(a))
    return Stability(
        against=against,
        features=len(a),
        others=len(b),
        mean=float(best.mean()),
        median=float(best.quantile(0.5)) if len(best) < 2**24 else float(best.median()),
        above_07=float((best > 0.7).float().mean()),
        above_09=float((best > 0.9).float().mean()),
        mutual=float(mutual.float().mean()),
        mutual_mean=float(best[mutual].mean()) if mutual.any() else None,
    )
