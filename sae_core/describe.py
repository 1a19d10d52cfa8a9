"""What a harvest says of each feature: the scan's sums, the decoder's logits and neighbours, the visited examples' evidence;
and features and examples as records, ready to be stored."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from sae_core import attribution, families
from sae_core.choice import Floats, Ints, Selection, places
from sae_core.config import HarvestConfig
from sae_core.records import ExampleRecord, FeatureRecord, HarvestTotals, RowRecord
from sae_core.tally import CELL_EDGES, EDGES, N_CELLS, load_arrays, save_arrays

if TYPE_CHECKING:
    from sae_core.lens import Lens
    from sae_core.saes.base import SAE

LOGITS_AT_ONCE = 128
"""Features whose logits are held at once."""
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
            family_score=None,
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
