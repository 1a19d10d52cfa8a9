"""Where the DFA of an example comes from, by kind of source: the measures that the detectors of families rest on.

`measure` turns an example into shares of its positive DFA (heads summed after the negative part is cut off; the row start
left out, unless said), on the visit, where the whole DFA is at hand. What needs the texts of tokens is added by detectors.py
from what the visit kept.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEAR = 10
"""Tokens that count as local."""
FAR = 32
"""Beyond this many tokens is long range."""

MEASURES = (
    "row_start",  # share of all positive DFA that comes from the row's first token, or its like between packed documents
    "induction",  # share on sources whose previous token is the destination's token: ... A [B] ... A -> B
    "induction_chance",  # share of sources that are such, as if all gave the same
    "previous",  # share on the source right before the destination
    "current",  # share on the destination itself
    "duplicate",  # share on earlier copies of the destination's token
    "duplicate_chance",
    "near",  # share within NEAR tokens; nan where the destination is so early that nothing else is possible
    "far",  # share beyond FAR tokens; nan where the destination is too early for it
    "distance",  # mean destination - source
    "top_share",  # share of the one source that gives most
    "source_gap",  # destination - that source
)


def measure(dfa: Tensor, tokens: Tensor, dest: Tensor, row_start: int) -> tuple[Tensor, Tensor]:
    """Shares of positive DFA by kind of source: float32 [n, len(MEASURES)], and the strongest source's position [n].

    dfa [n, n_heads, src], tokens [src] of the one row they all are in, dest [n], row_start the id of the first token.
    """
    n, _, length = dfa.shape
    source = torch.arange(length, device=dfa.device)
    positive = dfa.clamp(min=0).sum(1)
    every = positive.sum(1).clamp_min(1e-12)
    # A row's start is where attention rests when it has nothing to do, and so is the same token between packed documents;
    # a feature is told apart by the rest.
    starts = (tokens == row_start) | (source == 0)
    possible = ~starts[None] & (source[None] <= dest[:, None])
    body = positive * possible
    total = body.sum(1).clamp_min(1e-12)
    gap = dest[:, None] - source[None]
    own = tokens[dest][:, None]
    before = tokens.roll(1)  # the token before source s; that of s = 0 is never looked at
    induced = possible & (before[None] == own) & (gap > 0)
    copies = possible & (tokens[None] == own) & (gap > 0)
    n_possible = possible.sum(1).clamp_min(1)

    def share(where: Tensor) -> Tensor:
        return (body * where).sum(1) / total

    def chance(where: Tensor) -> Tensor:
        return where.sum(1) / n_possible

    nan = torch.full((n,), torch.nan, device=dfa.device)
    strongest = body.argmax(1)
    columns = [
        (positive * starts).sum(1) / every,
        share(induced),
        chance(induced),
        share(gap == 1),
        share(gap == 0),
        share(copies),
        chance(copies),
        torch.where(dest > 2 * NEAR, share(gap <= NEAR), nan),
        torch.where(dest > 2 * FAR, share(gap > FAR), nan),
        (body * gap).sum(1) / total,
        body.amax(1) / total,
        dest - strongest,
    ]
    return torch.stack([column.float() for column in columns], 1), strongest


def average(values: NDArray[Any], feature: NDArray[np.integer[Any]], n_features: int) -> NDArray[np.float32]:
    """Mean of each column of values [n, k] over a feature's examples, nan left out: [n_features, k]; nan where nothing is
    known."""
    known = ~np.isnan(values)
    means = np.full((n_features, values.shape[1]), np.nan, dtype=np.float32)
    for column in range(values.shape[1]):
        where = feature[known[:, column]]
        count = np.bincount(where, minlength=n_features)
        total = np.bincount(where, weights=values[known[:, column], column], minlength=n_features)
        means[count > 0, column] = total[count > 0] / count[count > 0]
    return means
