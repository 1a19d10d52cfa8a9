"""Requests per second beside Datasette on the same SQLite file: a page of the feature table, and one feature.

Datasette (from PyPI, in a virtual environment of its own) shows `feature` filtered to the harvest and sorted by its largest
activation, 50 rows, with an index on that order; and the row of one feature's details. Ours shows the table with the strongest
example of each feature, and the feature's page with its examples taken apart: more than the peer's, which cannot. Both have one
worker and one client, and take turns, `rounds` of `seconds` each; serves HEADSCOPE_DATA, which has to be on SQLite.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable

import sqlalchemy as sa

from bench._peers import peer_python
from bench._served import Client, Figure, free_port, headscope, processor_seconds, served
from server.db import Database, sqlite_path
from server.settings import Settings
from server.tables import SAE, Feature

DATASETTE = "datasette==0.65.5"


def run(rounds: int = 5, seconds: int = 2) -> dict[str, Figure]:
    """Ours and theirs, in turns; `speedup` is the smaller of the two."""
    settings = Settings()
    path = sqlite_path(settings.url)
    if path is None or not path.exists():
        sys.exit("Datasette reads SQLite only, and there is no such database here; run `make demo`, or set HEADSCOPE_DATA.")
    database = Database(settings.url)
    with database.read() as session:
        name, harvest_id = session.execute(sa.select(SAE.name, SAE.harvest_id).where(SAE.harvest_id.is_not(None))).first() or (
            None,
            0,
        )
        live = sa.select(Feature.idx, Feature.id).where(Feature.harvest_id == harvest_id, Feature.n_fired > 0)
        features = session.execute(live).tuples().all()
    database.close()
    if not features:
        sys.exit(f"Nothing is published in {settings.data}; run `make demo` first.")
    chosen, port = random.Random(0), free_port()
    python = peer_python("datasette", [DATASETTE])
    command = [str(python), "-m", "datasette", "serve", str(path), "--port", str(port), "--setting", "suggest_facets", "off"]
    db = path.stem
    with headscope() as ours, served(command, port, "/-/versions.json") as theirs:
        pages: dict[str, tuple[Callable[[], str], Callable[[], str]]] = {
            "table": (
                lambda: f"/saes/{name}?sort=-max&min_max={chosen.random():.3f}",
                lambda: f"/{db}/feature?harvest_id={harvest_id}&max_act__gte={chosen.random():.3f}&_sort_desc=max_act&_size=50",
            ),
            "row": (
                lambda: f"/saes/{name}/features/{chosen.choice(features)[0]}",
                lambda: f"/{db}/feature_detail/{chosen.choice(features)[1]}",
            ),
        }
        figures: dict[str, Figure] = {}
        ratios = []
        part = {"HX-Request": "true", "HX-Request-Type": "partial"}
        for kind, paths in pages.items():
            clients = (Client(ours, part if kind == "table" else None), Client(theirs))
            rates: tuple[list[tuple[float, float]], ...] = ([], [])
            for _ in range(rounds + 1):
                for of, client, path_of, server in zip(rates, clients, paths, (ours, theirs), strict=True):
                    of.append(_rate(client, path_of, seconds, server.pid))
            # The first round warms both up.
            (us, our_ms), (them, their_ms) = (map(statistics.median, zip(*of[1:], strict=True)) for of in rates)
            ratios.append(us / them)
            figures[f"{kind}_per_s"] = {"value": round(us), "unit": "requests/s", "target": None}
            figures[f"{kind}_per_s_datasette"] = {"value": round(them), "unit": "requests/s", "target": None}
            figures[f"{kind}_speedup"] = {"value": round(us / them, 2), "unit": "x", "target": ">= 3"}
            figures[f"{kind}_cpu_ms"] = {"value": round(our_ms, 2), "unit": "ms", "target": None}
            figures[f"{kind}_cpu_ms_datasette"] = {"value": round(their_ms, 2), "unit": "ms", "target": None}
    return {"speedup": {"value": round(min(ratios), 2), "unit": "x", "target": ">= 3"}, **figures}


def _rate(client: Client, path: Callable[[], str], seconds: int, pid: int) -> tuple[float, float]:
    """Requests per second, and milliseconds of the server's processor time for each."""
    begun, used, n = time.perf_counter(), processor_seconds(pid), 0
    while time.perf_counter() - begun < seconds:
        client.get(path())
        n += 1
    return n / (time.perf_counter() - begun), 1e3 * (processor_seconds(pid) - used) / n
