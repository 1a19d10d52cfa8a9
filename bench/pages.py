"""How quickly pages of the published harvest come, and how large the database is; serves HEADSCOPE_DATA on a free port."""

import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import sqlalchemy as sa

from server.db import Database, sqlite_path
from server.settings import Settings
from server.tables import SAE

REQUESTS = 200


def run() -> dict[str, dict[str, object]]:
    """Median and 99th percentile of each kind of page over one connection, and bytes of database per feature."""
    settings = Settings()
    with Database(settings.url).read() as session:
        found = session.execute(sa.select(SAE.name, SAE.d_sae).where(SAE.harvest_id.is_not(None))).first()
    if found is None:
        sys.exit(f"Nothing is published in {settings.data}; run `make demo` first, or set HEADSCOPE_DATA.")
    name, d_sae = found
    chosen = random.Random(0)
    kinds = {
        "home": lambda: "/",
        "sae": lambda: f"/saes/{name}",
        "table": lambda: f"/saes/{name}?sort=-dfa_share&head={chosen.randrange(3)}",
        "feature": lambda: f"/saes/{name}/features/{chosen.randrange(d_sae)}",
        "feature_json": lambda: f"/saes/{name}/features/{chosen.randrange(d_sae)}.json",
    }
    figures: dict[str, dict[str, object]] = {}
    with _served() as address, httpx.Client(base_url=address, timeout=30) as client:
        for kind, path in kinds.items():
            times, size = [], 0
            for index in range(REQUESTS + 10):
                begun = time.perf_counter()
                answer = client.get(path())
                took = (time.perf_counter() - begun) * 1e3
                answer.raise_for_status()
                if index >= 10:  # the first ones warm caches up
                    times.append(took)
                    size += len(answer.content)
            figures[f"{kind}_p50"] = {"value": round(statistics.median(times), 2), "unit": "ms", "target": None}
            figures[f"{kind}_p99"] = {"value": round(sorted(times)[int(0.99 * len(times))], 2), "unit": "ms", "target": None}
            figures[f"{kind}_size"] = {"value": round(size / REQUESTS / 1024, 1), "unit": "KiB", "target": None}
    path = sqlite_path(settings.url)
    if path:
        figures["database_per_feature"] = {"value": round(path.stat().st_size / d_sae / 1024, 1), "unit": "KiB", "target": None}
    return figures


@contextmanager
def _served() -> Iterator[str]:
    """The web process on a free port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(200):
            try:
                httpx.get(f"{address}/healthz")
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(10)
