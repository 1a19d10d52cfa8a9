"""A harvest's visit: the rows that hold chosen examples once more, in fp32 with v and pattern; every stored number of an
example comes from here, and its DFA with it (attribution.py).

Arrays in files carry their shapes in the comments where they are made. Rows are indices into `Rows.train`.
"""

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_core import attribution, families
from sae_core.choice import Ints, Selection
from sae_core.config import HarvestConfig
from sae_core.progress import Clock, Progress
from sae_core.saes import row_starts
from sae_core.streams import Streams
from sae_core.tally import save_arrays

if TYPE_CHECKING:
    from sae_core.corpus import Rows
    from sae_core.lens import AttentionRead, Lens
    from sae_core.saes.base import SAE


PATTERN_BYTES = 2**29
"""Of the attention patterns held at once: with many layers or long rows a pass takes fewer rows than `batch_rows`."""


def visited_rows(selections: Sequence[Selection]) -> NDArray[np.int32]:
    """The rows [U] that any of the SAEs chose an example in, ascending: each is visited once for all of them."""
    return np.unique(np.concatenate([np.zeros(0, dtype=np.int32), *(selection.rows for selection in selections)]))


def visit_parts(selections: Sequence[Selection], cfg: HarvestConfig) -> list[range]:
    """Ranges of indices into `visited_rows` for `visit`: one durable step, and one file for each SAE, each."""
    n, size = len(visited_rows(selections)), max(cfg.batch_rows, cfg.shard_rows // 4)
    return [range(low, min(low + size, n)) for low in range(0, n, size)]


def visit(
    lens: "Lens",
    saes: Sequence["SAE"],
    rows: "Rows",
    selections: Sequence[Selection],
    part: range,
    cfg: HarvestConfig,
    paths: Sequence[Path],
    streams: Streams | None = None,
) -> Generator[Progress, None, None]:
    """Read the part's rows in fp32 with v and pattern, all layers in one pass, and write all numbers of each SAE's examples
    in them to its path.

    Rows that are in `streams` need no pass. A file that is there is left alone. Progress in rows of this part.
    """
    todo = [i for i, path in enumerate(paths) if not path.exists()]
    if not todo:
        return
    visitors = [_Visitor(saes[i], rows, selections[i], cfg, lens.device) for i in todo]
    visited, clock = visited_rows(selections)[part.start : part.stop], Clock("visit", len(part), "rows")
    # Rows are cut by what all SAEs need, not by what is left to do, so that a resumed part repeats its passes exactly.
    n_layers = len({sae.cfg.site.layer for sae in saes})
    per_row = n_layers * max(sae.cfg.n_heads for sae in saes) * rows.context**2 * 4
    at_once = min(cfg.batch_rows, max(1, PATTERN_BYTES // per_row))
    for low in range(0, len(visited), at_once):
        which = visited[low : low + at_once]
        tokens = torch.from_numpy(rows.train[which].astype(np.int64)).to(lens.device)
        needed = sorted({visitor.layer for visitor in visitors if visitor.wants(which)})
        reads = lens.read_attentions(tokens, needed, None if streams is None else streams.read(needed, which))
        for visitor in visitors:
            if visitor.wants(which):
                visitor.look(reads[visitor.layer], tokens, which)
        yield clock.at(low + len(which))
    for i, visitor in zip(todo, visitors, strict=True):
        visitor.save(paths[i], visited, lens)


class _Visitor:
    """One SAE on a visit: its examples in the rows that are shown to it."""

    def __init__(self, sae: "SAE", rows: "Rows", selection: Selection, cfg: HarvestConfig, device: torch.device) -> None:
        self.sae, self.rows, self.selection, self.device = sae, rows, selection, device
        self.layer = sae.cfg.site.layer
        w, self.bias = sae.affine(torch.arange(sae.cfg.d_sae, device=sae.W_enc.device))  # [F, d_in], [F]
        self.w = w.contiguous()
        self.parts = _Visited(cfg)

    def wants(self, which: Ints) -> bool:
        """Whether any example is in these rows."""
        return bool(np.isin(which, self.selection.rows).any())

    def look(self, read: "AttentionRead", tokens: Tensor, which: Ints) -> None:
        """Take in the examples of the rows `which` [b] with tokens [b, pos]."""
        starts = row_starts(tokens, self.rows.row_start)
        excluded = self.sae.excluded(read.z, starts)
        chosen = self.selection
        for i, row in enumerate(which.tolist()):
            u = int(np.searchsorted(chosen.rows, row))
            if u == len(chosen.rows) or chosen.rows[u] != row:
                continue
            here = slice(chosen.row_ends[u], chosen.row_ends[u + 1])
            feature = torch.from_numpy(chosen.feature[here].astype(np.int64)).to(self.device)
            dest = torch.from_numpy(chosen.pos[here].astype(np.int64)).to(self.device)
            one = read.z[i], read.v[i], read.pattern[i], excluded[i]
            found = _attribute(self.sae, self.w[feature], self.bias[feature], feature, dest, *one)
            shares, source = families.measure(found.dfa, tokens[i], dest, self.rows.row_start)
            spread = torch.column_stack(attribution.spread(found.dfa, dest, starts[i]))
            self.parts.add(found, torch.cat([shares, spread], 1), tokens[i][source], dest, chosen, here)

    def save(self, path: Path, visited: NDArray[np.int32], lens: "Lens") -> None:
        """Write what was found in those of the part's rows that hold examples."""
        own = visited[np.isin(visited, self.selection.rows)]
        self.parts.save(path, own, self.rows.train[own], self.sae.cfg.n_heads, lens)


class _Attributed:
    """All examples of one row, n of them."""

    def __init__(self, acts: Tensor, act: Tensor, preact: Tensor, bias: Tensor, dfa: Tensor) -> None:
        self.acts = acts  # [n, pos], of each example's feature along the row
        self.act = act  # [n], at the destination
        self.preact = preact  # [n]
        self.bias = bias  # [n]
        self.dfa = dfa  # [n, n_heads, src]


def _attribute(
    sae: "SAE",
    w: Tensor,
    bias: Tensor,
    feature: Tensor,
    dest: Tensor,
    z: Tensor,
    v: Tensor,
    pattern: Tensor,
    excluded: Tensor,
) -> _Attributed:
    """Examples (feature [n], dest [n]) of one row, from the features' maps w [n, d_in] and bias [n], and the row's z [pos, d_in],
    v [src, n_kv_heads, d_head] and pattern [n_heads, dest, src]. The pre-activation comes from z alone, the DFA from v and
    pattern alone: that they agree is the identity which is checked."""
    scale, seen = sae.token_scale(z), sae.scaled(z)  # [pos, 1] or None, [pos, d_in]
    preact = (seen[dest] * w).sum(1) + bias
    least = sae.least(z)  # [pos, 1], or None
    act = sae.activate(preact, feature, None if least is None else least[dest, 0])
    act = torch.where(excluded[dest], 0.0, act)
    acts = sae.activate(seen @ w.T + bias, feature, least).masked_fill(excluded[:, None], 0.0).T
    by_head = (w if scale is None else w * scale[dest]).view(len(w), sae.cfg.n_heads, sae.cfg.d_head)
    dfa = attribution.dfa(v, pattern[:, dest].transpose(0, 1), by_head)
    return _Attributed(acts, act, preact, bias, dfa)


def window_start(dest: Ints, context: int, window: int) -> Ints:
    """First position shown, [n] for dest [n]: 0 for a row that fits; else three quarters of the window lie before the
    destination, as far as the row goes, since sources are what a reader looks for."""
    return np.zeros_like(dest) if context <= window else np.clip(dest - 3 * window // 4, 0, context - window)


class _Visited:
    """Gathers the examples of a part, as columns; of ragged ones, the values and how many belong to each example."""

    def __init__(self, cfg: HarvestConfig) -> None:
        self.cfg = cfg
        self.rows: list[dict[str, NDArray[Any]]] = []  # the columns of one row's examples each

    def add(
        self, found: _Attributed, shares: Tensor, source_token: Tensor, dest: Tensor, selection: Selection, here: slice
    ) -> None:
        """Take in the examples `here` of the selection, with the columns of `families.measure` and `attribution.spread` side
        by side. One that does not fire in fp32 is left out."""
        gap = attribution.identity_gap(found.dfa, found.bias, found.preact)
        numbers = torch.stack([found.act, found.preact, found.bias, gap], 1).cpu().numpy()
        fired = np.flatnonzero(numbers[:, 0] > 0)
        at, (act, preact, bias, gaps) = here.start + fired, numbers[fired].T
        positions, measures = dest.cpu().numpy()[fired], shares.cpu().numpy()[fired]
        start = window_start(positions, selection.context, self.cfg.window)
        acts = found.acts.cpu().numpy()[fired]
        column = np.arange(acts.shape[1])
        shown = (acts != 0) & (column >= start[:, None]) & (column < start[:, None] + self.cfg.window)
        which, where = shown.nonzero()
        dfa = attribution.sparsify_dfa(
            found.dfa[torch.from_numpy(fired).to(found.dfa.device)],
            share=self.cfg.dfa_share,
            max_entries=self.cfg.dfa_entries,
            start=start,
        )
        self.rows.append(
            {
                "feature": selection.feature[at],
                "band": selection.band[at],
                "row": selection.row[at],
                "dest": positions,
                "start": start,
                "act": act,
                "preact": preact,
                "bias": bias,
                "gap": gaps,
                "source_token": source_token.cpu().numpy()[fired],
                "abs_dfa": dfa.abs_dfa,
                "measures": measures[:, : len(families.MEASURES)],
                "spread": measures[:, len(families.MEASURES) :],
                "acts_n": shown.sum(1),
                "acts_pos": where,
                "acts_value": acts[which, where],
                "dfa_n": dfa.kept,
                "dfa_src": dfa.src,
                "dfa_head": dfa.head,
                "dfa_value": dfa.value,
                "dropped": dfa.dropped,
                "before": dfa.before,
            }
        )

    def save(self, path: Path, rows: NDArray[np.int32], tokens: NDArray[np.int32], n_heads: int, lens: "Lens") -> None:
        """Write it all, with the part's rows [u], their tokens [u, context] and these tokens' texts, aside and renamed."""
        known = np.unique(tokens)
        widths = {"measures": len(families.MEASURES), "spread": attribution.SPREAD, "dropped": n_heads, "before": n_heads}
        arrays: dict[str, NDArray[Any]] = {"rows": rows, "tokens": tokens, "known": known}
        for name, kind in COLUMNS.items():
            nothing = np.zeros((0, widths[name]) if name in widths else 0, dtype=kind)
            arrays[name] = np.concatenate([nothing, *(row[name] for row in self.rows)]).astype(kind)
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
    "abs_dfa": np.float32,
    "measures": np.float32,  # [n, len(MEASURES)]
    "spread": np.float32,  # [n, SPREAD]
    "acts_n": np.int32,  # how many of acts_pos and acts_value are each example's
    "acts_pos": np.uint16,
    "acts_value": np.float32,
    "dfa_n": np.int32,  # how many of dfa_src, dfa_head and dfa_value
    "dfa_src": np.uint16,
    "dfa_head": np.uint8,
    "dfa_value": np.float32,
    "dropped": np.float32,  # [n, n_heads]
    "before": np.float32,  # [n, n_heads]
}
