"""What a harvest hands over to be stored, as plain numbers and numpy arrays. No torch, so that `store/` may name it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


def head_agreement(head_norm: Sequence[float], head_dfa: Sequence[float]) -> float | None:
    """How far two views of a feature's heads agree: shares by decoder norm, and by size of the mean DFA.

    1 less the total variation distance, sum of |difference of shares| / 2: 1 where the shares are equal, 0 where no head has a
    part in both. None where there is no DFA, as of a dead feature, or none is known.
    """
    norm, data = np.asarray(head_norm, dtype=np.float64), np.abs(np.asarray(head_dfa, dtype=np.float64))
    if not norm.sum() or not data.sum() or not np.isfinite(data).all():
        return None
    return float(1 - np.abs(norm / norm.sum() - data / data.sum()).sum() / 2)


@dataclass(frozen=True)
class ExampleRecord:
    """A row where a feature fired, at one destination. Every number is from the fp32 visit."""

    feature: int
    band: int
    """0 = the strongest examples; 1.. = samples of the value bands, strongest band first."""
    rank: int
    """From 0 within the band, strongest first."""
    row: int
    dest: int
    start: int
    """First position of the shown window."""
    act: float
    preact: float
    bias: float
    gap: float
    abs_dfa: float
    acts_pos: NDArray[np.uint16]
    acts_value: NDArray[np.float32]
    """The feature's nonzero activations in the window."""
    dfa_src: NDArray[np.uint16]
    dfa_head: NDArray[np.uint8]
    dfa_value: NDArray[np.float32]
    """Kept DFA entries, by size."""
    dropped: NDArray[np.float32]
    """[n_heads]: sum of the window's entries that were not kept."""
    before: NDArray[np.float32]
    """[n_heads]: sum over the sources before the window."""


@dataclass(frozen=True)
class RowRecord:
    """A visited row with its examples."""

    row: int
    tokens: NDArray[np.int32]
    texts: list[str]
    examples: list[ExampleRecord]


@dataclass(frozen=True)
class FeatureRecord:
    """One feature, as one harvest saw it. Fields as in `server.tables.Feature` and `FeatureDetail`."""

    idx: int
    n_fired: int
    density: float
    max_act: float
    mean_act: float
    top_head: int
    top_head_share: float
    top_head_dfa: int | None
    top_head_dfa_share: float | None
    distance: float | None
    family: str | None
    family_score: float | None
    histogram: dict[str, Any]
    bands: list[dict[str, Any]]
    head_norm: NDArray[np.float32]
    head_dfa: NDArray[np.float32]
    head_dfa_std: NDArray[np.float32]
    promoted: list[list[Any]]
    suppressed: list[list[Any]]
    neighbours: list[list[Any]]
    evidence: dict[str, Any]
    families: list[dict[str, Any]] = field(default_factory=list)
    verdict: str | None = None
    logits: dict[str, Any] = field(default_factory=dict)
    positions: list[list[Any]] = field(default_factory=list)
    coactive: dict[str, Any] = field(default_factory=dict)
    sample: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HeadRecord:
    """What the features say of one head. Fields as in `server.tables.HeadSummary`."""

    head: int
    n_led: int
    n_led_norm: int
    families: dict[str, int]
    diversity: float | None
    polysemantic: float | None
    detail: dict[str, Any]


@dataclass(frozen=True)
class HarvestTotals:
    """What a whole harvest counts."""

    n_tokens: int
    """Swept, excluded positions not counted."""
    n_rows: int
    n_live: int
    context: int
