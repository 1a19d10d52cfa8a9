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
from sae_core.choice import Floats, Ints, Selection
from sae_core.config import HarvestConfig
from sae_core.progress import Clock, Progress
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
) -> Generator[Progress, None, None]:
    """Read the part's rows in fp32 with v and pattern, all layers in one pass, and write all numbers of each SAE's examples
    in them to its path.

    A file that is there is left alone. Progress in rows of this part.
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
        reads = lens.read_attentions(tokens, needed)
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
        self.w_all = sae.W_enc.T.contiguous()
        self.parts = _Visited(cfg)

    def wants(self, which: Ints) -> bool:
        """Whether any example is in these rows."""
        return bool(np.isin(which, self.selection.rows).any())

    def look(self, read: "AttentionRead", tokens: Tensor, which: Ints) -> None:
        """Take in the examples of the rows `which` [b] with tokens [b, pos]."""
        excluded = self.sae.excluded(read.z)
        chosen = self.selection
        for i, row in enumerate(which.tolist()):
            u = int(np.searchsorted(chosen.rows, row))
            if u == len(chosen.rows) or chosen.rows[u] != row:
                continue
            here = slice(chosen.row_ends[u], chosen.row_ends[u + 1])
            feature = torch.from_numpy(chosen.feature[here].astype(np.int64)).to(self.device)
            dest = torch.from_numpy(chosen.pos[here].astype(np.int64)).to(self.device)
            w, one = self.w_all[feature], (read.z[i], read.v[i], read.pattern[i], excluded[i])
            found = _attribute(self.sae, w, feature, dest, *one)
            shares, source = families.measure(found.dfa, tokens[i], dest, self.rows.row_start)
            self.parts.add(found, shares, tokens[i][source], dest, chosen, here)

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
