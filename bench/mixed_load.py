"""Pages for many readers at once, on PostgreSQL, while a harvest writes: wrk's clients, `serve --workers 2`, one machine.

What HEADSCOPE_DATA holds is copied into a PostgreSQL of the benchmark's own. wrk then asks for a mix of addresses of the first
published SAE, drawn at random: mostly feature pages, as pages and as JSON, then the table with sorts and filters, heads, search,
the SAE, home and jobs. First nobody writes (`idle_*`), then a process writes `rate` examples a second, as a worker does, through
the store's own functions. `errors` are answers that are not 2xx, and connections that failed; `web_memory_mb` is the largest
proportional set size (PSS) of a web process afterwards, in which what processes share is divided among them, `web_rss_mb` the
largest resident set; `start_s` is from the command to the first answer. Clients, web, database and writer share the machine.

What bounds it is measured with it: the processor time that a request took of each (`web_cpu_ms`, `database_cpu_ms`,
`client_cpu_ms`) and the share of the machine that the writer took (`writer_share`). `bound_per_s` is how many requests a second
that processor time leaves room for on all cores, were none of them ever idle. `web_cpu_ms_*` is each kind of address by itself.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from bench import _postgres
from bench._served import Figure, free_port, processor_seconds
from bench.pages import published
from server.db import Database
from server.settings import Settings
from server.tables import Base

ADDRESSES = 4000
SCRIPT = """
local lines, at = {}, 0
for line in io.lines(os.getenv("ADDRESSES")) do lines[#lines + 1] = line end
function init(args) math.randomseed(os.time()); at = math.random(#lines) end
function request()
  at = at % #lines + 1
  local how, path = lines[at]:match("(%S+) (.+)")
  local headers = {["Accept-Encoding"] = "gzip"}
  if how == "part" then headers["HX-Request"] = "true"; headers["HX-Request-Type"] = "partial" end
  return wrk.format("GET", path, headers)
end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('\\n{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "errors": %d}\\n', summary.requests,
    summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def run(seconds: int = 20, clients: int = 50, workers: int = 2, rate: int = 2000) -> dict[str, Figure]:
    """`seconds` each without and with the writer."""
    settings = Settings()
    if shutil.which("wrk") is None or _postgres.programs() is None:
        sys.exit("This benchmark needs wrk and PostgreSQL; on Debian: apt-get install wrk postgresql.")
    source = Database(settings.url)
    name, d_sae, full = published(source)
    with _postgres.server() as url, tempfile.TemporaryDirectory(prefix="headscope-bench-") as folder:
        copy_all(source, url)
        source.close()
        paths, script = Path(folder) / "addresses", Path(folder) / "mix.lua"
        paths.write_text("".join(f"{line}\n" for line in mix(name, d_sae, full)))
        script.write_text(SCRIPT)
        address = url.render_as_string(hide_password=False)
        environment = {"HEADSCOPE_DATABASE_URL": address, "HEADSCOPE_DATA": folder}
        with web(workers, environment) as (served, pid, started):
            ask = ["wrk", "-t1", f"-c{clients}", "--timeout", "10s", "-s", str(script), served]
            _loaded(ask, paths, 5)  # what a process keeps of templates and tokens
            idle = _loaded(ask, paths, seconds)
            with writing(address, name, rate) as (wrote, writer):
                parts: dict[str, Callable[[], list[int]]] = {
                    "web": partial(_children, pid),
                    "database": partial(_backends, url),
                    "writer": lambda: [writer],
                }
                busy, used = _with_cpu(parts, lambda: _loaded(ask, paths, seconds))
            memory = [_memory(child) for child in _children(pid)]
            each = dict(_each_kind(ask, paths, pid, list(mix(name, d_sae, full))))
    per = {part: 1e3 * spent / busy["requests"] for part, spent in used.items() if part != "writer"}
    cores, share = os.cpu_count() or 1, used["writer"] / busy["seconds"]
    bound = 1e3 * (cores - share) / sum(per.values())
    return {
        "requests_per_s": _figure(busy["requests"] / busy["seconds"], "requests/s", ">= 300"),
        "p50_ms": _figure(busy["p50"], "ms"),
        "p99_ms": _figure(busy["p99"], "ms", "<= 150"),
        "p99_of_idle": _figure(busy["p99"] / idle["p99"], "x", "<= 2"),
        "errors": _figure(busy["errors"] + idle["errors"], "", "0"),
        "web_memory_mb": _figure(max(pss for pss, _ in memory) / 1e6, "MB", "<= 150"),
        "web_rss_mb": _figure(max(rss for _, rss in memory) / 1e6, "MB"),
        "start_s": _figure(started, "s", "<= 2"),
        "idle_requests_per_s": _figure(idle["requests"] / idle["seconds"], "requests/s"),
        "idle_p99_ms": _figure(idle["p99"], "ms"),
        "examples_written_per_s": _figure(wrote[-1] if wrote else 0, "examples/s", f"about {rate}"),
        "bound_per_s": _figure(bound, "requests/s"),
        **{f"{part}_cpu_ms": _figure(spent, "ms") for part, spent in per.items()},
        "writer_share": _figure(share / cores, ""),
        **{f"web_cpu_ms_{kind}": _figure(spent, "ms") for kind, spent in each.items()},
    }


def _with_cpu(
    parts: dict[str, Callable[[], list[int]]], act: Callable[[], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, float]]:
    """What `act` found, and the seconds of processor time that the processes of each part used meanwhile, and wrk (`client`)."""

    def spent() -> dict[str, float]:
        client = resource.getrusage(resource.RUSAGE_CHILDREN)  # those that have ended: wrk is the only one that does
        found = {part: sum(processor_seconds(pid) for pid in pids()) for part, pids in parts.items()}
        return found | {"client": client.ru_utime + client.ru_stime}

    before = spent()
    found = act()
    after = spent()
    return found, {part: after[part] - before[part] for part in after}


def _backends(url: sa.URL) -> list[int]:
    """PostgreSQL's processes: the server's children, and itself."""
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        mine = connection.scalar(sa.text("select pg_backend_pid()"))
    server = int(Path(f"/proc/{mine}/stat").read_text().rpartition(")")[2].split()[1])
    engine.dispose()
    return [server, *(pid for pid in _children(server) if pid != mine)]


def _each_kind(ask: list[str], paths: Path, pid: int, lines: list[str], seconds: int = 3) -> Iterator[tuple[str, float]]:
    """Milliseconds of the web's processor time by kind of address."""
    kinds: dict[str, list[str]] = {}
    for line in lines:
        kinds.setdefault(_kind(line), []).append(line)
    for kind, those in kinds.items():
        paths.write_text("".join(f"{line}\n" for line in those))
        found, used = _with_cpu({"web": partial(_children, pid)}, lambda: _loaded(ask, paths, seconds))
        yield kind, 1e3 * used["web"] / found["requests"]


def _kind(line: str) -> str:
    how, _, path = line.partition(" ")
    known = {"/search": "search", "/heads": "head", "/api/": "api", ".json": "feature_json", "/features": "feature", "?": "table"}
    name = next((name for mark, name in known.items() if mark in path), {"/": "home", "/jobs": "jobs"}.get(path, "sae"))
    return f"{name}_part" if how == "part" else name


def mix(name: str, d_sae: int, full: list[int]) -> Iterator[str]:
    """How each is asked for, and where."""
    draw, here = random.Random(0), f"/saes/{name}"
    kinds = {
        "page {here}/features/{idx}": 45,
        "page {here}/features/{idx}.json": 8,
        "part {here}?sort={sort}": 8,
        "part {here}?min_density={low:.7f}&sort=-max": 6,
        "page {here}?sort={sort}": 5,
        "page {here}/heads/0": 5,
        "page {here}/search?q=the&kind=text": 4,
        "page {here}": 6,
        "page /api/v1/saes/{name}/features/{idx}": 6,
        "page /": 4,
        "page /jobs": 3,
    }
    chosen = draw.choices(list(kinds), list(kinds.values()), k=ADDRESSES)
    for kind in chosen:
        sort = draw.choice(("density", "-density", "max", "-max", "idx", "-head_share"))
        yield kind.format(here=here, name=name, idx=draw.choice(full), sort=sort, low=10 ** draw.uniform(-5, -2), d_sae=d_sae)


def copy_all(source: Database, url: sa.URL) -> None:
    """Every table of ours, row by row, into an empty PostgreSQL; and the queue's own tables."""
    from server import jobs

    target = Database(url)
    jobs.upgrade(Settings(database_url=url.render_as_string(hide_password=False)), target)
    with source.read() as old, target.write() as new:
        new.execute(sa.text("set session_replication_role = replica"))  # tables refer to each other in a circle
        for table in Base.metadata.sorted_tables:
            keys = list(table.c.keys())
            for part in old.execute(sa.select(table)).partitions(2000):
                new.execute(sa.insert(table), [dict(zip(keys, row, strict=True)) for row in part])
            if "id" in table.c and isinstance(table.c.id.type, sa.Integer | sa.BigInteger):
                new.execute(
                    sa.text(
                        f"select setval(pg_get_serial_sequence('{table.name}', 'id'), coalesce(max(id), 1)) from {table.name}"
                    )
                )
    with target.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("vacuum analyze"))
    target.close()


@contextmanager
def web(workers: int, environment: dict[str, str]) -> Iterator[tuple[str, int, float]]:
    """The web's address, the process that its workers are children of, and the seconds until it answered."""
    port, begun = free_port(), time.perf_counter()
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), "--workers", str(workers)]
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        while process.poll() is None:
            try:
                httpx.get(f"{address}/healthz").raise_for_status()
                break
            except httpx.TransportError:
                time.sleep(0.01)
        else:
            sys.exit(f"The web ended with status {process.returncode}.")
        yield address, process.pid, time.perf_counter() - begun
    finally:
        process.terminate()
        process.wait(15)


@contextmanager
def writing(address: str, name: str, rate: int) -> Iterator[tuple[list[int], int]]:
    """Examples a second that are written, as they were told so far, and the writer's process, which has begun and is ended
    afterwards."""
    command = [sys.executable, "-m", "bench._writing", address, name, str(rate)]
    process, told = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), list[int]()
    assert process.stdout is not None
    try:
        told.append(int(process.stdout.readline()))
        yield told, process.pid
        process.terminate()
        told += [int(line) for line in process.stdout.read().split()]
    finally:
        process.kill()
        process.wait(10)


def _loaded(ask: list[str], paths: Path, seconds: int) -> dict[str, Any]:
    done = subprocess.run(
        [*ask, f"-d{seconds}s"], env={**os.environ, "ADDRESSES": str(paths)}, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _children(pid: int) -> list[int]:
    """Those of a process; itself where it has none."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found] or [pid]


def _memory(pid: int) -> tuple[int, int]:
    """Bytes: the proportional set size, and the resident set."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return sizes["Pss"], sizes["Rss"]


def _figure(value: float, unit: str, target: str | None = None) -> Figure:
    return {"value": round(value, 1 if value >= 10 else 2), "unit": unit, "target": target}
