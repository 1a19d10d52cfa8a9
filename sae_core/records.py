"""What a harvest hands over to be stored, as plain numbers and numpy arrays. No torch, so that `store/` may name it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
