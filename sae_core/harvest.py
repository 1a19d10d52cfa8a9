"""One sweep of a corpus through a model and SAEs of it: each feature's statistics, its examples, and their DFA.

    scan     every row once, in shards, in whatever precision is fast: counts, histograms, head sums, candidates (tally.py)
    choose   the shards' tallies merged; which examples to keep, hence which rows to visit (choice.py); who fires together
             (partners.py)
    visit    these rows once more in fp32 with v and pattern: every stored number of an example comes from here (visit.py);
             from the tokens, or from what a sweep in fp32 has kept of these rows (streams.py)
    features what is said of each feature: the scan's sums, the decoder's logits and neighbours, the family (describe.py)

Each step writes one file aside and renames it, and does nothing when the file is there, so a harvest that was killed goes
on where it stopped. The scan's shards, and the visit's parts, may be done in any order by any number of workers. SAEs of
several layers share the passes of scan and visit, in which each layer's z is read as the pass comes by it; each SAE has
files, and a result, of its own.

Arrays in files carry their shapes in the comments where they are made. Rows are indices into `Rows.train`.
"""

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_core.choice import OVERSAMPLE, Selection, choose, shards, swept_rows
from sae_core.config import HarvestConfig
from sae_core.describe import features
from sae_core.feature_table import FeatureTable, examples, row_records
from sae_core.machine import resolve_dtype
from sae_core.progress import Clock, Progress
from sae_core.records import ExampleRecord
from sae_core.saes import row_starts
from sae_core.streams import Streams, StreamWriter
from sae_core.tally import PENDING, PENDING_OF_ALL, Bars, Batch, Tallier, Tally, by_head, coded_share, head_parts
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
    "Seen",
    "Selection",
    "choose",
    "examples",
    "features",
    "files_of",
    "harvest",
    "harvest_many",
    "row_records",
    "scan_shard",
    "shards",
    "streams_of",
    "swept_rows",
    "visit",
    "visit_parts",
    "visited_rows",
]


# ---- scan ----


Z_BYTES = 2**29
"""Of z held at once: with many layers or long rows a pass takes fewer rows than `batch_rows`."""


def scan_shard(
    lens: "Lens",
    saes: Sequence["SAE"],
    rows: "Rows",
    shard: range,
    cfg: HarvestConfig,
    paths: Sequence[Path],
    activations: "Mapping[int, Activations] | None" = None,
    seen: "Seen | None" = None,
    streams: Streams | None = None,
) -> Generator[Progress, None, None]:
    """Sweep the rows of one shard, all layers in one pass, and write each SAE's tally to its path.

    z is read from `activations`, by layer, where they hold the whole shard at every layer. A file that is there is left alone.
    With `streams` the pass is fp32, and what it brings to the layers is kept there for the visit. Progress in tokens of this
    shard, with `firings` and `live` features so far: of all SAEs, and of what was `seen` as well, to which this shard is added.

    Every pass has the same number of rows: what a row gives does not depend on how the sweep is cut or where it ends.
    """
    seen = seen or Seen(saes)
    todo = [i for i, path in enumerate(paths) if not path.exists()]
    if not todo:
        seen.add(paths)
        return
    share, pending = coded_share(swept_rows(rows, cfg) * rows.context), max(1, min(PENDING, PENDING_OF_ALL // len(saes)))
    scanners = [Scanner(saes[i], shard, cfg, rows.context, share, pending, seen.bars[i]) for i in todo]
    layers = sorted({sae.cfg.site.layer for sae in saes})
    per_row = 4 * rows.context * len(layers) * max(sae.cfg.d_in for sae in saes)
    at_once = max(1, min(cfg.batch_rows, Z_BYTES // per_row))
    keeping: StreamWriter | None = None
    if activations is not None and _hold(activations, layers, shard.stop):
        read = partial(_cached_z, activations, layers)
    elif streams is not None:
        keeping = StreamWriter(streams, shard)
        read = partial(_kept_z, lens, layers, rows, at_once, keeping)
    else:
        read = partial(_read_z, lens, layers, rows, cfg, at_once)
    clock = Clock("scan", len(shard) * rows.context)
    with contextlib.closing(keeping) if keeping else contextlib.nullcontext():
        for low in range(shard.start, shard.stop, at_once):
            high = min(low + at_once, shard.stop)
            z, starts = read(low, high), row_starts(rows.train[low:high], rows.row_start)
            for scanner in scanners:
                scanner.take_in(z[scanner.layer], low, starts)
            fired = {i: scanner.tallier.tally.count.cpu().numpy() for i, scanner in zip(todo, scanners, strict=True)}
            yield replace(clock.at((high - shard.start) * rows.context), values=seen.with_these(fired))
        if keeping:
            keeping.finish()
    for i, scanner in zip(todo, scanners, strict=True):
        scanner.tallier.finish(len(shard)).save(paths[i])
    for i, scanner in zip(todo, scanners, strict=True):
        seen.bars[i] = scanner.tallier.bars
    seen.add(paths)


class Scanner:
    """One SAE on a sweep."""

    def __init__(
        self, sae: "SAE", shard: range, cfg: HarvestConfig, context: int, share: float, pending: int, bars: Bars
    ) -> None:
        self.sae, self.layer, self.device = sae, sae.cfg.site.layer, sae.W_enc.device
        self.w = by_head(sae.W_enc.T, sae.cfg.n_heads)
        tally = Tally.empty(
            sae.cfg.d_sae,
            sae.cfg.n_heads,
            first_row=shard.start,
            top=OVERSAMPLE * cfg.top_k,
            sample=2 * cfg.per_band + 2,
            seed=cfg.seed,
            context=context,
            share=share,
            device=self.device,
        )
        self.tallier = Tallier(tally, pending, bars)

    def take_in(self, z: Tensor, first_row: int, starts: Tensor) -> None:
        """Tally what the SAE makes of z [b, pos, d_in] of the rows from `first_row`, whose row starts are `starts` [b, pos]."""
        z = z.to(self.device)
        swept = ~self.sae.excluded(z, starts)
        row, pos = swept.nonzero(as_tuple=True)
        destinations = z[swept].float()
        acts = self.sae.encode_sparse(destinations)
        given = head_parts(self.sae.scaled(destinations), self.w, acts.token, acts.feature)
        self.tallier.add(Batch(first_row + row, pos, acts.token, acts.feature, acts.value, given))


def _read_z(
    lens: "Lens", layers: Sequence[int], rows: "Rows", cfg: HarvestConfig, at_once: int, low: int, high: int
) -> dict[int, Tensor]:
    """z of rows low .. high by layer, from a pass of `at_once` rows: the last row is repeated where there are fewer."""
    dtype = resolve_dtype(cfg.model_dtype, lens.device)
    tokens = _pass_tokens(lens, rows, at_once, low, high)
    return {layer: z[: high - low] for layer, z in lens.read_z(tokens, layers, dtype).items()}


def _kept_z(
    lens: "Lens", layers: Sequence[int], rows: "Rows", at_once: int, keeping: StreamWriter, low: int, high: int
) -> dict[int, Tensor]:
    """As `_read_z`, in fp32; what enters the layers' blocks is kept."""
    entries = lens.read_streams(_pass_tokens(lens, rows, at_once, low, high), layers)
    keeping.take_in({layer: entry.stream[: high - low] for layer, entry in entries.items()})
    return {layer: entry.z[: high - low] for layer, entry in entries.items()}


def _pass_tokens(lens: "Lens", rows: "Rows", at_once: int, low: int, high: int) -> Tensor:
    which = np.minimum(np.arange(low, low + at_once), high - 1)
    return torch.from_numpy(rows.train[which].astype(np.int64)).to(lens.device)


def _cached_z(activations: "Mapping[int, Activations]", layers: Sequence[int], low: int, high: int) -> dict[int, Tensor]:
    return {layer: activations[layer].read_z(low, high) for layer in layers}


def _hold(activations: "Mapping[int, Activations]", layers: Iterable[int], n_rows: int) -> bool:
    """Whether they hold the first rows at every layer."""
    return all(layer in activations and activations[layer].n_rows >= n_rows for layer in layers)


def streams_of(
    folder: Path,
    lens: "Lens",
    saes: Sequence["SAE"],
    rows: "Rows",
    cfg: HarvestConfig,
    activations: "Mapping[int, Activations] | None" = None,
) -> Streams | None:
    """Where a harvest into `folder` keeps what the sweep brings to the layers; None where it does not (`keeps_streams` of the
    config and of the lens), or where z is at hand and no pass is needed."""
    layers, n_rows, n_features = {sae.cfg.site.layer for sae in saes}, swept_rows(rows, cfg), sum(sae.cfg.d_sae for sae in saes)
    width = len(layers) * lens.info.d_model
    keeps = lens.keeps_streams(rows.context) and cfg.keeps_streams(n_rows, rows.context, width, n_features)
    if not keeps or (activations is not None and _hold(activations, layers, n_rows)):
        return None
    return Streams(folder / "streams", sorted(layers), cfg.shard_rows, rows.context, lens.info.d_model)


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


def files_of(folder: Path, n_saes: int) -> list[Files]:
    """Where a harvest of so many SAEs keeps what it knows of each: a lone one has the folder to itself."""
    return [Files(folder)] if n_saes == 1 else [Files(folder / f"sae-{i:03d}") for i in range(n_saes)]


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
    cached = None if activations is None else {sae.cfg.site.layer: activations}
    results = yield from harvest_many(lens, [sae], rows, cfg, folder, cached)
    return results[0]


def harvest_many(
    lens: "Lens",
    saes: Sequence["SAE"],
    rows: "Rows",
    cfg: HarvestConfig,
    folder: Path,
    activations: "Mapping[int, Activations] | None" = None,
) -> Generator[Progress, None, list[HarvestResult]]:
    """`harvest` for several SAEs of one model, of any of its layers, which share every model pass; `activations` by layer."""
    files, n_rows = files_of(folder, len(saes)), swept_rows(rows, cfg)
    todo = shards(n_rows, cfg)
    seen, streams = Seen(saes), streams_of(folder, lens, saes, rows, cfg, activations)

    def scan(shard: range) -> Generator[Progress, None, None]:
        paths = [file.shard(shard) for file in files]
        yield from scan_shard(lens, saes, rows, shard, cfg, paths, activations, seen, streams)

    yield from _together("scan", "tokens", n_rows * rows.context, ((len(s) * rows.context, scan(s)) for s in todo))
    selections = []
    for i, (sae, file) in enumerate(zip(saes, files, strict=True)):
        yield Progress("choose", i, len(saes), "SAEs")
        selections.append(choose([file.shard(s) for s in todo], sae, rows, cfg, file.selection))
    ranges = visit_parts(selections, cfg)

    def look(part: int) -> Generator[Progress, None, None]:
        paths = [file.part(part) for file in files]
        yield from visit(lens, saes, rows, selections, ranges[part], cfg, paths, streams)

    yield from _together("visit", "rows", len(visited_rows(selections)), ((len(r), look(i)) for i, r in enumerate(ranges)))
    results = []
    for i, (sae, file, selection) in enumerate(zip(saes, files, selections, strict=True)):
        yield Progress("features", i, len(saes), "SAEs")
        parts = tuple(file.part(part) for part in range(len(ranges)))
        results.append(HarvestResult(selection, features(lens, sae, selection, parts, cfg, file.features), parts))
    return results


class Seen:
    """What a process knows of the shards that are done: how often each feature has fired in them, for those who watch; and of
    those that it swept itself, what later ones must beat to be kept."""

    def __init__(self, saes: Sequence["SAE"]) -> None:
        self.counts = [np.zeros(sae.cfg.d_sae, dtype=np.int64) for sae in saes]
        self.bars = [Bars.none(sae.cfg.d_sae, sae.W_enc.device) for sae in saes]

    def add(self, shard: Sequence[Path]) -> None:
        """Count a shard's files, one per SAE, in."""
        for count, path in zip(self.counts, shard, strict=True):
            count += Tally.count_of(path)

    def with_these(self, fired: Mapping[int, NDArray[np.int64]]) -> dict[str, float]:
        """`firings`, and `live` features, of all SAEs; with the firings [F] of some of them in a shard that is being swept."""
        counts = [count + fired[i] if i in fired else count for i, count in enumerate(self.counts)]
        return {"firings": float(sum(c.sum() for c in counts)), "live": float(sum((c > 0).sum() for c in counts))}


def _together(
    phase: str, unit: str, total: int, pieces: Iterator[tuple[int, Generator[Progress, None, None]]]
) -> Generator[Progress, None, None]:
    """The pieces' reports as one, each piece given with its size."""
    before = 0
    for size, piece in pieces:
        for report in piece:
            yield replace(report, phase=phase, done=before + report.done, total=total, unit=unit)
        before += size
        yield Progress(phase, before, total, unit)
