"""Features and examples as records, ready to be stored: what `describe` worked out, and what the visit saw."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sae_core import attribution, detectors, families
from sae_core.choice import Floats, Ints, positions
from sae_core.partners import coactive
from sae_core.records import ExampleRecord, FeatureRecord, HarvestTotals, RowRecord
from sae_core.tally import CELL_EDGES, EDGES, N_CELLS, load_arrays, save_arrays

EVIDENCE = (
    *(name for name in families.MEASURES if name != "source_gap"),
    "source_logit",
    "next",
    "next_bands",
    "next_follows",
    "next_logit",
    "positional",
)
"""Numbers behind a family: means over the strongest examples, and what detectors add (`detectors.Facts`)."""
REFERENCES = (5, 3)
"""Supporting examples named per family at most: of the strongest, of the bands."""


@dataclass
class FeatureTable:
    """What is said of every feature, and the place of every example. Iterating gives the features' records."""

    totals: HarvestTotals
    arrays: dict[str, NDArray[Any]]
    """[F, ...] each, by the names given in `describe.features`."""
    texts: dict[int, str]
    """Of the tokens that records name."""
    ranks: NDArray[np.int32]
    """[n_examples] of all parts in order: from 0 within feature and band, strongest fp32 activation first."""
    part_ends: NDArray[np.int64]
    """[n_parts + 1]: part i has the examples part_ends[i] .. part_ends[i + 1]."""
    support: NDArray[np.int32]
    """[S, 4]: feature, index in FAMILIES, band and rank of the examples that support a family, in this order."""

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
        family = detectors.family_of(a["holds"])
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
            family=family,
            family_score=_score(a["scores"], family) if family else None,
            histogram=_histogram(a["histogram"]),
            bands=_bands(a["band_cells"], a["histogram"], float(a["lowest"]), float(a["highest"])) if live else [],
            head_norm=a["head_norm"],
            head_dfa=a["head_dfa"],
            head_dfa_std=a["head_dfa_std"],
            promoted=self._tokens(a["promoted"], a["promoted_value"]) if live else [],
            suppressed=self._tokens(a["suppressed"], a["suppressed_value"]) if live else [],
            neighbours=[[int(i), round(float(c), 4)] for i, c in zip(a["neighbours"][known], a["cosines"][known], strict=True)],
            evidence={"examples": n_top, **evidence} if n_top else {},
            families=self._families(idx, a),
            verdict=detectors.verdict(
                family,
                next_token=self._text(a["next_token"]),
                pair=(self._text(a["pair"][0]), self._text(a["pair"][1])),
                places=(int(a["places"][0]), int(a["places"][1])),
                distance=evidence.get("distance", 0.0),
            ),
            logits=_logit_histogram(a["logit_ends"], a["logit_counts"]) if live else {},
            positions=positions(self.totals.context, a["position_tokens"], a["position_count"], a["position_total"]),
            coactive=coactive(int(a["coded_tokens"]), a["partner"], a["partner_both"], a["partner_phi"]),
            sample=attribution.spread_sample(a["spread"], int(a["n_seen"])),
        )

    def family(self, idx: int) -> str | None:
        """The most specific family that holds for a feature."""
        return detectors.family_of(self.arrays["holds"][idx])

    def promoted(self, idx: int) -> list[str]:
        """Texts of the tokens that a feature promotes most; none of a dead one."""
        ids = self.arrays["promoted"][idx].tolist() if self.arrays["count"][idx] else []
        return [self.texts[i] for i in ids]

    def _families(self, idx: int, a: dict[str, Any]) -> list[dict[str, Any]]:
        ends = np.searchsorted(self.support[:, 0], [idx, idx + 1])
        mine = self.support[ends[0] : ends[1]]
        found = []
        for which in np.flatnonzero(a["holds"]).tolist():
            places = mine[mine[:, 1] == which, 2:].tolist()
            top, rest = [p for p in places if p[0] == 0], [p for p in places if p[0] > 0]
            name = detectors.FAMILIES[which]
            shown = top[: REFERENCES[0]] + rest[: REFERENCES[1]]
            found.append({"family": name, "score": _score(a["scores"], name), "examples": shown})
        return sorted(found, key=lambda one: -one["score"])

    def _tokens(self, ids: Ints, values: Floats) -> list[list[Any]]:
        return [[int(i), self.texts[int(i)], round(float(v), 5)] for i, v in zip(ids, values, strict=True)]

    def _text(self, token: Any) -> str:
        return self.texts.get(int(token), "")

    def save(self, path: Path) -> None:
        """Write it aside and rename it."""
        whole = {"totals": vars(self.totals), "texts": list(self.texts.items()), "names": list(self.arrays)}
        places: dict[str, NDArray[Any]] = {"ranks": self.ranks, "part_ends": self.part_ends, "support": self.support}
        save_arrays(path, {**self.arrays, **places}, whole)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The table in `path`."""
        arrays, whole = load_arrays(path)
        ranks, ends, support = (arrays.pop(name) for name in ("ranks", "part_ends", "support"))
        return cls(HarvestTotals(**whole["totals"]), arrays, {int(i): text for i, text in whole["texts"]}, ranks, ends, support)


def _score(scores: Floats, family: str) -> float:
    return round(float(scores[detectors.FAMILIES.index(family)]), 4)


def _histogram(counts: Ints) -> dict[str, Any]:
    filled = np.flatnonzero(counts)
    if not len(filled):
        return {"edges": [], "counts": []}
    low, high = filled[0], filled[-1] + 1
    return {"edges": [float(f"{e:.6g}") for e in EDGES[low : high + 1]], "counts": counts[low:high].tolist()}


def _logit_histogram(ends: Floats, counts: Ints) -> dict[str, Any]:
    edges = np.linspace(float(ends[0]), float(ends[1]), len(counts) + 1)
    return {"edges": [float(f"{e:.5g}") for e in edges], "counts": counts.tolist()}


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
