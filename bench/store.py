"""What a harvest costs in the database: bytes per feature, coverage of the DFA, example rows per second on SQLite, PostgreSQL.

The records are real: a harvest of the demo's SAE over the demo's text in rows of 64 tokens, with DFA entries kept until they
hold 95 % of the absolute DFA. They are repeated until every feature has 20 strongest examples and 20 from bands,
in shuffled order, as examples of all features come from every row. What is repeated is as large as what is not.

`bytes_per_feature` is everything that a harvest stores for its features: their rows, shares by head, examples, and all
indexes, as SQLite's pages hold them, half filled ones too. Texts (`context`: token ids and strings, stored once for all
examples of a row) are apart as `texts_per_row`. A second write keeps at most 32 entries per example, the harvest's default
bound: `*_32_entries`.

Coverage is the kept share of an example's absolute DFA, over all examples visited. There is no model of 32 heads here, so
`coverage_*_32_heads` takes z's 576 dimensions as 32 heads of 18: the same weights and patterns, cut finer.

Rows are written as a harvest's worker writes them: chunk by chunk, each a transaction that first asks its fence. The clock
runs from records to the last commit; `transaction_p99` is how long a writer keeps others waiting. `features=2000` takes
another number, `rows=256` another harvest. About two minutes.
"""

import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import sqlalchemy as sa
import torch
from sqlalchemy.orm import Session

from bench import _postgres, _smollm2
from bench._harvested import Store
from sae_core.attribution import sparsify_dfa
from sae_core.config import HarvestConfig, RowsConfig
from sae_core.corpus import Rows
from sae_core.harvest import HarvestResult, harvest, row_records
from sae_core.lens import Lens
from sae_core.records import ExampleRecord, FeatureRecord, RowRecord
from sae_core.saes.base import SAE
from server.db import Database
from server.settings import Settings

Figure = dict[str, object]

TOP, BANDS, PER_BAND, CONTEXT, SHARE = 20, 4, 5, 64, 0.95
ALL_ENTRIES, DEFAULT_ENTRIES = 1024, 32
FEATURES = ("feature", "feature_detail", "feature_head", "example")


def run(features: int = 1000, rows: int = 256) -> dict[str, Figure]:
    """Write `features` features with 40 examples each, out of a harvest of `rows` rows."""
    lens = _smollm2.lens()
    sae, figures = _smollm2.demo_sae(lens), dict[str, Figure]()
    with _harvested(lens, sae, rows, ALL_ENTRIES) as found:
        records, visited = fill(found, features)
        sizes, speed = _on_sqlite(found, records, visited)
        figures["bytes_per_feature"] = _bytes(sizes, features)
        for name in FEATURES:
            figures[f"bytes_per_feature_{name}"] = _figure(sizes.get(name, 0) / features, "bytes")
        figures["texts_per_row"] = _figure(sizes["context"] / len(visited), "bytes")
        figures |= _covered(found, "")
        figures["rows_per_s_sqlite"] = _figure(speed.rows_per_s, "rows/s", ">= 20000")
        figures["transaction_p99"] = _figure(speed.slowest_percent * 1e3, "ms", "<= 100")
        figures["records_per_s"] = _figure(_record_speed(found), "rows/s")
        if _postgres.programs():
            with _postgres.server() as url:
                store = _store(url, found, len(records))
                speed = _write(store, records, visited)
                figures["rows_per_s_postgresql"] = _figure(speed.rows_per_s, "rows/s", ">= 20000")
                figures["bytes_per_feature_postgresql"] = _figure(_postgres_size(store.db) / features, "bytes")
                store.db.close()
        else:
            print("  PostgreSQL is not installed here, so it was not measured.", file=sys.stderr)
    print("  " + ", ".join(f"{name} {figure['value']}" for name, figure in figures.items()), file=sys.stderr, flush=True)
    with _harvested(lens, sae, rows, DEFAULT_ENTRIES) as found:
        sizes, _ = _on_sqlite(found, *fill(found, features))
        figures["bytes_per_feature_32_entries"] = _figure(sum(sizes.get(name, 0) for name in FEATURES) / features, "bytes")
        figures |= _covered(found, "_32_entries")
    figures |= _spread("coverage{}_32_heads", _coverage_of_heads(lens, sae, 32, 16, 40))
    return figures


def bytes_per_feature(lens: Lens, sae: SAE, features: int = 1000, rows: int = 256) -> Figure:
    """The figure of that name alone."""
    with _harvested(lens, sae, rows, ALL_ENTRIES) as found:
        return _bytes(_on_sqlite(found, *fill(found, features))[0], features)


def _bytes(sizes: dict[str, int], features: int) -> Figure:
    return _figure(sum(sizes.get(name, 0) for name in FEATURES) / features, "bytes", "<= 12000")


def _covered(found: HarvestResult, suffix: str) -> dict[str, Figure]:
    shares = [float(np.abs(e.dfa_value).sum(dtype=np.float64)) / e.abs_dfa for e in found.examples]
    entries = statistics.median(len(e.dfa_value) for e in found.examples)
    return _spread(f"coverage{{}}{suffix}", shares) | {f"entries_median{suffix}": _figure(entries, "")}


def _figure(value: float, unit: str, target: str | None = None) -> Figure:
    return {"value": round(value, 0 if value >= 100 else 4), "unit": unit, "target": target}


def _spread(name: str, shares: Sequence[float]) -> dict[str, Figure]:
    median, fifth = np.percentile(shares, [50, 5])
    return {name.format("_median"): _figure(float(median), ""), name.format("_p5"): _figure(float(fifth), "")}


# ---------------------------------------------------------------------------------------------------------- real records


def _text(lens: Lens, rows: int) -> Rows:
    cfg = RowsConfig(context=CONTEXT, tokens=rows * CONTEXT, heldout_tokens=CONTEXT)
    return _smollm2.rows(lens, cfg, Settings().cache / "bench" / "store-rows")


@contextmanager
def _harvested(lens: Lens, sae: SAE, rows: int, entries: int) -> Iterator[HarvestResult]:
    text = _text(lens, rows)
    cfg = HarvestConfig(
        tokens=rows * text.context,
        top_k=TOP,
        bands=BANDS,
        per_band=PER_BAND,
        dfa_share=SHARE,
        dfa_entries=entries,
    )
    with tempfile.TemporaryDirectory(prefix="headscope-bench-") as folder:
        yield _smollm2.finished(harvest(lens, sae, text, cfg, Path(folder)))


def fill(found: HarvestResult, features: int) -> tuple[list[FeatureRecord], list[RowRecord]]:
    """Features that all live and have 20 + 20 examples each, made of the harvest's own again and again."""
    live = [record for record in found.features if record.n_fired]
    records = [dataclasses.replace(record, idx=idx) for idx, record in zip(range(features), itertools.cycle(live), strict=False)]
    places = [(0, rank) for rank in range(TOP)] + [(1 + i // PER_BAND, i % PER_BAND) for i in range(BANDS * PER_BAND)]
    slots = [(idx, *place) for idx in range(features) for place in places]
    np.random.default_rng(0).shuffle(slots)
    rows, left = [], iter(slots)
    visited = [row for part in range(len(found.parts)) for row in row_records(found.features, found.parts, part)]
    for number, row in enumerate(itertools.cycle(visited)):
        taken = list(zip(row.examples, left, strict=False))
        if not taken:
            return records, rows
        rows.append(dataclasses.replace(row, row=number, examples=[_moved(e, number, *slot) for e, slot in taken]))
    raise AssertionError("a harvest without rows")


def _moved(example: ExampleRecord, row: int, feature: int, band: int, rank: int) -> ExampleRecord:
    return dataclasses.replace(example, row=row, feature=int(feature), band=int(band), rank=int(rank))


def _record_speed(found: HarvestResult) -> float:
    """How fast the visit's files give records, which the store then writes."""
    begun = time.perf_counter()
    n = sum(len(row.examples) for part in range(len(found.parts)) for row in row_records(found.features, found.parts, part))
    return n / (time.perf_counter() - begun)


def _coverage_of_heads(lens: Lens, sae: SAE, n_heads: int, n_rows: int, per_row: int) -> list[float]:
    """Coverage of `per_row` features in each row, where they fire most strongly, z's dimensions taken as `n_heads` heads."""
    tokens = torch.from_numpy(_text(lens, n_rows).train[:n_rows].astype(np.int64))
    read, found = lens.read_attention(tokens, sae.cfg.site.layer), []
    for z, v, pattern in zip(read.z, read.v, read.pattern, strict=True):
        acts = sae.encode(z)
        acts[0] = 0  # the row start is no destination
        strongest, dest = acts.max(0)
        chosen = strongest.topk(per_row).indices.tolist()
        found += [split_dfa(v, pattern[:, dest[feature]], sae.W_enc[:, feature], n_heads) for feature in chosen]
    kept = sparsify_dfa(torch.stack(found), share=SHARE, max_entries=ALL_ENTRIES, start=np.zeros(len(found), np.int64))
    example = np.repeat(np.arange(len(found)), kept.kept)
    return (np.bincount(example, np.abs(kept.value), len(found)) / kept.abs_dfa).tolist()


def split_dfa(v: torch.Tensor, pattern: torch.Tensor, w: torch.Tensor, n_heads: int) -> torch.Tensor:
    """DFA [n_heads, src], z's dimensions taken as `n_heads` heads; v [src, kv_heads, d_head], pattern [heads, src], w [d_in]."""
    of_head = v.repeat_interleave(len(pattern) // v.shape[1], 1)  # [src, heads, d_head]
    by_dimension = pattern.T[:, :, None] * of_head * w.view(len(pattern), -1)
    return by_dimension.flatten(1).view(len(v), n_heads, -1).sum(2).T.contiguous()


# ------------------------------------------------------------------------------------------------------------ the writing


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast example rows were written, and what the slowest hundredth of the transactions took, in seconds."""

    rows_per_s: float
    slowest_percent: float


def _on_sqlite(
    found: HarvestResult, features: Sequence[FeatureRecord], rows: Sequence[RowRecord]
) -> tuple[dict[str, int], Speed]:
    """Bytes of each table with its indexes, and how fast it was written."""
    with tempfile.TemporaryDirectory(prefix="headscope-bench-") as folder:
        store = _store(sa.URL.create("sqlite", database=f"{folder}/store.db"), found, len(features))
        speed = _write(store, features, rows)
        sizes = _sqlite_sizes(store.db)
        store.db.close()
        return sizes, speed


def _store(url: sa.URL, found: HarvestResult, d_sae: int) -> Store:
    return Store(url, found, d_sae=d_sae, n_heads=found.features.arrays["head_norm"].shape[1])


def _write(store: Store, features: Sequence[FeatureRecord], rows: Sequence[RowRecord]) -> Speed:
    """Write it all, and publish it."""
    store.write_features(features)
    store.write_heads([])  # a few rows for all features together
    with _timed_transactions(store.db) as times:
        begun = time.perf_counter()
        store.write_part(0, rows)
        seconds = time.perf_counter() - begun
    store.publish(1)
    return Speed(sum(len(row.examples) for row in rows) / seconds, float(np.percentile(times, 99)))


@contextmanager
def _timed_transactions(db: Database) -> Iterator[list[float]]:
    """How long each `db.write()` within took, commit and all."""
    times: list[float] = []
    write: Callable[[], Any] = db.write

    @contextmanager
    def timed() -> Iterator[Session]:
        begun = time.perf_counter()
        with write() as session:
            yield session
        times.append(time.perf_counter() - begun)

    with mock.patch.object(db, "write", timed):
        yield times


def _sqlite_sizes(db: Database) -> dict[str, int]:
    """Bytes of pages of each table with its indexes."""
    statement = "select m.tbl_name, sum(s.pgsize) from dbstat s join sqlite_schema m on m.name = s.name group by m.tbl_name"
    with db.read() as session:
        return {name: int(size) for name, size in session.execute(sa.text(statement))}


def _postgres_size(db: Database) -> int:
    with db.read() as session:
        sizes = [session.scalar(sa.text(f"select pg_total_relation_size('{name}')")) for name in FEATURES]
    return sum(int(size) for size in sizes if size is not None)
