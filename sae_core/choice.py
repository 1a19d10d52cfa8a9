"""Which examples a harvest keeps: the shards' tallies merged, the strongest without near-duplicates, fair draws from bands."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from sae_core.config import HarvestConfig
from sae_core.measures import bucket
from sae_core.partners import partners
from sae_core.records import HarvestTotals
from sae_core.tally import N_CELLS, Firings, Tally, cells, keys, load_arrays, save_arrays

if TYPE_CHECKING:
    from sae_core.corpus import Rows
    from sae_core.saes.base import SAE

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.float32]

OVERSAMPLE = 3
"""Candidates held per example wanted, so that dropping near-duplicates leaves enough."""
SAME_TOKENS = 16
"""Two destinations with the same tokens up to and including them, this many, are one example."""
WINDOW_BEFORE, WINDOW_AFTER = 40, 8
"""Tokens around a destination whose pairs of neighbours tell how alike two examples are."""
ALIKE = 0.5
"""Jaccard similarity of these pairs from which on two examples are near-duplicates."""
SIGNATURE = 32
"""Minima in the estimate of that similarity: its standard error is at most 0.09."""


def swept_rows(rows: "Rows", cfg: HarvestConfig) -> int:
    """How many training rows a harvest sweeps, from row 0: as many as give cfg.tokens tokens, at most all."""
    return min(len(rows.train), max(1, cfg.tokens // rows.context))


def shards(n_rows: int, cfg: HarvestConfig) -> list[range]:
    """Ranges of rows for `scan_shard`, together 0 .. n_rows (`swept_rows`)."""
    return [range(low, min(low + cfg.shard_rows, n_rows)) for low in range(0, n_rows, cfg.shard_rows)]


@dataclass
class Selection:
    """What the scan found, and which examples to visit."""

    n_tokens: int
    n_rows: int
    context: int
    n_heads: int
    count: NDArray[np.int64]
    """[F] firings."""
    total: NDArray[np.float64]
    highest: Floats
    lowest: Floats
    histogram: NDArray[np.int64]
    """[F, N_BINS]"""
    heads: NDArray[np.float64]
    """[F, n_heads] sums of w_k . z_k over every firing."""
    heads_squares: NDArray[np.float64]
    position_tokens: NDArray[np.int64]
    """[B] tokens swept by bucket of positions (`measures.bucket`)."""
    position_count: NDArray[np.int64]
    """[F, B] firings there."""
    position_total: NDArray[np.float64]
    """[F, B] their sum."""
    coded_tokens: int
    """Tokens in the sample that partners come from."""
    partner: NDArray[np.int32]
    """[F, PARTNERS] features that fire with it, strongest first; -1 where there are not so many."""
    partner_both: NDArray[np.int32]
    partner_phi: Floats
    band_cells: NDArray[np.int16]
    """[F, bands + 1], descending: band b (from 1) is made of the cells band_cells[b] .. band_cells[b - 1] (exclusive)."""
    feature: NDArray[np.int32]
    """The chosen examples, in order of (row, feature, band, pos)."""
    row: NDArray[np.int32]
    pos: NDArray[np.int32]
    band: NDArray[np.int16]
    rows: NDArray[np.int32]
    """[U] the rows to visit, ascending."""
    row_ends: NDArray[np.int64]
    """[U + 1]: rows[u] has the examples row_ends[u] .. row_ends[u + 1]."""

    @property
    def n_features(self) -> int:
        """F."""
        return len(self.count)

    @property
    def totals(self) -> HarvestTotals:
        """What the whole harvest counts."""
        return HarvestTotals(self.n_tokens, self.n_rows, int((self.count > 0).sum()), self.context)

    @property
    def by_feature(self) -> dict[str, NDArray[Any]]:
        """What the features' records take over as it is, [F, ...] each."""
        same = ("position_count", "position_total", "partner", "partner_both", "partner_phi")
        spread = {
            "position_tokens": np.broadcast_to(self.position_tokens, self.position_count.shape),
            "coded_tokens": np.full(self.n_features, self.coded_tokens),
        }
        return {name: getattr(self, name) for name in same} | spread

    def without_sums(self) -> "Selection":
        """The same choice without what only the features' description reads: little memory, for a visit of many SAEs."""
        heavy = ("histogram", "heads", "heads_squares", "position_count", "position_total", "band_cells")
        return replace(self, **{name: getattr(self, name)[:0].copy() for name in heavy})

    def save(self, path: Path) -> None:
        """Write it aside and rename it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        whole = {name: value for name, value in values.items() if isinstance(value, int)}
        save_arrays(path, {name: value for name, value in values.items() if name not in whole}, whole)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The selection in `path`."""
        arrays, whole = load_arrays(path)
        values: dict[str, Any] = {**arrays, **whole}
        return cls(**values)


def positions(context: int, tokens: Ints, count: Ints, total: NDArray[np.float64]) -> list[list[Any]]:
    """[[first position, last, firings, tokens, mean activation]] of the buckets [B] of a row that hold tokens; none for a
    feature that never fires."""
    found: list[list[Any]] = []
    if not count.any():
        return found
    for which, (n_tokens, n_fired, value) in enumerate(zip(tokens.tolist(), count.tolist(), total.tolist(), strict=True)):
        low, high = bucket((1 << which) >> 1)
        if n_tokens:
            found.append([low, min(high, context - 1), n_fired, n_tokens, round(value / n_fired, 5) if n_fired else 0.0])
    return found


def merged(paths: Sequence[Path]) -> Tally:
    """One tally of all shards. They are merged in order of their rows, whatever the order of `paths`, so that float sums
    round the same. ValueError when rows are missing between them or swept twice."""
    whole: Tally | None = None
    for path in sorted(paths, key=Tally.first_row_of):
        tally = Tally.load(path)
        if whole is None:
            whole = tally
        elif tally.first_row != whole.first_row + whole.n_rows:
            raise ValueError(f"{path} begins at row {tally.first_row}, the shards before end at {whole.first_row + whole.n_rows}")
        else:
            whole.merge(tally)
    if whole is None:
        raise ValueError("there are no shards to choose from")
    return whole


def choose(paths: Sequence[Path], sae: "SAE", rows: "Rows", cfg: HarvestConfig, path: Path) -> Selection:
    """Merge the shards' tallies, choose each feature's examples, and write the selection to `path`.

    Per feature: the cfg.top_k strongest, one per row, near-duplicates dropped (band 0); and cfg.per_band drawn uniformly
    from the firings of each value band that are not among them (bands 1.., strongest first), texts that end in the same
    SAME_TOKENS tokens drawn once. Bands are equal in log value between the feature's strongest and weakest firing, their
    edges moved to the nearest quarter octave, so that their counts are exact.
    """
    if path.exists():
        return Selection.load(path)
    tally = merged(paths)
    if tally.first_row != 0 or tally.n_rows != swept_rows(rows, cfg):
        raise ValueError(f"the shards hold rows {tally.first_row} to {tally.first_row + tally.n_rows}, not all of the sweep")
    tops = _columns(tally.tops)
    top = _take(tops, _distinct(tops, rows, cfg.top_k))
    edges = _band_cells(tally, cfg.bands)
    drawn, band = _draw(tally, top, edges, rows, cfg)
    feature, row, pos = (np.concatenate([top[name], drawn[name]]) for name in ("feature", "row", "pos"))
    band = np.concatenate([np.zeros(len(top["row"]), dtype=np.int16), band])
    order = np.lexsort((pos, band, feature, row))
    visited, first = np.unique(row[order], return_index=True)
    together = partners(tally.codes, tally.n_features)
    selection = Selection(
        n_tokens=tally.n_tokens,
        n_rows=tally.n_rows,
        context=rows.context,
        n_heads=sae.cfg.n_heads,
        count=tally.count.numpy(),
        total=tally.total.numpy(),
        highest=tally.highest.numpy(),
        lowest=tally.lowest.numpy(),
        histogram=tally.histogram.numpy(),
        heads=tally.heads.numpy(),
        heads_squares=tally.heads_squares.numpy(),
        position_tokens=tally.position_tokens.numpy(),
        position_count=tally.position_count.numpy(),
        position_total=tally.position_total.numpy(),
        coded_tokens=together.n_tokens,
        partner=together.feature,
        partner_both=together.both,
        partner_phi=together.phi,
        band_cells=edges,
        feature=feature[order],
        row=row[order],
        pos=pos[order],
        band=band[order],
        rows=visited,
        row_ends=np.append(first, len(order)),
    )
    selection.save(path)
    return selection


def _columns(firings: Firings) -> dict[str, NDArray[Any]]:
    return {name: getattr(firings, name).cpu().numpy() for name in ("feature", "row", "pos", "value")}


def _take(columns: dict[str, NDArray[Any]], which: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return {name: column[which] for name, column in columns.items()}


def places(groups: Ints) -> Ints:
    """Each entry's place, from 0, in its group; equal values stand together."""
    first = np.flatnonzero(np.append(True, groups[1:] != groups[:-1])) if len(groups) else np.zeros(0, dtype=np.int64)
    return np.arange(len(groups)) - np.repeat(first, np.diff(np.append(first, len(groups))))


def _window(rows: "Rows", row: Ints, pos: Ints, before: int, after: int) -> NDArray[np.int64]:
    """Tokens [n, before + 1 + after] around destinations; -1 beyond the row's ends."""
    columns = pos[:, None].astype(np.int64) + np.arange(-before, after + 1)
    inside = (columns >= 0) & (columns < rows.context)
    return np.where(inside, rows.train[row[:, None], np.where(inside, columns, 0)].astype(np.int64), -1)


def _text_hash(rows: "Rows", row: Ints, pos: Ints) -> NDArray[np.uint64]:
    """A polynomial hash of the SAME_TOKENS tokens that end at each destination; equal texts have equal hashes."""
    hashes = np.zeros(len(row), dtype=np.uint64)
    for part in range(0, len(row), 1 << 16):
        tokens = _window(rows, row[part : part + (1 << 16)], pos[part : part + (1 << 16)], SAME_TOKENS - 1, 0)
        value: NDArray[np.uint64] = hashes[part : part + (1 << 16)]
        for column in tokens.T:
            np.multiply(value, np.uint64(0x9E3779B97F4A7C15), out=value)  # odd, so nothing is lost modulo 2^64
            np.add(value, (column + 2).astype(np.uint64), out=value)
            np.bitwise_xor(value, value >> np.uint64(29), out=value)
    return hashes


def _signature(rows: "Rows", row: Ints, pos: Ints) -> NDArray[np.uint32]:
    """MinHash [n, SIGNATURE] of the set of neighbouring token pairs around each destination (Broder 1997): the share of
    equal entries of two signatures estimates the Jaccard similarity of their sets."""
    tokens = _window(rows, row, pos, WINDOW_BEFORE, WINDOW_AFTER)
    pairs: NDArray[np.uint32]
    wide = (tokens[:, :-1] + 1) * 0x9E3779B1 + (tokens[:, 1:] + 1) * 0x85EBCA77
    pairs = (wide ^ (wide >> 15)).astype(np.uint32) * np.uint32(0x2C1B3C6D)
    pairs ^= pairs >> np.uint32(12)
    odd = np.random.default_rng(0).integers(0, 1 << 31, SIGNATURE, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    none = (tokens[:, :-1] < 0) | (tokens[:, 1:] < 0)
    minima = np.empty((len(row), SIGNATURE), dtype=np.uint32)
    for i, factor in enumerate(odd):
        minima[:, i] = np.where(none, np.uint32(0xFFFFFFFF), pairs * factor).min(1)
    return minima


def _distinct(tops: dict[str, NDArray[Any]], rows: "Rows", k: int) -> NDArray[np.int64]:
    """Indices of each feature's first k candidates that are no near-duplicates of one before them.

    `tops` is sorted by feature, strongest first. Features go side by side: step r looks at every feature's r-th
    candidate, so the work is a few array operations per step, however many features there are.
    """
    features, first, counts = np.unique(tops["feature"], return_index=True, return_counts=True)
    hashes = _text_hash(rows, tops["row"], tops["pos"])
    chosen: list[NDArray[np.int64]] = []
    for part in range(0, len(features), 2048):
        start, count = first[part : part + 2048], counts[part : part + 2048]
        n_kept = np.zeros(len(start), dtype=np.int64)
        kept_hash = np.zeros((len(start), k), dtype=np.uint64)
        kept_signature = np.zeros((len(start), k, SIGNATURE), dtype=np.uint32)
        for r in range(count.max()):
            active = np.flatnonzero((count > r) & (n_kept < k))
            if not len(active):
                break
            candidate = start[active] + r
            signature = _signature(rows, tops["row"][candidate], tops["pos"][candidate])
            widest = int(n_kept.max())
            alike = (kept_signature[active, :widest] == signature[:, None]).mean(-1) >= ALIKE
            alike |= kept_hash[active, :widest] == hashes[candidate, None]
            alike &= np.arange(widest) < n_kept[active, None]
            new = ~alike.any(1)
            who = active[new]
            kept_hash[who, n_kept[who]] = hashes[candidate[new]]
            kept_signature[who, n_kept[who]] = signature[new]
            n_kept[who] += 1
            chosen.append(candidate[new])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)


def _band_cells(tally: Tally, bands: int) -> NDArray[np.int16]:
    """[F, bands + 1]: the cells where bands begin, from the feature's strongest firing down to its weakest."""
    filled = tally.histogram.numpy().reshape(tally.n_features, N_CELLS, -1).sum(-1) > 0
    live = filled.any(1)
    highest = np.where(live, N_CELLS - filled[:, ::-1].argmax(1), 0)  # one past the strongest firing's cell
    lowest = np.where(live, filled.argmax(1), 0)
    steps = np.arange(bands + 1) / bands
    edges: NDArray[np.int16] = np.rint(highest[:, None] - steps * (highest - lowest)[:, None]).astype(np.int16)
    return edges


def _draw(
    tally: Tally, top: dict[str, NDArray[Any]], edges: NDArray[np.int16], rows: "Rows", cfg: HarvestConfig
) -> tuple[dict[str, NDArray[Any]], NDArray[np.int16]]:
    """The band examples: of each band's firings that are not in `top`, those with the smallest keys, and their bands."""
    samples = _columns(tally.samples)
    key = keys(tally.samples, tally.seed).numpy()
    flat = cells(tally.samples).numpy()
    cell = flat % N_CELLS
    feature = samples["feature"].astype(np.int64)
    band = 1 + (cell[:, None] < edges[feature, 1:-1]).sum(1)
    group = feature * (cfg.bands + 1) + band
    # A cell holds its firings with the smallest keys; of a cell with more than it holds, nothing is known beyond the
    # last of them. Up to the least such key among a band's cells, every firing of the band is known: below it a draw is fair.
    full = places(flat) == tally.sample - 1
    known = np.full(tally.n_features * (cfg.bands + 1), np.iinfo(np.int64).max)
    np.minimum.at(known, group[full], key[full])
    eligible = (key <= known[group]) & ~_contains(top, samples, rows.context, tally.n_features)
    order = np.lexsort((key, group))
    order = order[eligible[order]]

    # Of firings with the same text before them, and of those shown among the strongest already, none is shown again.
    salt = np.uint64(0x9E3779B97F4A7C15)
    text = _text_hash(rows, samples["row"], samples["pos"])
    shown = _text_hash(rows, top["row"], top["pos"]) + top["feature"].astype(np.uint64) * salt
    order = order[~np.isin((text + feature.astype(np.uint64) * salt)[order], shown)]
    _, first = np.unique((text + group.astype(np.uint64) * salt)[order], return_index=True)
    order = order[np.sort(first)]
    order = order[places(group[order]) < cfg.per_band]
    return _take(samples, order), band[order].astype(np.int16)


def _contains(some: dict[str, NDArray[Any]], others: dict[str, NDArray[Any]], context: int, n_features: int) -> NDArray[np.bool_]:
    """Whether each of `others` is among `some`, as (feature, row, pos)."""

    def code(table: dict[str, NDArray[Any]]) -> Ints:
        codes: Ints = (table["row"].astype(np.int64) * context + table["pos"]) * n_features + table["feature"]
        return codes

    found: NDArray[np.bool_] = np.isin(code(others), code(some))
    return found
