"""A norm, LayerNorm or RMSNorm, as a linear map of what goes in, once its scale is frozen."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Norm(NamedTuple):
    """What of a norm is the same for every token."""

    gain: Tensor
    """[d]"""
    bias: Tensor
    """[d]"""
    centres: bool

    def map(self, x: Tensor) -> Tensor:
        """x [..., d] as its centring and gain make it, which is linear; not its 1/rms, not its bias."""
        return (x - x.mean(-1, keepdim=True) if self.centres else x) * self.gain

    def read(self, w: Tensor) -> Tensor:
        """The transpose of `map`: what x is read by where w [..., d] reads `map(x)`."""
        folded = w * self.gain
        return folded - folded.mean(-1, keepdim=True) if self.centres else folded


def plain(d: int, device: torch.device, *, centres: bool = False) -> Norm:
    """A norm with no gain and no bias."""
    return Norm(torch.ones(d, device=device), torch.zeros(d, device=device), centres)


def norm_parts(norm: nn.Module | None, d: int, device: torch.device) -> Norm:
    """The norm itself is asked, since models store gains as w or as 1 + w. A vector of +s and -s has mean 0 and rms s, so
    the norm gives back gain x sign + bias; a constant vector gives just the bias if, and only if, the norm centres."""
    if norm is None:
        return plain(d, device)
    sign = torch.ones(d, device=device)
    sign[1::2] = -1
    with torch.no_grad():
        bias = norm(torch.zeros(1, 1, d, device=device))[0, 0]
        gain = (norm(1e3 * sign[None, None])[0, 0] - bias) * sign  # 1e3 makes the norm's epsilon vanish
        constant = norm(torch.ones(1, 1, d, device=device))[0, 0] - bias
    return Norm(gain, bias, centres=bool(constant.norm() < 0.5 * gain.norm()))  # in fact either 0 or the gain


def through_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """x as the norm's centring, if it is a LayerNorm, and gain make it; not its 1/rms, not its bias."""
    return norm_parts(norm, x.shape[-1], x.device).map(x)


def norm_scale(x: Tensor, norm: nn.Module | None) -> Tensor:
    """What the norm divides x [..., d] by, [...], from what goes in and what comes out, so that its epsilon is in it."""
    if norm is None:
        return torch.ones_like(x[..., 0])
    _, bias, _ = norm_parts(norm, x.shape[-1], x.device)
    before = through_norm(x, norm)
    with torch.no_grad():
        after = norm(x) - bias
    scale = before.square().sum(-1) / (before * after).sum(-1)
    return torch.where(scale.isfinite(), scale, 1.0)  # zeros stay zeros whatever divides them


def through_frozen_norm(x: Tensor, norm: nn.Module, whole: Tensor) -> Tensor:
    """`through_norm` of x [n, parts, d], divided by what the norm divides `whole` [n, d] by; not its bias."""
    return through_norm(x, norm) / norm_scale(whole, norm)[:, None, None]
