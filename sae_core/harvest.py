"""One sweep of a corpus through a model and an SAE: each feature's statistics, its examples, and their DFA.

    scan     every row once, in shards, in whatever precision is fast: counts, histograms, head sums, candidates (tally.py)
    choose   the shards' tallies merged; which examples to keep, hence which rows to visit (choice.py)
    visit    these rows once more in fp32 with v and pattern: every stored number of an example comes from here (visit.py)
    features what is said of each feature: the scan's sums, the decoder's logits and neighbours, the family (describe.py)

Each step writes one file aside and renames it, and does nothing when the file is there, so a harvest that was killed goes
on where it stopped. The scan's shards, and the visit's parts, may be done in any order by any number of workers.

Arrays in files carry their shapes in the comments where they are made. Rows are indices into `Rows.train`.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sae_core.choice import OVERSAMPLE, Selection, choose, shards, swept_rows
from sae_core.config import HarvestConfig
from sae_core.describe import FeatureTable, examples, features, row_records
from sae_core.progress import Clock, Progress
from sae_core.records import ExampleRecord
from sae_core.tally import Firings, Tallier, Tally, by_head, head_parts
from sae_core.visit import visit, visit_parts, visited_rows

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
    "visited_rows",
]


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
    tallier, n_tokens, clock = Tallier(tally), 0, Clock("scan", len(shard) * rows.context)
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
    tokens = torch.from_numpy(rows.train[low:high].astype(np.int64))
    return lens.read_z(tokens.to(lens.device), [layer], dtype)[layer]


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
    ranges = visit_parts([selection], cfg)
    paths = tuple(files.part(i) for i in range(len(ranges)))
    yield from _together(
        "visit",
        "rows",
        len(selection.rows),
        ((len(r), visit(lens, [sae], rows, [selection], r, cfg, [p])) for r, p in zip(ranges, paths, strict=True)),
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
