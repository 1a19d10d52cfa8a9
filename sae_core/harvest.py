"""One sweep of a corpus through a model and an SAE: each feature's statistics, its examples, and their DFA.

    scan     every row once, in shards, in whatever precision is fast: counts, histograms, head sums, candidates (tally.py)
    choose   the shards' tallies merged; which examples to keep, hence which rows to visit (choice.py)
    visit    these rows once more in fp32 with v and pattern: every stored number of an example comes from here
    features what is said of each feature: the scan's sums, the decoder's logits and neighbours, the family

Each step writes one file aside and renames it, and does nothing when the file is there, so a harvest that was killed goes
on where it stopped. The scan's shards, and the visit's parts, may be done in any order by any number of workers.

Arrays in files carry their shapes in the comments where they are made. Rows are indices into `Rows.train`.
"""

import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_core import attribution, families
from sae_core.choice import OVERSAMPLE, Floats, Ints, Selection, choose, places, shards, swept_rows
from sae_core.config import HarvestConfig
from sae_core.progress import Progress
from sae_core.records import ExampleRecord, FeatureRecord, HarvestTotals, RowRecord
from sae_core.tally import (
    CELL_EDGES,
    EDGES,
    N_CELLS,
    Firings,
    Tallier,
    Tally,
    by_head,
    head_parts,
    load_arrays,
    save_arrays,
)

if TYPE_CHECKING:
    from sae_core.activations import Activations
    from sae_core.corpus import Rows
    from sae_core.lens import Lens
    from sae_core.saes.base import SAE

__all__ = [
    "FeatureTable",
    "Files",
    "HarvestResult",
    "Selection",
    "choose",
    "examples",
    "features",
    "harvest",
    "row_records",
    "scan_shard",
    "shards",
    "swept_rows",
    "visit",
    "visit_parts",
]

LOGITS_AT_ONCE = 128
"""Features whose logits are held at once."""


# ---- scan ----


def scan_shard(
    lens: "Lens",
    sae: "SAE",
    rows: "Rows",
    shard: range,
    cfg: HarvestConfig,
    path: Path,
    activations: "Activations | None" = None,
) -> Generator[Progress, None, None]:
    """Sweep the rows of one shard and write its tally to `path`; progress in tokens of this shard.

    z is read from `activations` where they hold the whole shard. A file that is there is left alone.
    """
    if path.exists():
        return
    device = sae.W_enc.device
    w = by_head(sae.W_enc.T, sae.cfg.n_heads)
    cached = activations if activations is not None and activations.n_rows >= shard.stop else None
    tally = Tally.empty(
        sae.cfg.d_sae,
        sae.cfg.n_heads,
        first_row=shard.start,
        top=OVERSAMPLE * cfg.top_k,
        sample=2 * cfg.per_band + 2,
        seed=cfg.seed,
        device=device,
    )
    tallier, n_tokens, clock = Tallier(tally), 0, _Clock("scan", len(shard) * rows.context)
    for low in range(shard.start, shard.stop, cfg.batch_rows):
        high = min(low + cfg.batch_rows, shard.stop)
        z = _read_z(lens, sae.cfg.site.layer, rows, low, high, cfg) if cached is None else cached.read_z(low, high)
        z = z.to(device)
        swept = ~sae.excluded(z)
        row, pos = swept.nonzero(as_tuple=True)
        destinations = z[swept].float()
        acts = sae.encode_sparse(destinations)
        given = head_parts(destinations, w, acts.token, acts.feature)
        tallier.add(Firings(acts.feature, low + row[acts.token], pos[acts.token], acts.value), given)
        n_tokens += len(row)
        yield clock.at((high - shard.start) * rows.context)
    tallier.finish(n_tokens, len(shard)).save(path)


def _read_z(lens: "Lens", layer: int, rows: "Rows", low: int, high: int, cfg: HarvestConfig) -> Tensor:
    from sae_core.lens import resolve_dtype  # TransformerLens takes seconds to import; a cached sweep needs none of it

    dtype = resolve_dtype(cfg.model_dtype, lens.device)
    return lens.read_z(_tokens(rows, np.arange(low, high), lens.device), [layer], dtype)[layer]


def _tokens(rows: "Rows", which: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(rows.train[which].astype(np.int64)).to(device)


class _Clock:
    """Makes progress reports with a rate over what was done since it began."""

    def __init__(self, phase: str, total: int, unit: str = "tokens") -> None:
        self.phase, self.total, self.unit, self.begun = phase, total, unit, time.monotonic()

    def at(self, done: int) -> Progress:
        return Progress(self.phase, done, self.total, self.unit, rate=done / max(time.monotonic() - self.begun, 1e-9))


# ---- visit ----


def visit_parts(selection: Selection, cfg: HarvestConfig) -> list[range]:
    """Ranges of indices into `selection.rows` for `visit`: one durable step, and one file, each."""
    n, size = len(selection.rows), max(cfg.batch_rows, cfg.shard_rows // 4)
    return [range(low, min(low + size, n)) for low in range(0, n, size)]


def visit(
    lens: "Lens", sae: "SAE", rows: "Rows", selection: Selection, part: range, cfg: HarvestConfig, path: Path
) -> Generator[Progress, None, None]:
    """Read the part's rows in fp32 with v and pattern, and write all numbers of their examples to `path`.

    A file that is there is left alone. Progress in rows of this part.
    """
    if path.exists():
        return
    w_all, clock, parts = sae.W_enc.T.contiguous(), _Clock("visit", len(part), "rows"), _Visited(cfg)
    for low in range(part.start, part.stop, cfg.batch_rows):
        which = np.arange(low, min(low + cfg.batch_rows, part.stop))
        tokens = _tokens(rows, selection.rows[which], lens.device)
        read = lens.read_attention(tokens, sae.cfg.site.layer)
        excluded = sae.excluded(read.z)
        for i, u in enumerate(which):
            here = slice(selection.row_ends[u], selection.row_ends[u + 1])
            feature = torch.from_numpy(selection.feature[here].astype(np.int64)).to(lens.device)
            dest = torch.from_numpy(selection.pos[here].astype(np.int64)).to(lens.device)
            found = _attribute(sae, w_all[feature], feature, dest, read.z[i], read.v[i], read.pattern[i], excluded[i])
            shares, source = families.measure(found.dfa, tokens[i], dest, rows.row_start)
            parts.add(found, shares, tokens[i][source], dest, selection, here)
        yield clock.at(int(which[-1]) + 1 - part.start)
    visited = selection.rows[part.start : part.stop]
    parts.save(path, visited, rows.train[visited], sae.cfg.n_heads, lens)


class _Attributed:
    """All examples of one row, n of them."""

    def __init__(self, acts: Tensor, act: Tensor, preact: Tensor, bias: Tensor, dfa: Tensor) -> None:
        self.acts = acts  # [n, pos], of each example's feature along the row
        self.act = act  # [n], at the destination
        self.preact = preact  # [n]
        self.bias = bias  # [n]
        self.dfa = dfa  # [n, n_heads, src]


def _attribute(
    sae: "SAE", w: Tensor, feature: Tensor, dest: Tensor, z: Tensor, v: Tensor, pattern: Tensor, excluded: Tensor
) -> _Attributed:
    """Examples (feature [n], dest [n]) of one row, from its z [pos, d_in], v [src, n_kv_heads, d_head] and pattern
    [n_heads, dest, src]. The pre-activation comes from z alone, the DFA from v and pattern alone: that they agree is the
    identity which is checked."""
    _, bias = sae.affine(feature)
    preact = (z[dest] * w).sum(1) + bias
    least = sae.least(z)  # [pos, 1], or None
    act = sae.activate(preact, feature, None if least is None else least[dest, 0])
    act = torch.where(excluded[dest], 0.0, act)
    acts = sae.activate(z @ w.T + bias, feature, least).masked_fill(excluded[:, None], 0.0).T
    by_head = w.view(len(w), sae.cfg.n_heads, sae.cfg.d_head)
    dfa = attribution.dfa(v, pattern[:, dest].transpose(0, 1), by_head)
    return _Attributed(acts, act, preact, bias, dfa)


def window_start(dest: int, context: int, window: int) -> int:
    """First position shown: 0 for a row that fits; else three quarters of the window lie before the destination, as far as
    the row goes, since sources are what a reader looks for."""
    return 0 if context <= window else min(max(dest - 3 * window // 4, 0), context - window)


class _Visited:
    """Gathers the examples of a part, as columns; of ragged ones, the values and how many belong to each example."""

    def __init__(self, cfg: HarvestConfig) -> None:
        self.cfg = cfg
        self.examples: list[dict[str, Any]] = []
        self.acts: list[tuple[Ints, Floats]] = []
        self.sparse: list[attribution.SparseDFA] = []

    def add(
        self, found: _Attributed, shares: Tensor, source_token: Tensor, dest: Tensor, selection: Selection, here: slice
    ) -> None:
        """Take in the examples `here` of the selection. One that does not fire in fp32 is left out."""
        gap = attribution.identity_gap(found.dfa, found.bias, found.preact)
        numbers = torch.stack([found.act, found.preact, found.bias, gap], 1).cpu().numpy()
        dfa, acts, measures = found.dfa.cpu(), found.acts.cpu().numpy(), shares.cpu().numpy()
        positions, sources = dest.tolist(), source_token.tolist()
        for i in np.flatnonzero(numbers[:, 0] > 0).tolist():
            start = window_start(positions[i], selection.context, self.cfg.window)
            active = np.flatnonzero(acts[i, start : start + self.cfg.window]) + start
            self.acts.append((active, acts[i, active]))
            self.sparse.append(
                attribution.sparsify_dfa(dfa[i], share=self.cfg.dfa_share, max_entries=self.cfg.dfa_entries, start=start)
            )
            at = here.start + i
            self.examples.append(
                {
                    "feature": selection.feature[at],
                    "band": selection.band[at],
                    "row": selection.row[at],
                    "dest": positions[i],
                    "start": start,
                    "act": numbers[i, 0],
                    "preact": numbers[i, 1],
                    "bias": numbers[i, 2],
                    "gap": numbers[i, 3],
                    "source_token": sources[i],
                    "measures": measures[i],
                }
            )

    def save(self, path: Path, rows: NDArray[np.int32], tokens: NDArray[np.int32], n_heads: int, lens: "Lens") -> None:
        """Write it all, with the part's rows [u], their tokens [u, context] and these tokens' texts, aside and renamed."""
        known = np.unique(tokens)
        arrays = {name: np.array([e[name] for e in self.examples], dtype=kind) for name, kind in COLUMNS.items()}
        arrays |= {
            "abs_dfa": np.array([s.abs_dfa for s in self.sparse], dtype=np.float32),
            "measures": np.array([e["measures"] for e in self.examples], dtype=np.float32).reshape(-1, len(families.MEASURES)),
            "acts_n": np.array([len(pos) for pos, _ in self.acts], dtype=np.int32),
            "acts_pos": _joined([pos for pos, _ in self.acts], np.uint16),
            "acts_value": _joined([value for _, value in self.acts], np.float32),
            "dfa_n": np.array([len(s.value) for s in self.sparse], dtype=np.int32),
            "dfa_src": _joined([s.src for s in self.sparse], np.uint16),
            "dfa_head": _joined([s.head for s in self.sparse], np.uint8),
            "dfa_value": _joined([s.value for s in self.sparse], np.float32),
            "dropped": np.array([s.dropped for s in self.sparse], dtype=np.float32).reshape(-1, n_heads),
            "before": np.array([s.before for s in self.sparse], dtype=np.float32).reshape(-1, n_heads),
            "rows": rows,
            "tokens": tokens,
            "known": known,
        }
        save_arrays(path, arrays, {"texts": lens.token_texts(known.tolist())})


COLUMNS: dict[str, type[np.generic]] = {
    "feature": np.int32,
    "band": np.int16,
    "row": np.int32,
    "dest": np.int32,
    "start": np.int32,
    "act": np.float32,
    "preact": np.float32,
    "bias": np.float32,
    "gap": np.float32,
    "source_token": np.int32,  # the token that gave most to the feature, row starts left out
}


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=dtype), *parts]).astype(dtype)


# ---- features and examples ----

EVIDENCE = (*families.MEASURES, "source_logit")


@dataclass
class FeatureTable:
    """What is said of every feature, and the place of every example. Iterating gives the features' records."""

    totals: HarvestTotals
    arrays: dict[str, NDArray[Any]]
    """[F, ...] each, by the names given in `features`."""
    texts: dict[int, str]
    """Of the promoted and suppressed tokens."""
    ranks: NDArray[np.int32]
    """[n_examples] of all parts in order: from 0 within feature and band, strongest fp32 activation first."""
    part_ends: NDArray[np.int64]
    """[n_parts + 1]: part i has the examples part_ends[i] .. part_ends[i + 1]."""

    def __len__(self) -> int:
        return len(self.arrays["count"])

    def __iter__(self) -> Iterator[FeatureRecord]:
        return map(self.record, range(len(self)))

    def record(self, idx: int) -> FeatureRecord:
        """One feature's record; what only firings could tell is None or empty for a dead one."""
        a = {name: array[idx] for name, array in self.arrays.items()}
        count, n_top, live = int(a["count"]), int(a["n_top"]), bool(a["count"])
        evidence = {name: round(float(v), 4) for name, v in zip(EVIDENCE, a["evidence"], strict=True) if not np.isnan(v)}
        size = float(np.abs(a["head_dfa"]).sum())
        leader = int(np.abs(a["head_dfa"]).argmax())
        known = a["neighbours"] >= 0
        return FeatureRecord(
            idx=idx,
            n_fired=count,
            density=count / max(self.totals.n_tokens, 1),
            max_act=float(a["strongest"]),
            mean_act=float(a["total"]) / max(count, 1),
            top_head=int(a["head_norm"].argmax()),
            top_head_share=float(a["head_norm"].max()),
            top_head_dfa=leader if live else None,
            top_head_dfa_share=abs(float(a["head_dfa"][leader])) / size if live and size > 0 else None,
            distance=evidence.get("distance"),
            family=families.judge(evidence, n_top),
            histogram=_histogram(a["histogram"]),
            bands=_bands(a["band_cells"], a["histogram"], float(a["lowest"]), float(a["highest"])) if live else [],
            head_norm=a["head_norm"],
            head_dfa=a["head_dfa"],
            head_dfa_std=a["head_dfa_std"],
            promoted=self._tokens(a["promoted"], a["promoted_value"]) if live else [],
            suppressed=self._tokens(a["suppressed"], a["suppressed_value"]) if live else [],
            neighbours=[[int(i), round(float(c), 4)] for i, c in zip(a["neighbours"][known], a["cosines"][known], strict=True)],
            evidence={"examples": n_top, **evidence} if n_top else {},
        )

    def _tokens(self, ids: Ints, values: Floats) -> list[list[Any]]:
        return [[int(i), self.texts[int(i)], round(float(v), 5)] for i, v in zip(ids, values, strict=True)]

    def save(self, path: Path) -> None:
        """Write it aside and rename it."""
        whole = {"totals": vars(self.totals), "texts": list(self.texts.items()), "names": list(self.arrays)}
        save_arrays(path, {**self.arrays, "ranks": self.ranks, "part_ends": self.part_ends}, whole)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The table in `path`."""
        arrays, whole = load_arrays(path)
        ranks, ends = arrays.pop("ranks"), arrays.pop("part_ends")
        return cls(HarvestTotals(**whole["totals"]), arrays, {int(i): text for i, text in whole["texts"]}, ranks, ends)


def _histogram(counts: Ints) -> dict[str, Any]:
    filled = np.flatnonzero(counts)
    if not len(filled):
        return {"edges": [], "counts": []}
    low, high = filled[0], filled[-1] + 1
    return {"edges": [float(f"{e:.6g}") for e in EDGES[low : high + 1]], "counts": counts[low:high].tolist()}


def _bands(edges: Ints, counts: Ints, lowest: float, highest: float) -> list[dict[str, Any]]:
    """Bands strongest first; those of a feature whose values span few quarter octaves may be empty."""
    in_cell = counts.reshape(N_CELLS, -1).sum(1)
    return [
        {
            "low": max(float(CELL_EDGES[low]), lowest),
            "high": min(float(CELL_EDGES[high]), highest),
            "count": int(in_cell[low:high].sum()),
        }
        for high, low in itertools.pairwise(edges.tolist())
    ]


def features(
    lens: "Lens", sae: "SAE", selection: Selection, parts: Sequence[Path], cfg: HarvestConfig, path: Path
) -> FeatureTable:
    """What is said of every feature, from the scan's sums, the decoder and the visited examples; written to `path`.

    `parts` are the files of `visit`, in the order of `visit_parts`.
    """
    if path.exists():
        return FeatureTable.load(path)
    visited = [_read(part, ("feature", "band", "row", "dest", "act", "source_token", "measures")) for part in parts]
    seen = {name: np.concatenate([v[name] for v in visited]) for name in visited[0]} if visited else _nothing_seen()
    live, n = np.flatnonzero(selection.count), np.maximum(selection.count, 1)[:, None]
    mean = selection.heads / n
    top = seen["band"] == 0
    written = _logits(lens, sae, live, seen["feature"][top], seen["source_token"][top], cfg.logits)
    measures = np.column_stack([seen["measures"][top], written.pop("source_logit")])
    arrays: dict[str, NDArray[Any]] = {
        "count": selection.count,
        "total": selection.total,
        "highest": selection.highest,
        "lowest": selection.lowest,
        "histogram": selection.histogram,
        "band_cells": selection.band_cells,
        "head_norm": attribution.head_norm_shares(sae.W_dec, sae.cfg.n_heads).cpu().numpy(),
        # Over every firing: w_k . z_k is the sum of head k's DFA over its sources, whatever the pattern.
        "head_dfa": mean.astype(np.float32),
        "head_dfa_std": np.sqrt(np.maximum(selection.heads_squares / n - mean**2, 0)).astype(np.float32),
        "strongest": _strongest(selection, seen["feature"][top], seen["act"][top]),
        "n_top": np.bincount(seen["feature"][top], minlength=selection.n_features),
        "evidence": families.average(measures, seen["feature"][top], selection.n_features),
        **written,
        **_neighbours(sae, live, cfg.neighbours),
    }
    known = np.unique(np.concatenate([arrays["promoted"], arrays["suppressed"]]))
    texts = dict(zip(known.tolist(), lens.token_texts(known.tolist()), strict=True))
    ends = np.cumsum([0, *(len(v["row"]) for v in visited)])
    table = FeatureTable(selection.totals, arrays, texts, _final_ranks(seen), ends)
    table.save(path)
    return table


def _strongest(selection: Selection, feature: Ints, act: Floats) -> Floats:
    """Each feature's strongest activation [F], from the fp32 visit; from the scan where no example survived it."""
    visited = np.zeros(selection.n_features, dtype=np.float32)
    np.maximum.at(visited, feature.astype(np.int64), act.astype(np.float32))
    return np.where(visited > 0, visited, selection.highest).astype(np.float32)


def _read(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names}


def _nothing_seen() -> dict[str, NDArray[Any]]:
    empty = {name: np.zeros(0, dtype=np.int64) for name in ("feature", "band", "row", "dest", "act", "source_token")}
    return {**empty, "measures": np.zeros((0, len(families.MEASURES)), dtype=np.float32)}


def _final_ranks(seen: dict[str, NDArray[Any]]) -> NDArray[np.int32]:
    order = np.lexsort((seen["dest"], seen["row"], -seen["act"], seen["band"], seen["feature"]))
    group = seen["feature"][order].astype(np.int64) * 1000 + seen["band"][order]
    ranks = np.empty(len(order), dtype=np.int32)
    ranks[order] = places(group)
    return ranks


def _logits(lens: "Lens", sae: "SAE", live: Ints, feature: Ints, token: Ints, k: int) -> dict[str, NDArray[Any]]:
    """The k most promoted and suppressed tokens of the live features [F, k], and for examples (feature [n], token [n])
    the logit of that token in standard deviations over the vocabulary: `source_logit` [n]. The logits are never all held."""
    F = sae.cfg.d_sae
    k = min(k, lens.info.d_vocab)
    found: dict[str, NDArray[Any]] = {
        "promoted": np.zeros((F, k), dtype=np.int32),
        "promoted_value": np.zeros((F, k), dtype=np.float32),
        "suppressed": np.zeros((F, k), dtype=np.int32),
        "suppressed_value": np.zeros((F, k), dtype=np.float32),
        "source_logit": np.zeros(len(feature), dtype=np.float32),
    }
    order = np.argsort(feature, kind="stable")
    for part in range(0, len(live), LOGITS_AT_ONCE):
        who = live[part : part + LOGITS_AT_ONCE]
        logits = lens.logit_weights(sae.W_dec[torch.from_numpy(who).to(sae.W_dec.device)], sae.cfg.site.layer)
        for name, largest in (("promoted", True), ("suppressed", False)):
            value, index = logits.topk(k, dim=1, largest=largest)
            found[name][who], found[f"{name}_value"][who] = index.cpu().numpy(), value.cpu().numpy()
        spread = logits.std(1).clamp_min(1e-12)
        ends = np.searchsorted(feature[order], [who[0], who[-1] + 1])
        examples = order[ends[0] : ends[1]]
        at = torch.from_numpy(np.searchsorted(who, feature[examples])).to(logits.device)
        own = logits[at, torch.from_numpy(token[examples].astype(np.int64)).to(logits.device)]
        found["source_logit"][examples] = (own / spread[at]).cpu().numpy()
    return found


def _neighbours(sae: "SAE", live: Ints, k: int) -> dict[str, NDArray[Any]]:
    """Nearest live features by decoder cosine, [F, k] each; -1 where there are not so many."""
    found = {
        "neighbours": np.full((sae.cfg.d_sae, k), -1, dtype=np.int32),
        "cosines": np.zeros((sae.cfg.d_sae, k), dtype=np.float32),
    }
    k = min(k, len(live) - 1)
    if k > 0:
        index, cosine = attribution.decoder_neighbours(sae.W_dec[torch.from_numpy(live).to(sae.W_dec.device)], k)
        found["neighbours"][live, :k], found["cosines"][live, :k] = live[index.cpu().numpy()], cosine.cpu().numpy()
    return found


def row_records(table: FeatureTable, parts: Sequence[Path], part: int) -> Iterator[RowRecord]:
    """The visited rows of one part with their examples, ready to be stored; rows whose examples all fell away are left out."""
    arrays, whole = load_arrays(parts[part])
    text = dict(zip(arrays["known"].tolist(), whole["texts"], strict=True))
    ranks = table.ranks[table.part_ends[part] : table.part_ends[part + 1]]
    acts = np.cumsum(np.append(0, arrays["acts_n"]))
    dfa = np.cumsum(np.append(0, arrays["dfa_n"]))
    ends = np.searchsorted(arrays["row"], np.append(arrays["rows"], np.iinfo(np.int32).max))
    for u, row in enumerate(arrays["rows"].tolist()):
        if ends[u] == ends[u + 1]:
            continue
        examples = []
        for i in range(ends[u], ends[u + 1]):
            a, d = slice(acts[i], acts[i + 1]), slice(dfa[i], dfa[i + 1])
            examples.append(
                ExampleRecord(
                    feature=int(arrays["feature"][i]),
                    band=int(arrays["band"][i]),
                    rank=int(ranks[i]),
                    row=row,
                    dest=int(arrays["dest"][i]),
                    start=int(arrays["start"][i]),
                    act=float(arrays["act"][i]),
                    preact=float(arrays["preact"][i]),
                    bias=float(arrays["bias"][i]),
                    gap=float(arrays["gap"][i]),
                    abs_dfa=float(arrays["abs_dfa"][i]),
                    acts_pos=arrays["acts_pos"][a],
                    acts_value=arrays["acts_value"][a],
                    dfa_src=arrays["dfa_src"][d],
                    dfa_head=arrays["dfa_head"][d],
                    dfa_value=arrays["dfa_value"][d],
                    dropped=arrays["dropped"][i],
                    before=arrays["before"][i],
                )
            )
        yield RowRecord(row, arrays["tokens"][u], [text[token] for token in arrays["tokens"][u].tolist()], examples)


def examples(table: FeatureTable, parts: Sequence[Path]) -> Iterator[ExampleRecord]:
    """All examples, in order of their rows."""
    for part in range(len(parts)):
        for row in row_records(table, parts, part):
            yield from row.examples


# ---- the whole ----


@dataclass(frozen=True)
class HarvestResult:
    """What a whole harvest left in its folder."""

    selection: Selection
    features: FeatureTable
    parts: tuple[Path, ...]
    """Files of the visit; `row_records` and `examples` read them."""

    @property
    def examples(self) -> Iterator[ExampleRecord]:
        """All examples, in order of their rows."""
        return examples(self.features, self.parts)


@dataclass(frozen=True)
class Files:
    """Where a harvest's folder keeps what."""

    folder: Path

    def shard(self, shard: range) -> Path:
        """The tally of a shard."""
        return self.folder / f"scan-{shard.start:08d}.npz"

    @property
    def selection(self) -> Path:
        """What `choose` writes."""
        return self.folder / "selection.npz"

    def part(self, part: int) -> Path:
        """The examples of a part."""
        return self.folder / f"visit-{part:05d}.npz"

    @property
    def features(self) -> Path:
        """What `features` writes."""
        return self.folder / "features.npz"


def harvest(
    lens: "Lens",
    sae: "SAE",
    rows: "Rows",
    cfg: HarvestConfig,
    folder: Path,
    activations: "Activations | None" = None,
) -> Generator[Progress, None, HarvestResult]:
    """Sweep, choose, visit, describe: the whole harvest into `folder`; goes on where a killed one stopped.

    The folder belongs to one SAE, one set of rows and one config. Yields progress in tokens (scan) and rows (visit).
    """
    files, n_rows = Files(folder), swept_rows(rows, cfg)
    todo = shards(n_rows, cfg)
    yield from _together(
        "scan",
        "tokens",
        n_rows * rows.context,
        ((len(s) * rows.context, scan_shard(lens, sae, rows, s, cfg, files.shard(s), activations)) for s in todo),
    )
    yield Progress("choose", 0, len(todo), "shards")
    selection = choose([files.shard(s) for s in todo], sae, rows, cfg, files.selection)
    ranges = visit_parts(selection, cfg)
    paths = tuple(files.part(i) for i in range(len(ranges)))
    yield from _together(
        "visit",
        "rows",
        len(selection.rows),
        ((len(r), visit(lens, sae, rows, selection, r, cfg, p)) for r, p in zip(ranges, paths, strict=True)),
    )
    yield Progress("features", 0, sae.cfg.d_sae, "features")
    return HarvestResult(selection, features(lens, sae, selection, paths, cfg, files.features), paths)


def _together(
    phase: str, unit: str, total: int, pieces: Iterator[tuple[int, Generator[Progress, None, None]]]
) -> Generator[Progress, None, None]:
    """The pieces' reports as one, each piece given with its size."""
    before = 0
    for size, piece in pieces:
        for report in piece:
            yield Progress(phase, before + report.done, total, unit, report.rate)
        before += size
        yield Progress(phase, before, total, unit)
