"""How quickly the pages of a published harvest come: serves HEADSCOPE_DATA on a free port, one worker, one client at a time.

`feature_*` is the feature page as a browser asks for it, of random live features with as many examples as a page begins with
where the harvest kept so many. `requests_per_s` is one client asking as fast as it is answered; nothing is cached but what a
process keeps of templates and tokens; `feature_cpu_ms` is what each of them took of the web process's processor time, the one
figure that a busy machine spoils least. `html_gzip_kb` is what is really sent, `html_kb` what a browser makes of it, both of
the median page; `queries` are statements per feature page, `assets_kb` the style sheet and all scripts, compressed. `fcp_ms` and
`next_ms` are Chromium's own: first contentful paint of a feature page, and the next one's paint after its key was pressed.
"""

import gzip
import random
import statistics
import sys
import time
from collections.abc import Callable

import sqlalchemy as sa

from bench import _browser
from bench._served import Client, Figure, headscope, processor_seconds, spread, times_of
from server.db import Database, sqlite_path
from server.resources import resource_path
from server.settings import Settings
from server.store.features import AT_ONCE, feature_page
from server.store.saes import find_sae
from server.tables import SAE, Example, Feature

ASSETS = ("app.css", "app.js", "vendor/htmx-4.0.1.min.js", "vendor/hx-sse-4.0.1.min.js")


def run(requests: int = 200, seconds: int = 5, browser: int = 10) -> dict[str, Figure]:
    """Every kind of page `requests` times; `requests_per_s` over `seconds`; `browser` pages in Chromium, 0 without it."""
    settings = Settings()
    database = Database(settings.url)
    name, d_sae, full = published(database)
    chosen = random.Random(0)
    figures: dict[str, Figure] = {}
    kinds: dict[str, Callable[[], str]] = {
        "home": lambda: "/",
        "sae": lambda: f"/saes/{name}",
        "table": lambda: f"/saes/{name}?sort=-dfa_share&head={chosen.randrange(3)}",
        "feature_json": lambda: f"/saes/{name}/features/{chosen.choice(full)}.json",
    }

    def feature() -> str:
        return f"/saes/{name}/features/{chosen.choice(full)}"

    with headscope() as address:
        client = Client(address)
        times, answers = times_of(client, feature, requests, warm=100)
        figures |= spread("feature_", times, "<= 3", "<= 15")
        figures |= _per_second(client, feature, seconds, address.pid)
        figures["html_kb"] = _size([len(answer.content) for answer in answers], "<= 60")
        figures["html_gzip_kb"] = _size([len(answer.sent) for answer in answers], "<= 12")
        if browser:
            painted, following = _browser.shown(address, [feature() for _ in range(browser)])
            figures["fcp_ms"], figures["next_ms"] = (
                _browser.median(painted, "<= 500"),
                _browser.median(following, "<= 100"),
            )
        client = Client(address)  # the other one has been closed for saying nothing
        for kind, path in kinds.items():
            times, answers = times_of(client, path, requests)
            figures |= spread(f"{kind}_", times)
            figures[f"{kind}_kb"] = _size([len(answer.content) for answer in answers], None)
    figures["queries"] = {"value": _queries(database, name, full[0]), "unit": "", "target": "<= 5"}
    static = [(resource_path("static") / asset).read_bytes() for asset in ASSETS]
    figures["assets_kb"] = {
        "value": round(sum(len(gzip.compress(f, 9)) for f in static) / 1e3, 1),
        "unit": "kB",
        "target": "<= 80",
    }
    file = sqlite_path(settings.url)
    if file:
        figures["database_per_feature"] = {"value": round(file.stat().st_size / d_sae / 1024, 1), "unit": "KiB", "target": None}
    database.close()
    return figures


def published(database: Database) -> tuple[str, int, list[int]]:
    """An SAE's name and size, and its features with the most examples, up to as many as a page begins with."""
    with database.read() as session:
        found = session.execute(sa.select(SAE).where(SAE.harvest_id.is_not(None)).order_by(SAE.id)).scalars().first()
        if found is None:
            sys.exit(f"Nothing is published in {Settings().data}; run `make demo` first, or set HEADSCOPE_DATA.")
        examples = sa.func.count(Example.id)
        counted = session.execute(
            sa.select(Feature.idx, examples)
            .join(Example, Example.feature_id == Feature.id)
            .where(Feature.harvest_id == found.harvest_id)
            .group_by(Feature.idx)
        ).all()
    least = min(AT_ONCE, max(n for _, n in counted))
    return found.name, found.d_sae, [idx for idx, n in counted if n >= least]


def _per_second(client: Client, path: Callable[[], str], seconds: int, pid: int) -> dict[str, Figure]:
    begun, used, n = time.perf_counter(), processor_seconds(pid), 0
    while time.perf_counter() - begun < seconds:
        client.get(path())
        n += 1
    took, used = time.perf_counter() - begun, processor_seconds(pid) - used
    return {
        "requests_per_s": {"value": round(n / took), "unit": "requests/s", "target": ">= 600"},
        "feature_cpu_ms": {"value": round(1e3 * used / n, 2), "unit": "ms", "target": None},
    }


def _size(sizes: list[int], target: str | None) -> Figure:
    return {"value": round(statistics.median(sizes) / 1e3, 1), "unit": "kB", "target": target}


def _queries(database: Database, name: str, index: int) -> int:
    """Statements that the database is asked for a feature page, its door's among them."""
    asked: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        asked.append(statement)

    with database.read() as session:
        sa.event.listen(database.engine, "before_cursor_execute", note)
        feature_page(session, find_sae(session, name), index, others=False)  # as the page asks; the others are a block
        sa.event.remove(database.engine, "before_cursor_execute", note)
    return len([statement for statement in asked if statement.lstrip().upper().startswith("SELECT")])
