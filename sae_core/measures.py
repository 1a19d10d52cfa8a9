"""Sums over tokens, and over weights, from which an SAE's measures follow. Each formula has a test in closed form.

    FVU      sum |z - z_hat|^2 / sum |z - z_mean|^2, z_mean the mean over all tokens counted (neither zero nor per row);
             of a head or of some positions: the same two sums over these coordinates or tokens, z_mean still over all tokens
    gamma    sum |z_hat|^2 / sum z_hat . z: the factor by which z_hat would have to be divided to fit z best; below 1 the SAE
             shrinks (Rajamanoharan et al. 2024, "Improving dictionary learning with gated SAEs", section 5.2). The mean of z,
             which b_dec gives for nothing, pulls it to 1, so `gamma_centred` takes z_mean from both first.
    cosine   mean over tokens of cos(z, z_hat); ratio: mean over tokens of |z_hat| / |z|

Sums are kept in fp64: the squares of a hundred million fp32 values lose their last digits otherwise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TINY = 1e-12  # stands for a norm of zero, so that a division gives 0 rather than nan
AT_ONCE = 2**25  # elements of one matrix of cosines or activations (128 MiB in fp32)


def bucket(position: int) -> tuple[int, int]:
    """The positions (first, last) that are reported together with `position`: 0, 1, 2 to 3, 4 to 7, 8 to 15 and so on."""
    return (0, 0) if position == 0 else (1 << position.bit_length() - 1, (1 << position.bit_length()) - 1)


class Sums:
    """What tokens add up to, coordinate by coordinate."""

    def __init__(self, d_in: int) -> None:
        self.n = 0
        self.z, self.z_hat, self.zz, self.hh, self.zh, self.error = _zeros(d_in, 6)
        self.cosine = self.norm_in = self.norm_out = self.ratio = 0.0

    def add(self, z: Tensor, z_hat: Tensor) -> None:
        """Count z and its reconstruction, both [n, d_in]."""
        z, z_hat = z.double().cpu(), z_hat.double().cpu()
        self.n += len(z)
        self.z += z.sum(0)
        self.z_hat += z_hat.sum(0)
        self.zz += z.square().sum(0)
        self.hh += z_hat.square().sum(0)
        self.zh += (z * z_hat).sum(0)
        self.error += (z - z_hat).square().sum(0)  # not zz - 2 zh + hh, which cancels
        norm_in, norm_out = z.norm(dim=1), z_hat.norm(dim=1)
        self.norm_in += float(norm_in.sum())
        self.norm_out += float(norm_out.sum())
        self.ratio += float((norm_out / norm_in.clamp_min(TINY)).sum())
        self.cosine += float(((z * z_hat).sum(1) / (norm_in * norm_out).clamp_min(TINY)).sum())

    def merge(self, other: "Sums") -> "Sums":
        """Take in what another has counted."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def mean(self) -> Tensor:
        """z_mean [d_in]."""
        return self.z / self.n

    def spread(self, mean: Tensor | None = None) -> Tensor:
        """sum (z - mean)^2 per coordinate [d_in], around these tokens' own mean or around another."""
        mean = self.mean if mean is None else mean
        return self.zz - 2 * mean * self.z + self.n * mean.square()

    def fvu(self, mean: Tensor | None = None) -> float:
        """Fraction of variance unexplained, over all coordinates."""
        return float(self.error.sum() / self.spread(mean).sum())

    def fvu_by_head(self, n_heads: int) -> list[float]:
        """Over each head's coordinates."""
        return _by_head(self.error, n_heads, self.spread())

    def share_by_head(self, n_heads: int) -> list[float]:
        """Each head's share of the variance."""
        return [float(v) for v in self.spread().view(n_heads, -1).sum(1) / self.spread().sum()]

    def gamma(self) -> float:
        """Relative reconstruction bias."""
        return float(self.hh.sum() / self.zh.sum())

    def gamma_centred(self) -> float:
        """The same of z - z_mean and z_hat - z_mean."""
        mean = self.mean
        ours = (self.hh - 2 * mean * self.z_hat + self.n * mean.square()).sum()
        both = (self.zh - mean * self.z_hat).sum()  # sum (z_hat - m)(z - m); the other two terms cancel, as sum z = n m
        return float(ours / both)

    def gamma_by_head(self, n_heads: int) -> list[float]:
        """`gamma` over each head's coordinates."""
        return _by_head(self.hh, n_heads, self.zh)


def _zeros(d: int, n: int) -> list[Tensor]:
    return [torch.zeros(d, dtype=torch.float64) for _ in range(n)]


def _by_head(over: Tensor, n_heads: int, under: Tensor) -> list[float]:
    return [float(v) for v in over.view(n_heads, -1).sum(1) / under.view(n_heads, -1).sum(1)]


class Firing:
    """How often features fire, over all tokens counted."""

    def __init__(self, d_sae: int) -> None:
        self.n = 0
        self.fired = torch.zeros(d_sae, dtype=torch.int64)

    def add(self, acts: Tensor) -> Tensor:
        """Count activations [n, d_sae]; active features per token [n]."""
        on = acts > 0
        self.n += len(acts)
        self.fired += on.sum(0).cpu()
        return on.sum(1).cpu()

    @property
    def live(self) -> Tensor:
        """bool [d_sae]: fired at least once."""
        return self.fired > 0

    @property
    def density(self) -> Tensor:
        """float64 [d_sae]: share of tokens on which each feature fires."""
        return self.fired.double() / self.n

    def above(self, share: float) -> float:
        """Share of features with a density above `share`."""
        return float((self.density > share).double().mean())

    def quantiles(self, at: Sequence[float]) -> list[float]:
        """Quantiles of the density over all features, dead ones too, linearly between neighbours."""
        return [float(v) for v in torch.quantile(self.density, torch.tensor(at, dtype=torch.float64))]


# ---- weights ----


def unit(vectors: Tensor) -> Tensor:
    """Rows [n, d] at length 1; a row of zeros stays one."""
    lengths: Tensor = vectors.norm(dim=1, keepdim=True).clamp_min(TINY)
    return vectors / lengths


def nearest(a: Tensor, b: Tensor, *, same: bool = False) -> tuple[Tensor, Tensor]:
    """For each row of a [n, d]: its largest cosine with a row of b [m, d], and which. `same`: a is b, a row is not its own
    neighbour. Signed: an opposite direction is no neighbour."""
    a, b = unit(a.float()), unit(b.float())
    best, which = [], []
    step = max(1, AT_ONCE // max(len(b), 1))
    for low in range(0, len(a), step):
        cosines = a[low : low + step] @ b.T
        if same:
            rows = torch.arange(len(cosines), device=a.device)
            cosines[rows, rows + low] = -torch.inf
        value, index = cosines.max(dim=1)
        best.append(value.cpu())
        which.append(index.cpu())
    return torch.cat(best), torch.cat(which)


def neighbour_cosine(vectors: Tensor) -> float | None:
    """Mean over rows of the cosine with the nearest other row; None with fewer than two."""
    return float(nearest(vectors, vectors, same=True)[0].mean()) if len(vectors) > 1 else None


def alignment(a: Tensor, b: Tensor) -> float | None:
    """Mean cosine of matching rows; None without any."""
    return float((unit(a.float()) * unit(b.float())).sum(1).mean()) if len(a) else None
