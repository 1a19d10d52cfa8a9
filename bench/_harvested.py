"""One harvest of ours into a SQLite database, timed, in a process of its own: `python -m bench._harvested '<json>'`."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import torch
from sqlalchemy.orm import Session

from bench import _smollm2
from bench._processes import peak_memory
from sae_core import heads
from sae_core.config import HarvestConfig
from sae_core.harvest import HarvestResult, harvest, row_records
from sae_core.records import FeatureRecord, HeadRecord, RowRecord
from sae_core.saes.base import load_sae
from server import tables
from server.db import Database
from server.store import harvests, jobs


class Store:
    """An empty database with a model, a corpus, an SAE and a running job, and a harvest of them begun."""

    def __init__(self, url: sa.URL, found: HarvestResult, *, d_sae: int, n_heads: int) -> None:
        self.db = Database(url)
        self.db.upgrade()
        with self.db.write() as session:
            session.add_all([tables.Model(name="m", source={}), tables.Corpus(name="c", source={})])
            session.flush()
            facts: dict[str, Any] = {"layer": 0, "hook": "h", "arch": "batchtopk", "d_in": 64 * n_heads, "d_sae": d_sae, "k": 30}
            session.add(tables.SAE(name="s", model_id=1, n_heads=n_heads, config={}, folder="s", sha256="0", **facts))
            jobs.create(session, "job", "harvest", "job", {})
            jobs.start_attempt(session, "job", "worker")
        totals = found.features.totals
        self.id = harvests.begin(self.db, sae_id=1, corpus_id=1, job_id="job", config={}, totals=totals, fence=self.fence)

    @staticmethod
    def fence(session: Session) -> object:
        """What a worker asks in every transaction."""
        return jobs.check(session, "job", 1)

    def write_features(self, features: Iterable[FeatureRecord]) -> None:
        """As a worker does."""
        harvests.write_features(self.db, self.id, features, self.fence)

    def write_heads(self, heads: Iterable[HeadRecord]) -> None:
        """As a worker does."""
        harvests.write_heads(self.db, self.id, heads, self.fence)

    def write_part(self, part: int, rows: Iterable[RowRecord]) -> None:
        """As a worker does."""
        harvests.write_part(self.db, self.id, part, rows, self.fence)

    def publish(self, n_parts: int) -> None:
        """As a worker does."""
        harvests.publish(self.db, self.id, n_parts, self.fence)


def main() -> None:
    """Given sae, rows, config, folder; prints a JSON object.

    `seconds` runs from rows of tokens to a published harvest: scan, choice, visit, description, database. Model and SAE are
    loaded before it, as the peer's are. `phases` splits it.
    """
    given = json.loads(sys.argv[1])
    lens, sae, folder = _smollm2.lens(), load_sae(Path(given["sae"])), Path(given["folder"])
    rows, cfg = _smollm2.demo_rows(lens), HarvestConfig.model_validate(given["config"])
    before = peak_memory()
    begun, used = time.perf_counter(), time.process_time()
    phases: dict[str, float] = {}
    mark, running = begun, harvest(lens, sae, rows, cfg, folder / "harvest")
    while True:
        try:
            report = next(running)
        except StopIteration as end:
            found: HarvestResult = end.value
            break
        now = time.perf_counter()
        phases[report.phase] = phases.get(report.phase, 0.0) + now - mark
        mark = now
    phases["features"] = phases.get("features", 0.0) + time.perf_counter() - mark
    mark = time.perf_counter()
    store = Store(sa.URL.create("sqlite", database=given["database"]), found, d_sae=sae.cfg.d_sae, n_heads=sae.cfg.n_heads)
    store.write_features(found.features)
    store.write_heads(heads.summaries(found.features, sae))
    for part in range(len(found.parts)):
        store.write_part(part, row_records(found.features, found.parts, part))
    store.publish(len(found.parts))
    store.db.close()
    phases["store"] = time.perf_counter() - mark
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    said = {
        "seconds": seconds,
        "phases": phases,
        "cpu": used,
        "peak": peak_memory(),
        "before": before,
        "features": sae.cfg.d_sae,
        "visited": len(found.selection.rows),
        "threads": torch.get_num_threads(),
        "totals": dataclasses.asdict(found.features.totals),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
