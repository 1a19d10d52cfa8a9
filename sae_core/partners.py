"""Which features fire together, from the whole codes of a uniform sample of a sweep's tokens (`tally.Codes`).

Of features i and j that fire on n_i and n_j of the sample's T tokens, and on n_ij of them together, the strength is the
correlation of the two indicators, phi (Yule 1912): the Pearson correlation of two variables that are 0 or 1,

    phi = (T n_ij - n_i n_j) / sqrt(n_i (T - n_i) n_j (T - n_j))

1 where the two always fire together, 0 where they fire as by chance. All n_ij together are C^T C of the 0/1 matrix of codes
C [T, F]: a sparse product, made here for some features at a time, since the whole of it may not fit into memory.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_core.tally import Codes

PARTNERS = 10
"""Partners told of a feature."""
SUPPORT = 5
"""Tokens on which two features must fire together: of fewer, phi says little."""
COUNTS_AT_ONCE = 1 << 23
"""Pairs of features counted at once (64 MiB)."""
PAIRS_AT_ONCE = 1 << 22
"""Firings together that are listed at once (32 MiB)."""


@dataclass(frozen=True)
class Partners:
    """Each feature's partners, strongest first, equal ones by their number; a place without one holds -1."""

    n_tokens: int
    """T, tokens in the sample."""
    feature: NDArray[np.int32]
    """[F, PARTNERS]"""
    both: NDArray[np.int32]
    """[F, PARTNERS]: tokens on which both fire."""
    phi: NDArray[np.float32]
    """[F, PARTNERS], > 0"""


def partners(codes: Codes, n_features: int) -> Partners:
    """The PARTNERS features that correlate most with each one, of those that fire with it on SUPPORT tokens or more."""
    n_tokens, features, n = len(codes.token), codes.feature.numpy(), codes.n.numpy()
    fired = np.bincount(features, minlength=n_features)
    spread = np.sqrt(fired * (n_tokens - fired).astype(np.float64))
    begins = np.repeat(np.cumsum(n) - n, n)  # [firings] where the firing's token begins among the firings
    lengths = np.repeat(n, n)
    by_feature = np.argsort(features, kind="stable")
    ends = np.cumsum(np.append(0, fired))
    found = Partners(
        n_tokens,
        np.full((n_features, PARTNERS), -1, dtype=np.int32),
        np.zeros((n_features, PARTNERS), dtype=np.int32),
        np.zeros((n_features, PARTNERS), dtype=np.float32),
    )
    step = max(1, COUNTS_AT_ONCE // max(n_features, 1))
    for low in range(0, n_features, step):
        high = min(low + step, n_features)
        mine = by_feature[ends[low] : ends[high]]
        counts = _together(features, mine, begins[mine], lengths[mine], low, high - low, n_features)
        _strongest(found, counts, low, fired, spread)
    return found


def _together(
    features: NDArray[np.int32],
    mine: NDArray[np.int64],
    begins: NDArray[np.int64],
    lengths: NDArray[np.int64],
    low: int,
    rows: int,
    n_features: int,
) -> NDArray[np.int64]:
    """n_ij [rows, F] of the features from `low`: every firing of theirs (`mine`, indices) with all firings on its token."""
    counts = np.zeros(rows * n_features, dtype=np.int64)
    total = np.cumsum(lengths)
    cuts = np.searchsorted(total, np.arange(PAIRS_AT_ONCE, (int(total[-1]) if len(total) else 0) + PAIRS_AT_ONCE, PAIRS_AT_ONCE))
    before = 0
    for cut in (cuts + 1).clip(max=len(mine)).tolist():
        some = slice(before, cut)
        n, before = lengths[some], cut
        other = np.repeat(begins[some] - (np.cumsum(n) - n), n) + np.arange(n.sum())
        left = np.repeat(features[mine[some]] - low, n)
        counts += np.bincount(left * np.int64(n_features) + features[other], minlength=rows * n_features)
    return counts.reshape(rows, n_features)


def _strongest(
    found: Partners, counts: NDArray[np.int64], low: int, fired: NDArray[np.int64], spread: NDArray[np.float64]
) -> None:
    """Write the partners of the features from `low`, whose counts [rows, F] these are."""
    left, right = np.nonzero(counts >= SUPPORT)
    both = counts[left, right]
    left = left + low
    possible = (left != right) & (spread[left] > 0) & (spread[right] > 0)
    left, right, both = left[possible], right[possible], both[possible]
    phi = (found.n_tokens * both.astype(np.float64) - fired[left] * fired[right].astype(np.float64)) / (
        spread[left] * spread[right]
    )
    order = np.lexsort((right, -phi, left))
    order = order[phi[order] > 0]
    first = np.flatnonzero(np.append(True, left[order][1:] != left[order][:-1])) if len(order) else order
    place = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    order, place = order[place < PARTNERS], place[place < PARTNERS]
    found.feature[left[order], place] = right[order]
    found.both[left[order], place] = both[order]
    found.phi[left[order], place] = phi[order]


def coactive(n_tokens: int, feature: NDArray[Any], both: NDArray[Any], phi: NDArray[Any]) -> dict[str, Any]:
    """One feature's partners [PARTNERS] as they are stored; empty where it has none."""
    there = feature >= 0
    if not there.any():
        return {}
    told = zip(feature[there].tolist(), both[there].tolist(), phi[there].tolist(), strict=True)
    return {"tokens": n_tokens, "pairs": [[i, n, round(p, 4)] for i, n, p in told]}
