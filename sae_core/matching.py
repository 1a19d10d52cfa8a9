"""Which features of one SAE are found again in another of the same site: decoder directions matched by cosine, pair by pair.

`stability.py` sums this up in a few numbers; here is what they come from. For every live feature of `a` the nearest of `b`, and
back; two that choose each other are a mutual pair. A feature whose nearest is far has no counterpart: the other SAE does not
have this direction, or has it split among several.
"""

from pydantic import BaseModel, ConfigDict
from torch import Tensor, arange, histc

from sae_core.measures import nearest
from sae_core.stability import Stability, stability

BINS = 40
SHOWN = 100
"""Pairs, and features without a counterpart, that are kept."""
APART = 0.5
"""A feature whose nearest has a smaller cosine has no counterpart."""


class Match(BaseModel):
    """A feature of `a`, its nearest of `b`, and their cosine."""

    model_config = ConfigDict(frozen=True)

    a: int
    b: int
    cosine: float


class Side(BaseModel):
    """How far one SAE's features are found in the other."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    summary: Stability
    counts: list[int]
    """Features by their largest cosine, from 0 (what is negative stands there too) to 1 in equal steps."""
    apart: int
    """Features without a counterpart."""
    alone: list[Match]
    """The most lonely of them: the feature is `a` on its own side, `b` the other's nearest."""


class Matching(BaseModel):
    """Two SAEs, feature by feature."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    summary: str
    ours: Side
    theirs: Side
    best: list[Match]
    """Mutual pairs with the largest cosine."""
    spread: list[Match]
    """Mutual pairs at equal steps from the best to the worst: what a middling match looks like."""
    mutual: int
    notes: list[str]


def match(W_a: Tensor, W_b: Tensor, live_a: Tensor, live_b: Tensor, names: tuple[str, str], notes: list[str]) -> Matching:
    """Decoders [n, d] and [m, d] of SAEs called `names`, matched over the features whose indices are `live_a` and `live_b`."""
    a, b = W_a[live_a].cpu(), W_b[live_b].cpu()
    if not len(a) or not len(b):
        none = [
            Side(summary=stability(*two, name), counts=[], apart=0, alone=[])
            for two, name in (((a, b), names[1]), ((b, a), names[0]))
        ]
        return Matching(
            summary="one of them has no live feature", ours=none[0], theirs=none[1], best=[], spread=[], mutual=0, notes=notes
        )
    there, to_b = nearest(a, b)
    back, to_a = nearest(b, a)
    ours = _side(stability(a, b, names[1]), there, live_a, live_b[to_b])
    theirs = _side(stability(b, a, names[0]), back, live_b, live_a[to_a])
    chosen = (to_a[to_b] == arange(len(a))).nonzero().flatten()
    order = chosen[there[chosen].argsort(descending=True, stable=True)].tolist()
    pairs = [Match(a=int(live_a[i]), b=int(live_b[to_b[i]]), cosine=round(float(there[i]), 4)) for i in order]
    steps = sorted({round(i * (len(pairs) - 1) / (SHOWN - 1)) for i in range(SHOWN)}) if pairs else []
    return Matching(
        summary=f"{len(pairs):,} mutual pairs; {ours.apart:,} features of {names[0]} and {theirs.apart:,} of {names[1]} have no "
        "counterpart",
        ours=ours,
        theirs=theirs,
        best=pairs[:SHOWN],
        spread=[pairs[i] for i in steps],
        mutual=len(pairs),
        notes=notes,
    )


def _side(summary: Stability, best: Tensor, mine: Tensor, other: Tensor) -> Side:
    order = best.argsort(stable=True)[:SHOWN].tolist()
    return Side(
        summary=summary,
        counts=[int(n) for n in histc(best.clamp(0, 1), BINS, 0, 1).tolist()],
        apart=int((best < APART).sum()),
        alone=[Match(a=int(mine[i]), b=int(other[i]), cosine=round(float(best[i]), 4)) for i in order if best[i] < APART],
    )
