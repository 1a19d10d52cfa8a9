"""What kind of work a feature does, read off where the DFA of its strongest examples comes from.

A verdict rests on the kept top examples: a sample of the strongest firings, not of all. `measure` turns each example into
shares of its positive DFA (heads summed after the negative part is cut off; the row start left out, unless said);
`judge` averages them over examples and compares with thresholds. A feature that fits no rule gets no family: most do not.
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
    ]
    return torch.stack(columns, 1).float(), body.argmax(1)


MIN_EXAMPLES = 5
"""With fewer top examples nothing is said."""


def judge(mean: dict[str, float], n: int) -> str | None:
    """The family that a feature's mean measures over `n` top examples speak for, or None. The most specific rule wins.

    `mean` holds MEASURES (those unknown left out) and `source_logit`: how many standard deviations (over the vocabulary)
    above the mean the feature's decoder lifts the token of its strongest source.

    Thresholds. A share of 0.5 says that one kind of source gives more than all others together. Induction and
    duplicates must also beat what an even spread over sources would give by 4 times: a text that repeats one word makes
    almost every source a "previous occurrence". 0.4 for induction, since part of its DFA rests on the tokens around; on
    SmolLM2's layer 17 this picks features of its induction heads (3, 4, 5), at 0.5 to 0.9, while features of other heads
    stay below 0.35. Suppression: -2 standard deviations is the lowest 2 % of the vocabulary, and one source must hold a
    third of the DFA, so that "the source" means something. Local and long range are what is left, by distance alone; `far`
    is known for late destinations only, so it must agree with the mean distance over all.
    """
    if n < MIN_EXAMPLES:
        return None
    rules = {
        "row start": mean["row_start"] >= 0.6,
        "induction": mean["induction"] >= max(0.4, 4 * mean["induction_chance"]),
        "suppression": mean["source_logit"] <= -2 and mean["top_share"] >= 1 / 3,
        "duplicate token": mean["duplicate"] >= max(0.5, 4 * mean["duplicate_chance"]),
        "current token": mean["current"] >= 0.5,
        "previous token": mean["previous"] >= 0.5,
        "local": mean.get("near", 0) >= 0.8,
        "long-range": mean["distance"] >= 30 or (mean.get("far", 0) >= 0.5 and mean["distance"] >= 20),
    }
    return next((family for family, holds in rules.items() if holds), None)


def average(measures: NDArray[np.float32], feature: NDArray[np.integer[Any]], n_features: int) -> NDArray[np.float32]:
    """Mean of each measure over a feature's examples, nan left out: [n_features, n_measures]; nan where nothing is known."""
    known = ~np.isnan(measures)
    means = np.full((n_features, measures.shape[1]), np.nan, dtype=np.float32)
    for column in range(measures.shape[1]):
        where = feature[known[:, column]]
        count = np.bincount(where, minlength=n_features)
        total = np.bincount(where, weights=measures[known[:, column], column], minlength=n_features)
        means[count > 0, column] = total[count > 0] / count[count > 0]
    return means
