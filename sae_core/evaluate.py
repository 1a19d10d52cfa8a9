"""What an SAE costs and keeps, each number by one formula that a test holds in closed form.

    L0      mean number of nonzero features per token
    FVU     sum |z - z_hat|^2 / sum |z - z_mean|^2, z_mean the global mean of the same tokens (not zero, not per row);
            per head with the sums over that head's d_head coordinates
    dead    share of features that never fire on `dead_tokens` training tokens
    CE      mean next-token cross-entropy in nats: the model as it is (clean), with z at the site replaced by the SAE's
            reconstruction (sae), by zero (zero), by its mean over the evaluated tokens (mean)
    recovered = (CE_ablated - CE_sae) / (CE_ablated - CE_clean)

Excluded positions (row start, sinks) keep their z in every variant and count in no statistic of z. One layer moves prose
so little that `recovered` can be noise: differences come with 95 % intervals over rows (paired: the same rows in every
variant), and `recovered` is withheld, with the reason, where its denominator is not clearly above zero. Repeated random
tokens have the power: the second copy can only be predicted by induction.
"""

import math
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from sae_core.activations import Activations
from sae_core.corpus import Rows
from sae_core.progress import Progress
from sae_core.saes import SAE

if TYPE_CHECKING:
    from sae_core.lens import Lens

Z95 = 1.959964  # two-sided 95 % of the normal distribution
CLEAR = 3.0  # a denominator counts as known when it exceeds this many of its standard errors


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Interval(_Record):
    """A mean with its 95 % interval over rows."""

    mean: float
    low: float
    high: float


class Reconstruction(_Record):
    """How well z is rebuilt, on held-out tokens."""

    tokens: int
    """Held-out tokens counted."""
    l0: float
    """Active features per token."""
    fvu: float
    """Fraction of variance unexplained."""
    fvu_by_head: list[float]
    """The same for each head's part of z."""
    variance_by_head: list[float]
    """Each head's share of the variance of z."""
    dead: float
    """Share of features that never fired on `dead_tokens` training tokens."""
    dead_tokens: int
    """Training tokens that `dead` was counted on."""


class CrossEntropy(_Record):
    """Next-token cross-entropy in nats, clean and with z at the site replaced."""

    rows: int
    """Rows evaluated; intervals are over rows."""
    tokens: int
    """Predictions scored."""
    clean: float
    """The model as it is."""
    sae: float
    """z replaced by the SAE's reconstruction."""
    zero: float
    """z replaced by zero."""
    mean: float
    """z replaced by its mean over these rows."""
    sae_minus_clean: Interval
    zero_minus_clean: Interval
    mean_minus_clean: Interval
    recovered_zero: float | None
    """(zero - sae) / (zero - clean); None where the denominator is too small to divide by."""
    recovered_mean: float | None
    """(mean - sae) / (mean - clean); None where the denominator is too small to divide by."""
    note: str | None
    """Why a recovered share is withheld."""


class Evaluation(_Record):
    """All that is measured of a trained SAE."""

    reconstruction: Reconstruction
    prose: CrossEntropy
    """On held-out rows."""
    repeated: CrossEntropy
    """On random tokens said twice, scored on the second copy."""


class Variance:
    """Streaming sums, in fp64, from which FVU follows: sum |z|^2, sum z, sum |z - z_hat|^2, per coordinate."""

    def __init__(self, d_in: int) -> None:
        self.n = 0
        self.total = torch.zeros(d_in, dtype=torch.float64)
        self.square = torch.zeros(d_in, dtype=torch.float64)
        self.error = torch.zeros(d_in, dtype=torch.float64)

    def add(self, z: Tensor, z_hat: Tensor) -> None:
        """Count z and its reconstruction, both [n, d_in]."""
        z, z_hat = z.double().cpu(), z_hat.double().cpu()
        self.n += len(z)
        self.total += z.sum(0)
        self.square += z.square().sum(0)
        self.error += (z - z_hat).square().sum(0)

    @property
    def centred(self) -> Tensor:
        """sum (z - mean)^2 per coordinate [d_in]."""
        return self.square - self.total.square() / max(self.n, 1)

    def fvu(self) -> float:
        """Over all coordinates."""
        return float(self.error.sum() / self.centred.sum())

    def fvu_by_head(self, n_heads: int) -> list[float]:
        """Over each head's coordinates."""
        return [float(v) for v in self.error.view(n_heads, -1).sum(1) / self.centred.view(n_heads, -1).sum(1)]

    def share_by_head(self, n_heads: int) -> list[float]:
        """Each head's share of the variance."""
        return [float(v) for v in self.centred.view(n_heads, -1).sum(1) / self.centred.sum()]


def interval(differences: Tensor) -> Interval:
    """Mean and normal 95 % interval of per-row differences [rows]."""
    mean = float(differences.mean())
    half = Z95 * float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return Interval(mean=mean, low=mean - half, high=mean + half)


def cross_entropy(clean: Tensor, sae: Tensor, zero: Tensor, mean: Tensor) -> CrossEntropy:
    """The record from per-token losses, each [rows, scored positions]."""
    per_row = {name: losses.double().mean(1) for name, losses in (("clean", clean), ("sae", sae), ("zero", zero), ("mean", mean))}
    effect = {name: interval(per_row[name] - per_row["clean"]) for name in ("sae", "zero", "mean")}
    recovered: dict[str, float | None] = {}
    notes = []
    for name in ("zero", "mean"):
        error = (effect[name].high - effect[name].low) / 2 / Z95
        if effect[name].mean > CLEAR * error:
            recovered[name] = 1.0 - effect["sae"].mean / effect[name].mean
        else:
            recovered[name] = None
            notes.append(
                f"{name}-ablation changes the cross-entropy by only {effect[name].mean:+.4f} ± {Z95 * error:.4f} nats here, "
                "too little to divide by"
            )
    return CrossEntropy(
        rows=len(clean),
        tokens=clean.numel(),
        **{name: float(losses.mean()) for name, losses in per_row.items()},
        **{f"{name}_minus_clean": value for name, value in effect.items()},
        recovered_zero=recovered["zero"],
        recovered_mean=recovered["mean"],
        note="; ".join(notes) or None,
    )


def repeated_random(lens: "Lens", rows: int, context: int, seed: int = 0) -> Tensor:
    """int64 [rows, context]: row start, then random tokens, then the same again (Elhage et al. 2021's induction probe)."""
    half = (context - 1) // 2
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(lens.info.d_vocab, (rows, half), generator=generator)
    start = torch.full((rows, 1), lens.row_start)
    return torch.cat([start, tokens, tokens], dim=1)


def evaluate(
    lens: "Lens",
    sae: SAE,
    rows: Rows,
    activations: Activations | None = None,
    *,
    prose_rows: int = 96,
    repeated_rows: int = 32,
    dead_tokens: int = 262_144,
    batch_rows: int = 16,
) -> Generator[Progress, None, Evaluation]:
    """Measure `sae`. `activations`, the training's z on disk, spares the model pass that counts dead features."""
    layer, context = sae.cfg.site.layer, rows.context
    heldout = torch.from_numpy(rows.heldout[:].astype("int64"))
    dead_rows = min(dead_tokens // context, len(rows.train) if activations is None else activations.n_rows)
    total = (len(heldout) + dead_rows + 4 * (min(prose_rows, len(heldout)) + repeated_rows)) * context
    done, begun = 0, time.monotonic()

    def progress(n_rows: int) -> Progress:
        nonlocal done
        done += n_rows * context
        return Progress("evaluate", done, total, rate=done / max(time.monotonic() - begun, 1e-9))

    # ---- reconstruction, on held-out rows; the mean of z for mean ablation on the way ----
    variance, l0, fired = Variance(sae.cfg.d_in), 0, torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    for tokens in torch.split(heldout, batch_rows):
        z = lens.read_z(tokens.to(lens.device), [layer])[layer]
        kept = z[~sae.excluded(z)]
        acts = sae.encode(kept)
        variance.add(kept, sae.decode(acts))
        l0 += int((acts > 0).sum())
        fired |= (acts > 0).any(0).cpu()
        yield progress(len(tokens))

    # ---- dead features, on training rows ----
    for low in range(0, dead_rows, batch_rows):
        high = min(low + batch_rows, dead_rows)
        if activations is not None:
            z = activations.read_z(low, high).to(lens.device).float()
        else:
            z = lens.read_z(torch.from_numpy(rows.train[low:high].astype("int64")).to(lens.device), [layer])[layer]
        fired |= (sae.encode(z[~sae.excluded(z)]) > 0).any(0).cpu()
        yield progress(high - low)
    reconstruction = Reconstruction(
        tokens=variance.n,
        l0=l0 / variance.n,
        fvu=variance.fvu(),
        fvu_by_head=variance.fvu_by_head(sae.cfg.n_heads),
        variance_by_head=variance.share_by_head(sae.cfg.n_heads),
        dead=float((~fired).float().mean()),
        dead_tokens=dead_rows * context,
    )

    # ---- cross-entropy, on held-out prose and on repeated random tokens ----
    records = []
    half = (context - 1) // 2
    for tokens, first in ((heldout[:prose_rows], 0), (repeated_random(lens, repeated_rows, context), half)):
        mean = yield from _mean_z(lens, sae, tokens, batch_rows)
        losses = {}
        for name, rebuild in {
            "clean": None,
            "sae": sae.forward,
            "zero": torch.zeros_like,
            "mean": lambda z, mean=mean: mean.to(z.dtype).expand_as(z),
        }.items():
            parts = []
            for part in torch.split(tokens, batch_rows):
                replace = _outside_excluded(sae, rebuild) if rebuild else None
                parts.append(lens.token_losses(part.to(lens.device), layer if replace else None, replace)[:, first:].cpu())
                yield progress(len(part))
            losses[name] = torch.cat(parts)
        records.append(cross_entropy(**losses))
    return Evaluation(reconstruction=reconstruction, prose=records[0], repeated=records[1])


def _mean_z(lens: "Lens", sae: SAE, tokens: Tensor, batch_rows: int) -> Generator[Progress, None, Tensor]:
    total, n = torch.zeros(sae.cfg.d_in, dtype=torch.float64), 0
    for part in torch.split(tokens, batch_rows):
        z = lens.read_z(part.to(lens.device), [sae.cfg.site.layer])[sae.cfg.site.layer]
        kept = z[~sae.excluded(z)]
        total, n = total + kept.double().sum(0).cpu(), n + len(kept)
    return (total / n).float().to(lens.device)
    yield  # a generator, for `yield from`'s return value


def _outside_excluded(sae: SAE, rebuild: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """z with every position but the excluded ones rebuilt."""

    def replace(z: Tensor) -> Tensor:
        return torch.where(sae.excluded(z)[..., None], z, rebuild(z).to(z.dtype))

    return replace
