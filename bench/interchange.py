"""How quickly scripts read features by the API, and whole selections as files: a web process on HEADSCOPE_DATA, one client.

`api_feature_*` is one feature with its first examples, their DFA and its logits, `api_feature_cpu_ms` what each took of the web
process's processor time; `batch100_*` a hundred features with heads and logits, `batch100_examples_*` with their examples and DFA
as well. `export_*` is every feature with all its examples and their DFA; MB are those that are sent. Forms differ in size,
Parquet's being compressed, so `_features_per_s` compares them, and `export_parquet_of_jsonl_mb_per_s` counts the MB that JSON
lines have of the same features. Memory is what the web process holds at most of its own while it exports (RssAnon, looked at
every 10 ms): the database's file, which SQLite maps, is the system's cache and is given back when others need it. `import_*` and
`dashboards_*` are dashboards of other tools, in and out: see `_interchange.py`. They are of 2,048 features x 40 examples unless
more are asked for; the target's size is `python -m bench interchange features=24576`, which takes about 8 GB of TMPDIR.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from bench import _interchange
from bench._processes import peak_of
from bench._served import Client, Figure, headscope, processor_seconds, spread, times_of
from bench.pages import published
from server.db import Database
from server.settings import Settings

WHOLE = {"include": "heads,logits,examples,dfa", "all_examples": "true", "sort": "idx"}
BATCH = 100


def run(requests: int = 200, batches: int = 30, features: int = 2048) -> dict[str, Figure]:
    """Every kind of read; figures of importing stand beside those of exporting."""
    return reading(requests, batches) | exporting() | _interchange.figures(features)


def reading(requests: int, batches: int) -> dict[str, Figure]:
    """One feature, and a hundred."""
    with _database() as database:
        name, d_sae, full = published(database)
    chosen = random.Random(0)
    figures: dict[str, Figure] = {}
    with headscope() as address, httpx.Client(base_url=address, timeout=60) as client:

        def feature() -> str:
            return f"/api/v1/saes/{name}/features/{chosen.choice(full)}?include=examples,dfa,logits"

        one = Client(address)
        times_of(one, feature, 50)
        used = processor_seconds(address.pid)
        times, _ = times_of(one, feature, requests, warm=0)
        used = processor_seconds(address.pid) - used
        figures |= spread("api_feature_", times, "<= 3")
        figures["api_feature_cpu_ms"] = {"value": round(1e3 * used / requests, 2), "unit": "ms", "target": None}
        for called, include, target in (("batch100_", "heads,logits", "<= 60"), ("batch100_examples_", "examples,dfa", None)):
            times = [_batch(client, name, chosen.sample(range(d_sae), min(BATCH, d_sae)), include) for _ in range(batches + 3)]
            figures[f"{called}ms"] = spread("", times[3:], target)["p50_ms"]
    return figures


def _batch(client: httpx.Client, sae: str, indices: list[int], include: str) -> float:
    body = {"features": [{"sae": sae, "index": index} for index in indices], "include": include}
    begun = time.perf_counter()
    client.post("/api/v1/features/batch", json=body).raise_for_status()
    return (time.perf_counter() - begun) * 1e3


def exporting() -> dict[str, Figure]:
    """The whole harvest in each form."""
    with _database() as database:
        name, _, _ = published(database)
    figures: dict[str, Figure] = {}
    lines = 0
    for form in ("jsonl", "csv", "parquet"):
        # A process of its own each, so that one form's memory is not counted to the next.
        with headscope() as address, httpx.Client(base_url=address, timeout=600) as client:
            client.get("/healthz")
            with peak_of(address.pid) as peak:
                begun = time.perf_counter()
                with client.stream("GET", f"/api/v1/saes/{name}/features/export", params={**WHOLE, "format": form}) as answer:
                    answer.raise_for_status()
                    size, features = sum(map(len, answer.iter_bytes())), int(answer.headers["X-Headscope-Features"])
                seconds = time.perf_counter() - begun
        lines = lines or size
        called = "export" if form == "jsonl" else f"export_{form}"
        figures[f"{called}_mb_per_s"] = {"value": round(size / 1e6 / seconds, 1), "unit": "MB/s", "target": ">= 20"}
        if form == "parquet":
            of_jsonl = {"value": round(lines / 1e6 / seconds, 1), "unit": "MB/s", "target": None}
            figures[f"{called}_of_jsonl_mb_per_s"] = of_jsonl
        figures[f"{called}_features_per_s"] = {"value": round(features / seconds), "unit": "features/s", "target": None}
        figures[f"{called}_mb"] = {"value": round(size / 1e6, 1), "unit": "MB", "target": None}
        figures[f"{called}_memory_mb"] = {"value": round(peak[0] / 1e6, 1), "unit": "MB", "target": "< 200"}
    return figures


@contextmanager
def _database() -> Iterator[Database]:
    database = Database(Settings().url)
    try:
        yield database
    finally:
        database.close()
