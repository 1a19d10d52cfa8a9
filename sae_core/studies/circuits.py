"""What a head's values and output would write about a token that it attends to: its OV circuit. Tensors in, tensors out.

With v[i] the value that token i has at a head, less the mean over tokens, and o[j] = W_O u_j the direction of z that raises
the logit of token j (unembedding u, the norms' centring and gain in it),

    C[i, j] = v[i] . o[j]       what attending to i writes to the logit of j, in the unit of `Lens.logit_weights`

is the head's whole OV circuit (Elhage et al. 2021). It has the rank of a head, so two thin matrices hold it: C is never made.
The mean over tokens is taken off since what a head writes whatever it reads says nothing of what it reads; and each o[j] is
taken less the mean over j, since logits are relative.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_core.token_texts import next_place, sequence_places

FEWEST = 4
"""Members that a class needs: among fewer, luck finds the successor too often."""
HIGHEST = 200
"""Largest number that is asked for: the year after 1984 is no matter of counting."""


class Copying(NamedTuple):
    """Whether a head writes what it reads."""

    eigenvalues: float
    """sum of C's eigenvalues / sum of their sizes (Elhage et al. 2021): 1 where all are positive, so that what is read is
    written; -1 where all are negative, so that it is lowered; about 0 for a head that does neither."""
    own: float
    """Mean over tokens i of C[i, i] in standard deviations of C[i, :]: how far a token raises its own logit above others'."""


def copying(v: Tensor, o: Tensor) -> Copying:
    """From v [n, d_head] and o [n, d_head] of the same n tokens. 0 for a head that writes nothing.

    The eigenvalues of C = v o^T that are not 0 are those of o^T v, d_head x d_head: for every x, C x = c x gives
    (o^T v) (o^T x) = c (o^T x). Real parts alone are summed; the sum is real, as eigenvalues come in conjugate pairs.
    """
    v, o = (part.double() - part.double().mean(0) for part in (v, o))
    values = torch.linalg.eigvals(o.T @ v)
    size = float(values.abs().sum())
    # Row i of C has mean 0, for o is centred, and the variance v[i] (o^T o / n) v[i].
    spread = torch.einsum("nd,de,ne->n", v, o.T @ o / len(o), v).clamp_min(0).sqrt()
    own = (v * o).sum(1) / spread.clamp_min(1e-30)
    return Copying(float(values.real.sum()) / size if size else 0.0, float(own.mean()))


class Class(NamedTuple):
    """Tokens of one form that are said in order: ` Monday`, ` Tuesday`, ..."""

    sequence: str
    """As `token_texts.sequence_places` names it."""
    ids: tuple[int, ...]
    after: tuple[tuple[int, int], ...]
    """(place in `ids` of a token, place of the one that comes after it)."""


def classes(texts: Mapping[int, str]) -> list[Class]:
    """The classes among tokens, by id: those of one sequence with the same leading space and capitals."""
    found: dict[tuple[str, bool, str], dict[int, int]] = {}
    for token, text in texts.items():
        for sequence, place in sequence_places(text).items():
            if place <= HIGHEST:
                found.setdefault((sequence, text.startswith(" "), _case(text)), {}).setdefault(place, token)
    made = []
    for (sequence, _, _), members in found.items():
        order = sorted(members)
        after = [(i, order.index(after)) for i, place in enumerate(order) if (after := next_place(sequence, place)) in members]
        if len(order) >= FEWEST and after:
            made.append(Class(sequence, tuple(members[place] for place in order), tuple(after)))
    return made


def _case(text: str) -> str:
    word = text.strip()
    return "lower" if word == word.lower() else "upper" if word == word.upper() and len(word) > 1 else "title"


def successors(scores: Tensor, one: Class) -> float:
    """Of the class' tokens that have a successor in it, the share for which that has the largest logit of the class, the
    token itself among the others (Gould et al. 2023): scores [n, n] is C between the class' tokens."""
    best: list[int] = scores.argmax(1).tolist()
    return sum(best[i] == after for i, after in one.after) / len(one.after)


def by_sequence(shares: Sequence[float], every: Sequence[Class]) -> dict[str, float]:
    """Mean share of each sequence over its classes: a sequence that has many forms counts no more than others."""
    sums: dict[str, list[float]] = {}
    for share, one in zip(shares, every, strict=True):
        sums.setdefault(one.sequence, []).append(share)
    return {sequence: sum(values) / len(values) for sequence, values in sums.items()}
