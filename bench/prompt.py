"""How quickly a typed text is answered: web and engine as processes of their own, SmolLM2 and one SAE, 64 tokens.

Serves HEADSCOPE_DATA (the demo's folder). `cold_s` is the first answer after the prompt page was opened and the model, which
opening it asks for, was loaded: all runs for the first time. `load_s` is what loading takes; `fresh_s` is the first answer of an
engine that nobody warmed, which waits for that as well. `warm_ms` is the median of the page with the grid, `apart_ms` of the page
with a feature taken apart, `busy_ms` of the former while other processes keep every core busy. `graph_s` is the median of a
circuit from the last token's likeliest next one, and `feature_graph_s` of one from a strong feature, through every layer's SAE,
each asked with another share so that none is remembered; `graph_mb` is what tracing added to the engine's memory at its peak.
"""

import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from bench._served import Figure, free_port, headscope, served
from bench.pages import published
from server.db import Database
from server.live import SECRET_HEADER
from server.pages.circuit import through
from server.settings import Settings
from server.store.prompts import ModelChoice, SaeChoice

TEXT = (
    "When the tide came back before dark, Mary and John walked along the shore to the old lighthouse. John gave a lamp to Mary, "
    "and Mary gave the lamp to the keeper, who had waited for them since noon. In the morning the tide had gone out again, and "
    "John and Mary walked back to"
)


def run(requests: int = 20) -> dict[str, Figure]:
    """Each kind of page `requests` times, one after another."""
    settings = Settings()
    database = Database(settings.url)
    name, _, _ = published(database)
    database.close()
    with _site() as (client, _):
        fresh = _answered(client, {"saes": f"sae:{name}"})
    with _site() as (client, health):
        begun = time.perf_counter()
        client.get(f"/prompt?sae={name}").raise_for_status()
        while health()["model"] is None:
            time.sleep(0.02)
        load = time.perf_counter() - begun
        cold = _answered(client, {"saes": f"sae:{name}"})
        warm = [_answered(client, {"saes": f"sae:{name}"}) for _ in range(requests)]
        page = _page(client, {"saes": f"sae:{name}", "pick": "token:40:"})
        picked = page.split('value="feature:')[1].split('"')[0]
        apart = [_answered(client, {"saes": f"sae:{name}", "at": "40", "feature": picked}) for _ in range(requests)]
        with _busy():
            busy = [_answered(client, {"saes": f"sae:{name}"}) for _ in range(requests)]
        held = int(health()["bytes"] or 0)
        graphs = _graphs(client, name, picked)
    return {
        "cold_s": _figure(cold, "s", "<= 1"),
        "warm_ms": _figure(1e3 * statistics.median(warm), "ms", "<= 150"),
        "apart_ms": _figure(1e3 * statistics.median(apart), "ms", None),
        "busy_ms": _figure(1e3 * statistics.median(busy), "ms", None),
        "load_s": _figure(load, "s", None),
        "fresh_s": _figure(fresh, "s", None),
        "held_mb": _figure(held / 1e6, "MB", None),
        **graphs,
    }


def _graphs(client: httpx.Client, name: str, picked: str, requests: int = 5) -> dict[str, Figure]:
    """Circuits through one SAE of each layer that has one."""
    models = client.get("/prompt.json").raise_for_status().json()["models"]
    saes = through(
        [ModelChoice(one["name"], tuple(SaeChoice(**sae) for sae in one["saes"])) for one in models], f"sae:{name}", name
    )
    index, dest, sae = picked.split("@")
    feature = {"kind": "feature", "sae": sae, "index": int(index), "dest": int(dest)}

    def asked(root: dict[str, object], share: float) -> dict[str, Any]:
        found = client.post("/api/v1/live/circuit", json={"saes": saes, "text": TEXT, "root": root, "share": share})
        answer: dict[str, Any] = found.raise_for_status().json()
        return answer

    asked({"kind": "logit"}, 0.5)  # loads the other SAEs
    before, figures, gap, n_edges = _peak(), {}, 0.0, 0
    for key, root in (("graph_s", {"kind": "logit"}), ("feature_graph_s", feature)):
        seconds = []
        for step in range(requests):
            begun = time.perf_counter()
            answer = asked(root, 0.002 + 1e-5 * step)
            seconds.append(time.perf_counter() - begun)
            gap, n_edges = max(gap, answer["gap"]), max(n_edges, len(answer["edges"]))
        figures[key] = _figure(statistics.median(seconds), "s", "<= 5")
    return {
        **figures,
        "graph_saes": _figure(len(saes), "SAEs", None),
        "graph_edges": _figure(n_edges, "edges", None),
        "graph_gap": {"value": gap, "unit": "of the parts' sizes", "target": "<= 0.001"},
        "graph_mb": _figure((_peak() - before) / 1e6, "MB", None),
    }


def _peak() -> int:
    """Bytes: the largest that any process of ours was, as the kernel says."""
    children = (Path("/proc/self/task") / str(os.getpid()) / "children").read_text().split()
    lines = (line for one in children for line in (Path("/proc") / one / "status").read_text().splitlines())
    return max((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), default=0)


def _figure(value: float, unit: str, target: str | None) -> Figure:
    return {"value": round(value, 2), "unit": unit, "target": target}


@contextlib.contextmanager
def _site() -> Iterator[tuple[httpx.Client, "_Health"]]:
    """Web and engine, freshly started; a client, and what the engine says of itself."""
    settings = Settings()
    port = free_port()
    environment = {"HEADSCOPE_ENGINE_PORT": str(port), "HEADSCOPE_DEVICE": "cpu", "HEADSCOPE_START_TOKEN": "off"}
    command = [sys.executable, "-m", "server.cli", "engine"]
    with (
        served(command, port, "/health", environment) as engine,
        headscope(environment) as web,
        httpx.Client(base_url=web, timeout=300) as client,
        httpx.Client(base_url=engine, headers={SECRET_HEADER: settings.secret}, timeout=300) as asking,
    ):
        yield client, _Health(asking)


class _Health:
    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def __call__(self) -> dict[str, str | None]:
        found: dict[str, str | None] = self._client.get("/health").raise_for_status().json()
        return found


def _answered(client: httpx.Client, form: dict[str, str]) -> float:
    """Seconds from the press of the button to the page with the grid, looking again as the page does."""
    begun = time.perf_counter()
    _page(client, form)
    return time.perf_counter() - begun


def _page(client: httpx.Client, form: dict[str, str]) -> str:
    page = client.post("/prompt", data={"text": TEXT, **form}).raise_for_status().text
    while 'name="ticket"' in page:
        ticket = page.split('name="ticket" value="')[1].split('"')[0]
        page = client.post("/prompt/look", data={"text": TEXT, **form, "ticket": ticket}).raise_for_status().text
    if 'class="grid' not in page:
        sys.exit(f"There was no answer: {page[page.find('role=') :][:300]}")
    return page


@contextlib.contextmanager
def _busy() -> Iterator[None]:
    """As many processes as there are cores, doing nothing but counting."""
    every = [multiprocessing.Process(target=_count, daemon=True) for _ in range(os.cpu_count() or 1)]
    for one in every:
        one.start()
    try:
        yield
    finally:
        for one in every:
            one.terminate()
            one.join()


def _count() -> None:
    n = 0
    while True:
        n += 1
