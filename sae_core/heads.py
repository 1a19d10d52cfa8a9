"""What a harvest's features say of each head of the site: how many it leads, of what families, how many things it does.

Kissane et al. 2024 looked by hand at the ten features of every GPT-2 Small head that have the largest decoder share there, and
called a head plausibly monosemantic where all ten were closely related (14 of 144). This makes the same question countable.
With T the TOP live features by decoder share at head h and d_i the decoder's slice of feature i at h:

    alike(i, j)    = |cos(d_i, d_j)|
    diversity      = (sum of e)^2 / sum of e^2, with e the eigenvalues of the sum over live features i of m_i d_i d_i^T
    related(i, j)  = both are of one family that names a mechanism, or alike >= 0.5, or a fifth of what they promote is the same
    polysemantic   = 1 - share of pairs of T that are related

`diversity` is about directions: into how many the head's writing is spread as if equally, from 1 to d_head. Each feature counts
by how much it is there, m_i = firings x (mean activation)^2: without that weight every head has the same, since a few thousand
directions, or the ten of T, fill d_head dimensions as random ones do (mean |cosine| of T is that of random directions at every
head of SmolLM2's layer 17, while the weighted number goes from 5 at head 2 to 34 at head 8). What features give together is
not counted in: their products are small beside, as they seldom fire together.

`polysemantic` is about kinds: ten features that all copy by induction, each its own token, write ten directions and have a
polysemantic near 0. "local", "long-range" and "row start" relate nothing, since most features are so.

Limits. Two features that nothing here relates may still be about one thing that only a reader sees, so `polysemantic` is an
upper estimate; and a low value speaks of ten features, not of the head: `detail` has the same for the top 50, where a head that
does one thing stays low. By weights a share says how much of the feature is written at this head, not how often it works there:
`detail` has the ten by share of |mean DFA| too, and how many are in both. A feature spread over many heads is no head's own:
`participation` is how many heads the top features are spread over.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sae_core.records import HeadRecord
from sae_core.token_texts import plain

if TYPE_CHECKING:
    from sae_core.feature_table import FeatureTable
    from sae_core.saes.base import SAE

TOP, MANY = 10, 50
"""Features that a head is judged by, and more of them to see whether that is stable."""
LEAST = 5
"""With fewer live features nothing is said of a head."""
ALIKE = 0.5
"""|cosine| of decoder slices from which on two features are related: of random ones in 64 dimensions 1 pair in 45,000."""
COMMON = 0.2
"""Share of promoted words in common (of all that either promotes) from which on two features are related."""
UNCLEAR = "unclear"
BROAD = frozenset({"local", "long-range", "row start"})
"""Families that are too broad to relate two features."""
SAME = {"token by induction": "induction"}
"""Families that are a special case of another."""


def summaries(table: "FeatureTable", sae: "SAE") -> list[HeadRecord]:
    """One record per head, in order."""
    families = [table.family(idx) for idx in range(len(table))]
    mechanisms = [SAME.get(family or "", family) for family in families]
    words = [frozenset(plain(text) for text in table.promoted(idx)) for idx in range(len(table))]
    live = np.flatnonzero(table.arrays["count"])
    norm, dfa = table.arrays["head_norm"], np.abs(table.arrays["head_dfa"].astype(np.float64))
    dfa /= np.maximum(dfa.sum(1, keepdims=True), 1e-12)
    count, total = table.arrays["count"], table.arrays["total"].astype(np.float64)
    mass = total**2 / np.maximum(count, 1)
    W_dec = sae.W_dec.detach().float().cpu().numpy().reshape(len(table), sae.cfg.n_heads, -1)
    found = []
    for head in range(sae.cfg.n_heads):
        led = live[dfa[live].argmax(1) == head]
        top, top_dfa = (_largest(shares[:, head], live) for shares in (norm, dfa))
        relations = {n: _relations(top[:n], W_dec[:, head], mechanisms, words) for n in (TOP, MANY)}
        detail: dict[str, Any] = {
            "top": [[int(i), round(float(norm[i, head]), 4)] for i in top[:TOP]],
            "top_dfa": [[int(i), round(float(dfa[i, head]), 4)] for i in top_dfa[:TOP]],
            "in_both": len(set(top[:TOP].tolist()) & set(top_dfa[:TOP].tolist())),
            "participation": _rounded(participation(norm[top[:TOP]]).mean()) if len(top) else None,
            "related_by": relations[TOP].by,
            "polysemantic_of_many": relations[MANY].polysemantic,
        }
        found.append(
            HeadRecord(
                head=head,
                n_led=len(led),
                n_led_norm=int((norm[live].argmax(1) == head).sum()),
                families=dict(Counter(families[i] or UNCLEAR for i in led.tolist()).most_common()),
                diversity=_rounded(diversity(W_dec[live, head], mass[live])) if len(live) >= LEAST else None,
                polysemantic=relations[TOP].polysemantic,
                detail=detail,
            )
        )
    return found


class _Relations:
    """How some features hang together at a head."""

    def __init__(self, polysemantic: float | None, by: dict[str, float]) -> None:
        self.polysemantic = polysemantic
        self.by = by
        """Share of pairs that are related by `family`, `direction`, `tokens`."""


def _largest(share: NDArray[Any], live: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """The live features with the largest shares, ties by index."""
    order: NDArray[np.integer[Any]] = live[np.argsort(-share[live], kind="stable")][:MANY]
    return order


def _relations(
    which: NDArray[np.integer[Any]], slices: NDArray[Any], families: Sequence[str | None], words: Sequence[frozenset[str]]
) -> _Relations:
    if len(which) < LEAST:
        return _Relations(None, {})
    unit = slices[which] / np.maximum(np.linalg.norm(slices[which], axis=1, keepdims=True), 1e-12)
    pairs = np.triu_indices(len(which), 1)
    alike = np.abs(unit @ unit.T)[pairs]
    a, b = which[pairs[0]].tolist(), which[pairs[1]].tolist()
    kin = np.array([families[i] == families[j] and families[i] not in BROAD | {None} for i, j in zip(a, b, strict=True)])
    shared = np.array([_overlap(words[i], words[j]) >= COMMON for i, j in zip(a, b, strict=True)])
    close = alike >= ALIKE
    by = {name: _rounded(share.mean()) for name, share in (("family", kin), ("direction", close), ("tokens", shared))}
    return _Relations(
        _rounded(1 - (kin | close | shared).mean()),
        by,
    )


def diversity(slices: NDArray[Any], mass: NDArray[np.float64]) -> float:
    """Directions that slices [n, d_head], each with a mass [n], are spread over as if equally: the participation ratio
    (trace of C)^2 / trace of C^2 of C = sum of m_i d_i d_i^T; 0 where there is nothing."""
    weighted = slices.astype(np.float64) * np.sqrt(mass)[:, None]
    C = weighted.T @ weighted
    size = float((C * C).sum())
    return float(np.trace(C)) ** 2 / size if size else 0.0


def participation(shares: NDArray[Any]) -> NDArray[np.float64]:
    """How many heads features [n, n_heads] are spread over as if equally, exp(-sum of q log q): [n], from 1 to n_heads."""
    q = np.maximum(shares.astype(np.float64), 1e-12)
    q /= q.sum(1, keepdims=True)
    spread: NDArray[np.float64] = np.exp(-(q * np.log(q)).sum(1))
    return spread


def _overlap(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a or b else 0.0


def _rounded(value: float) -> float:
    return round(float(value), 4)
