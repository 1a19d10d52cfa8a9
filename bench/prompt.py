"""How quickly a typed text is answered: web and engine as processes of their own, SmolLM2 and one SAE, 64 tokens.

Serves HEADSCOPE_DATA (the demo's folder). `cold_s` is the first answer after the prompt page was opened and the model, which
opening it asks for, was loaded: all runs for the first time. `load_s` is what loading takes; `fresh_s` is the first answer of an
engine that nobody warmed, which waits for that as well. `warm_ms` is the median of the page with the grid, `apart_ms` of the page
with a feature taken apart, `busy_ms` of the former while other processes keep every core busy.
"""

import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator

import httpx

from bench._served import Figure, free_port, headscope, served
from bench.pages import published
from server.db import Database
from server.live import SECRET_HEADER
from server.settings import Settings

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
        page = client.post("/prompt", data={"text": TEXT, "saes": f"sae:{name}", "pick": "token:40:"}).text
        picked = page.split('value="feature:')[1].split('"')[0]
        apart = [_answered(client, {"saes": f"sae:{name}", "at": "40", "feature": picked}) for _ in range(requests)]
        with _busy():
            busy = [_answered(client, {"saes": f"sae:{name}"}) for _ in range(requests)]
        held = int(health()["bytes"] or 0)
    return {
        "cold_s": _figure(cold, "s", "<= 1"),
        "warm_ms": _figure(1e3 * statistics.median(warm), "ms", "<= 150"),
        "apart_ms": _figure(1e3 * statistics.median(apart), "ms", None),
        "busy_ms": _figure(1e3 * statistics.median(busy), "ms", None),
        "load_s": _figure(load, "s", None),
        "fresh_s": _figure(fresh, "s", None),
        "held_mb": _figure(held / 1e6, "MB", None),
    }


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
    page = client.post("/prompt", data={"text": TEXT, **form}).raise_for_status().text
    while 'name="ticket"' in page:
        ticket = page.split('name="ticket" value="')[1].split('"')[0]
        page = client.post("/prompt/look", data={"text": TEXT, **form, "ticket": ticket}).raise_for_status().text
    if 'class="grid' not in page:
        sys.exit(f"There was no answer: {page[page.find('role=') :][:300]}")
    return time.perf_counter() - begun


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
