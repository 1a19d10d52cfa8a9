"""What a harvest says of each feature: the scan's sums, the decoder's logits and neighbours, the visited examples' evidence."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sae_core import attribution, detectors, families
from sae_core.choice import Floats, Ints, Selection, places
from sae_core.config import HarvestConfig
from sae_core.feature_table import FeatureTable
from sae_core.measures import bucket

if TYPE_CHECKING:
    from sae_core.lens import Lens
    from sae_core.saes.base import SAE

LOGITS_AT_ONCE = 128
"""Features whose logits are held at once."""
ROWS_AT_ONCE = 4096
"""Examples whose rows are looked up in them at once."""
SEEN = ("feature", "band", "row", "dest", "act", "source_token", "measures", "spread")
"""Columns of the visit that features are described by."""


def features(
    lens: "Lens", sae: "SAE", selection: Selection, parts: Sequence[Path], cfg: HarvestConfig, path: Path
) -> FeatureTable:
    """What is said of every feature, from the scan's sums, the decoder and the visited examples; written to `path`.

    `parts` are the files of `visit`, in the order of `visit_parts`.
    """
    if path.exists():
        return FeatureTable.load(path)
    seen, tokens, texts, part_ends = _seen(parts, selection.context)
    live, n = np.flatnonzero(selection.count), np.maximum(selection.count, 1)[:, None]
    mean, F = selection.heads / n, selection.n_features
    top, feature = seen["band"] == 0, seen["feature"]
    written = _logits(lens, sae, live, seen, tokens, cfg.logits)
    source_logit = written.pop("source_logit")
    missing = sorted({*written["promoted"].ravel().tolist(), *written["suppressed"].ravel().tolist()} - texts.keys())
    texts |= zip(missing, lens.token_texts(missing), strict=True)
    examples = (feature, seen["band"], seen["dest"], seen["place"], tokens)
    kept = detectors.Kept(*examples, seen["measures"], source_logit, written.pop("source_lowered"))
    judged = detectors.judge(kept, _written(selection, written["promoted"], texts), _positions(selection), F)
    facts, ranks = judged.facts, _final_ranks(seen)
    measures = [seen["measures"][:, i] for i, name in enumerate(families.MEASURES) if name != "source_gap"]
    means = families.average(np.column_stack([*measures, source_logit])[top], feature[top], F)
    arrays: dict[str, NDArray[Any]] = {
        "count": selection.count,
        "total": selection.total,
        "highest": selection.highest,
        "lowest": selection.lowest,
        "histogram": selection.histogram,
        "band_cells": selection.band_cells,
        **selection.by_feature,
        "head_norm": attribution.head_norm_shares(sae.W_dec, sae.cfg.n_heads).cpu().numpy(),
        # Over every firing: w_k . z_k is the sum of head k's DFA over its sources, whatever the pattern.
        "head_dfa": mean.astype(np.float32),
        "head_dfa_std": np.sqrt(np.maximum(selection.heads_squares / n - mean**2, 0)).astype(np.float32),
        "strongest": _strongest(selection, feature[top], seen["act"][top]),
        "n_top": np.bincount(feature[top], minlength=F),
        "n_seen": np.bincount(feature, minlength=F),
        "spread": families.average(seen["spread"], feature, F),
        "evidence": np.column_stack([means, *facts.evidence.values()]).astype(np.float32),
        "scores": judged.scores,
        "holds": judged.holds,
        "next_token": facts.next_token.astype(np.int32),
        "pair": facts.pair.astype(np.int32),
        "places": facts.places.astype(np.int32),
        **written,
        **_neighbours(sae, live, cfg.neighbours),
    }
    named = np.unique(np.concatenate([arrays[name].ravel() for name in ("promoted", "suppressed", "next_token", "pair")]))
    known = {int(i): texts[int(i)] for i in named if int(i) != detectors.NONE}
    table = FeatureTable(selection.totals, arrays, known, ranks, part_ends, _support(seen, ranks, judged.supports))
    table.save(path)
    return table


def _seen(parts: Sequence[Path], context: int) -> tuple[dict[str, NDArray[Any]], Ints, dict[int, str], NDArray[np.int64]]:
    """The visited examples' columns, with `place`, each one's index into the rows' tokens; these tokens [U, context]; their
    texts; and where each part's examples end."""
    empty: dict[str, NDArray[Any]] = {name: np.zeros(0, dtype=np.int64) for name in SEEN}
    empty |= {
        "act": np.zeros(0, dtype=np.float32),
        "measures": np.zeros((0, len(families.MEASURES)), dtype=np.float32),
        "spread": np.zeros((0, attribution.SPREAD), dtype=np.float32),
    }
    visited, tokens, n_rows = [empty | {"place": np.zeros(0, dtype=np.int64)}], [np.zeros((0, context), np.int32)], 0
    texts: dict[int, str] = {}
    for part in parts:
        with np.load(part, allow_pickle=False) as file:  # the DFA itself, most of the file, is not needed
            arrays = {name: file[name] for name in (*SEEN, "rows", "tokens", "known")}
            known = json.loads(file["values"].tobytes())["texts"]
        place = n_rows + np.searchsorted(arrays["rows"], arrays["row"])
        visited.append({**{name: arrays[name] for name in SEEN}, "place": place})
        tokens.append(arrays["tokens"])
        n_rows += len(arrays["rows"])
        texts |= zip(arrays["known"].tolist(), known, strict=True)
    ends = np.cumsum([0, *(len(v["row"]) for v in visited[1:])])
    seen = {name: np.concatenate([v[name] for v in visited]) for name in visited[0]}
    return seen, np.concatenate(tokens), texts, ends


def _written(selection: Selection, promoted: Ints, texts: dict[int, str]) -> detectors.Written:
    """What features promote; a dead one promotes nothing."""
    return detectors.Written(np.where(selection.count[:, None] > 0, promoted, detectors.NONE), texts)


def _positions(selection: Selection) -> detectors.Positions:
    buckets = [bucket((1 << i) >> 1) for i in range(len(selection.position_tokens))]
    count = selection.position_count
    return detectors.Positions(
        low=np.array([low for low, _ in buckets], dtype=np.int64),
        high=np.array([min(high, selection.context - 1) for _, high in buckets], dtype=np.int64),
        tokens=selection.position_tokens,
        firings=count,
        mean=selection.position_total / np.maximum(count, 1),
    )


def _support(seen: dict[str, NDArray[Any]], ranks: Ints, supports: NDArray[np.bool_]) -> NDArray[np.int32]:
    """[S, 4]: feature, family, band and rank of what supports what, in this order."""
    example, family = supports.nonzero()
    columns = [seen["feature"][example], family, seen["band"][example], ranks[example]]
    order = np.lexsort(columns[::-1])
    return np.column_stack(columns)[order].astype(np.int32)


def _strongest(selection: Selection, feature: Ints, act: Floats) -> Floats:
    """Each feature's strongest activation [F], from the fp32 visit; from the scan where no example survived it."""
    visited = np.zeros(selection.n_features, dtype=np.float32)
    np.maximum.at(visited, feature.astype(np.int64), act.astype(np.float32))
    return np.where(visited > 0, visited, selection.highest).astype(np.float32)


def _final_ranks(seen: dict[str, NDArray[Any]]) -> NDArray[np.int32]:
    order = np.lexsort((seen["dest"], seen["row"], -seen["act"], seen["band"], seen["feature"]))
    group = seen["feature"][order].astype(np.int64) * 1000 + seen["band"][order]
    ranks = np.empty(len(order), dtype=np.int32)
    ranks[order] = places(group)
    return ranks


def _logits(lens: "Lens", sae: "SAE", live: Ints, seen: dict[str, NDArray[Any]], tokens: Ints, k: int) -> dict[str, NDArray[Any]]:
    """The k most promoted and suppressed tokens of the live features [F, k], and the histogram of their logits with its two ends.

    For the examples `seen`, in rows with these `tokens` [U, context]: the logit of the strongest source's token in standard
    deviations over the vocabulary, `source_logit` [n], and whether it is what the feature lowers, `source_lowered` [n]
    (`attribution.lowered_in_row`). The logits are never all held.
    """
    F, feature, token = sae.cfg.d_sae, seen["feature"], seen["source_token"].astype(np.int64)
    k = min(k, lens.info.d_vocab)
    found: dict[str, NDArray[Any]] = {
        "promoted": np.zeros((F, k), dtype=np.int32),
        "promoted_value": np.zeros((F, k), dtype=np.float32),
        "suppressed": np.zeros((F, k), dtype=np.int32),
        "suppressed_value": np.zeros((F, k), dtype=np.float32),
        "logit_ends": np.zeros((F, 2), dtype=np.float32),
        "logit_counts": np.zeros((F, attribution.LOGIT_BINS), dtype=np.int32),
        "source_logit": np.zeros(len(feature), dtype=np.float32),
        "source_lowered": np.zeros(len(feature), dtype=np.bool_),
    }
    order = np.argsort(feature, kind="stable")
    for part in range(0, len(live), LOGITS_AT_ONCE):
        who = live[part : part + LOGITS_AT_ONCE]
        logits = lens.logit_weights(sae.W_dec[torch.from_numpy(who).to(sae.W_dec.device)], sae.cfg.site.layer)
        for name, largest in (("promoted", True), ("suppressed", False)):
            value, index = logits.topk(k, dim=1, largest=largest)
            found[name][who], found[f"{name}_value"][who] = index.cpu().numpy(), value.cpu().numpy()
        bars = attribution.logit_histogram(logits)
        found["logit_ends"][who] = bars.edges[:, [0, -1]].cpu().numpy()
        found["logit_counts"][who] = bars.counts.cpu().numpy()
        spread = (torch.linalg.vector_norm(logits, dim=1) / (logits.shape[1] - 1) ** 0.5).clamp_min(1e-12)  # their mean is 0
        ends = np.searchsorted(feature[order], [who[0], who[-1] + 1])
        examples = order[ends[0] : ends[1]]
        at = torch.from_numpy(np.searchsorted(who, feature[examples])).to(logits.device)
        own = logits[at, torch.from_numpy(token[examples]).to(logits.device)] / spread[at]
        found["source_logit"][examples] = own.cpu().numpy()
        # Few sources are lowered at all, so few rows are looked at.
        low = np.flatnonzero((own < 0).cpu().numpy())
        for some in np.array_split(low, -(-len(low) // ROWS_AT_ONCE)) if len(low) else ():
            these = examples[some]
            place = (token[these], tokens[seen["place"][these]].astype(np.int64), seen["dest"][these].astype(np.int64))
            found["source_lowered"][these] = (
                attribution.lowered_in_row(logits, at[some], *(torch.from_numpy(part).to(logits.device) for part in place))
                .cpu()
                .numpy()
            )
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
