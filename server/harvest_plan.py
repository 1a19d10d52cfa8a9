"""What a harvest of a given size will take: time from rates measured here (`sae_core.rates`), disk and memory by arithmetic.

Features fire unequally: on text, half of an SAE's firings come from few features, and a shard sees many features a few times
only. The constants say how many firings of a feature are kept from one shard; they were read off real shards (LOG.md). No torch.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_core.config import HarvestConfig
from server.estimates import ROWS_PER_SECOND

if TYPE_CHECKING:
    from sae_core.rates import HarvestRates

CODED_TOKENS = 1 << 17
COUNTS_AT_ONCE, PAIRS_AT_ONCE, PENDING = 1 << 23, 1 << 22, 1 << 21
FIRING = 16
"""Bytes of a firing that is kept."""
BINS = 256
CELLS = 128
FILLED_BINS = 4
"""Histogram bins that a feature fills in a shard, of 16 bytes on disk each."""
FIRST_SHARE = 0.3
"""Of the firings that may be kept of a feature, or of its mean firings in a shard where those are fewer, those that a first
shard keeps: the mean is made by few features."""
PAIR_SECONDS = 1e-7
"""Of two features that fire together on a token of the sample."""
EXAMPLE_ON_DISK = 330
"""Bytes of an example in the visit's files: its activations, and at most 32 entries of its DFA."""
EXAMPLE_VISITED = 1_200
"""Bytes of an example that the visit holds until its part is written: columns as wide as they were computed, and once more side
by side."""
EXAMPLE_DESCRIBED = 500
"""Bytes of an example while features are described: its measures and spread, twice while parts are joined, and its scores."""
LOGITS_AT_ONCE = 128
FEATURE_IN_DATABASE = 12_000
"""Bytes of a feature with its examples, indexes included; the bound that is kept (LOG.md)."""
ROW_IN_DATABASE = 9
"""Bytes of a visited row there, per token."""


@dataclass(frozen=True)
class HarvestPlan:
    """Parts of each, by name."""

    seconds: dict[str, float]
    disk: dict[str, float]
    """Bytes in the data folder: the job's own until it is done, the database's for good."""
    memory: dict[str, float]
    """Bytes by phase, beside the model; they take turns."""

    @property
    def peak(self) -> float:
        """Of memory."""
        return max(self.memory.values())


@dataclass(frozen=True)
class Size:
    """What is harvested."""

    tokens: int
    context: int
    d_sae: int
    k: int
    d_in: int
    d_model: int
    n_heads: int
    d_vocab: int

    @property
    def rows(self) -> int:
        """Rows swept."""
        return max(1, self.tokens // self.context)


def harvest_plan(
    cfg: HarvestConfig, size: Size, rates: "HarvestRates | None", examples: int | None = None, live: int | None = None
) -> HarvestPlan:
    """The plan of a harvest of one SAE; without rates it tells no times. `examples`, and `live` features: how many there are,
    where that is known: over few tokens features have fewer than they may, and some none."""
    examples = examples or size.d_sae * cfg.per_feature
    visited = cfg.expected_visits(size.rows, examples)
    kept = cfg.keeps_streams(size.rows, size.context, size.d_model, size.d_sae)
    coded = min(size.tokens, CODED_TOKENS)
    seconds = {}
    if rates is not None:
        seconds = {
            "scan": size.tokens * ((rates.visit_row / size.context if kept else rates.read) + rates.scan),
            "choose": coded * size.k**2 * PAIR_SECONDS + examples * 1e-6,
            "visit": visited * (0 if kept else rates.visit_row) + examples * rates.example,
            "features": (live or size.d_sae) * rates.feature,
            "write": examples / ROWS_PER_SECOND,
        }
    disk = _disk(cfg, size, examples, visited, coded)
    if kept:
        disk["streams"] = 4.0 * size.rows * size.context * size.d_model
    return HarvestPlan(seconds, disk, _memory(cfg, size, examples, coded))


def _kept(cfg: HarvestConfig) -> float:
    """Firings kept of a feature, at most: the strongest, and samples from about two octaves of quarter-octave cells."""
    return 3 * cfg.top_k + 8 * (2 * cfg.per_band + 2)


def _buckets(size: Size) -> int:
    return (size.context - 1).bit_length() + 1


def _disk(cfg: HarvestConfig, size: Size, examples: int, visited: float, coded: int) -> dict[str, float]:
    shards = math.ceil(size.rows / cfg.shard_rows)
    per_feature = 8 * (3 + 2 * size.n_heads + 2 * _buckets(size)) + 8 + 16 * FILLED_BINS
    # Until a feature has as many as are kept, all its firings are; then, of the n-th shard, one n-th of what is kept.
    fired = min(cfg.shard_rows, size.rows) * size.context * size.k / size.d_sae
    full = max(_kept(cfg) / (FIRST_SHARE * min(_kept(cfg), fired)), 1.0)
    firings = _kept(cfg) * (shards / full if shards < full else 1 + math.log(shards / full))
    return {
        "tallies": size.d_sae * (shards * per_feature + firings * FIRING) + coded * (2 * size.k + 12),
        "choice": size.d_sae * (BINS * 8 + 16 * (size.n_heads + _buckets(size)) + 160) + 14.0 * examples,
        "examples": examples * EXAMPLE_ON_DISK + visited * size.context * 4,
        "database": size.d_sae * FEATURE_IN_DATABASE + visited * size.context * ROW_IN_DATABASE,
    }


def _memory(cfg: HarvestConfig, size: Size, examples: int, coded: int) -> dict[str, float]:
    sae = 4.0 * 2 * size.d_in * size.d_sae
    sums = size.d_sae * (BINS * 8 + 16.0 * (size.n_heads + _buckets(size)) + 40)
    kept = size.d_sae * _kept(cfg) * FIRING
    codes = coded * (4.0 * size.k + 16)
    batch = cfg.batch_rows * size.context * (4.0 * size.d_in * 3)
    bars = 2 * size.d_sae * CELLS * 8.0
    # Sorting what has gathered: the firings, their order, and four columns of 8 bytes; and a histogram to add.
    digest = PENDING * (FIRING + 8 * 6.0) + size.d_sae * BINS * 8
    part = examples * min(1.0, max(cfg.batch_rows, cfg.shard_rows // 4) / cfg.expected_visits(size.rows, examples))
    pairs = 8.0 * (2 * COUNTS_AT_ONCE + 5 * PAIRS_AT_ONCE) + coded * size.k * 8.0 * 4
    return {
        "scan": 1.5 * sae + sums + kept + bars + digest + codes / 4 + batch,
        "choose": sae + 2 * (sums + kept + codes) + pairs,
        "visit": sae + sae / 2 + 14.0 * examples + size.d_sae * 200.0 + part * EXAMPLE_VISITED,
        # The decoder of the live ones beside it; sums, and the table made of them; a chunk's logits, their order and bars.
        "features": 1.5 * sae + 2 * sums + examples * EXAMPLE_DESCRIBED + 6 * 4.0 * LOGITS_AT_ONCE * size.d_vocab,
    }
