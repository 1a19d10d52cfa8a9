"""What each process tells Prometheus, and its answer to whether it lives. No torch.

What follows from the database (queue, workers, rates) is asked of it when somebody looks, and not twice within `KEPT` seconds, so
a scrape costs a few small queries however many jobs there were lately. Nothing told here names a job, an SAE or a person.
Where the web is several processes, whichever is asked tells of all: each counts in a file in a folder that they share.
"""

import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import sqlalchemy as sa
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs, telemetry
from server.db import Database
from server.settings import Settings
from server.store import watching
from server.up import listen

log = logging.getLogger("headscope.watch")
disable_created_metrics()
FORMAT = CONTENT_TYPE_PLAIN_0_0_4
KEPT = 5.0
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
"""Bounds of the histogram of answers' times."""
UNKNOWN = "none"
"""The route of an address that there is not: strangers must not be able to make a series of every path."""


@dataclass(frozen=True)
class Gpu:
    """Memory of a GPU that this process uses, in bytes."""

    device: str
    used: int
    """By whomever."""
    total: int
    reserved: int
    """By this process."""


class Watch:
    """A process's metrics; with `shared`, those of all that count together in that folder and are forked from this process."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        process: str,
        *,
        worker: str | None = None,
        gpus: Callable[[], list[Gpu]] = list,
        shared: Path | None = None,
    ) -> None:
        self._settings, self._db, self._process, self._worker, self._gpus = settings, db, process, worker, gpus
        self._lock = threading.Lock()
        self._asked = -KEPT
        self._known: tuple[watching.Queue | None, bool] = None, False
        self.registry = CollectorRegistry()
        PlatformCollector(registry=self.registry)
        self.registry.register(self)
        counts: CollectorRegistry | None = self.registry
        if shared is not None:
            counts = None  # what this process counts is in its file, and told from there with what the others have
            MultiProcessCollector(self.registry, str(shared))
            self.registry.register(_Family(os.getpid()))
        else:
            ProcessCollector(registry=self.registry)
        self.answered = Counter("headscope_requests", "Requests answered.", ("method", "route", "status"), registry=counts)
        self.seconds = Histogram(
            "headscope_request_seconds", "From a request's arrival to the end of its answer.", ("route",),
            buckets=SECONDS, registry=counts,
        )  # fmt: skip

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    def collect(self) -> Iterable[Metric]:
        """What is true now."""
        yield InfoMetricFamily("headscope", "What runs.", {"version": version("headscope"), "process": self._process})
        yield from self._disk()
        queue, answers = self._queue()
        yield GaugeMetricFamily("headscope_database_up", "Whether the database answers this process.", int(answers))
        if queue is not None and (self._worker or self._process == "web"):
            yield from _of_queue(queue, self._worker)
        yield from self._memory()

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand, so that registering asks no database."""
        return ()

    def _queue(self) -> tuple[watching.Queue | None, bool]:
        with self._lock:
            if time.monotonic() - self._asked >= KEPT:
                try:
                    with self._db.read() as session:
                        self._known = watching.queue(session), True
                except sa.exc.SQLAlchemyError:
                    self._known = None, False
                self._asked = time.monotonic()
            return self._known

    def _disk(self) -> Iterable[Metric]:
        free = GaugeMetricFamily("headscope_disk_free_bytes", "Free on the disk of a folder.", labels=["folder"])
        size = GaugeMetricFamily("headscope_disk_bytes", "Size of the disk of a folder.", labels=["folder"])
        for name, folder in (("data", self._settings.data), ("cache", self._settings.cache)):
            if (found := disk(folder)) is not None:
                free.add_metric([name], found.free)
                size.add_metric([name], found.total)
        yield from (free, size)

    def _memory(self) -> Iterable[Metric]:
        memory = GaugeMetricFamily("headscope_gpu_memory_bytes", "Memory of a GPU.", labels=["device", "of"])
        for gpu in self._gpus():
            for of, value in (("used", gpu.used), ("total", gpu.total), ("this process", gpu.reserved)):
                memory.add_metric([gpu.device, of], value)
        if memory.samples:
            yield memory


class _Family(Collector):
    """What a process and those that it forked take together, as `ProcessCollector` tells it of one."""

    def __init__(self, parent: int) -> None:
        self._parent = parent

    def collect(self) -> Iterable[Metric]:
        """The sums; of the beginning the parent's, whose limit of open files is that of each."""
        told: dict[str, Metric] = {}
        children = Path(f"/proc/{self._parent}/task/{self._parent}/children")
        for pid in (str(self._parent), *(children.read_text().split() if children.exists() else ())):
            for metric in ProcessCollector(registry=None, pid=partial(str, pid)).collect():
                first = told.setdefault(metric.name, metric)
                if first is not metric and metric.name not in ("process_start_time_seconds", "process_max_fds"):
                    first.samples = [first.samples[0]._replace(value=first.samples[0].value + metric.samples[0].value)]
        return told.values()


@contextmanager
def shared(processes: int) -> Iterator[Path | None]:
    """A folder in which several processes that are forked within count together; to be entered before the app is made."""
    if processes == 1:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="headscope-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # where a process puts its file
        values.ValueClass = values.MultiProcessValue()  # which the library chooses at its import, from the same variable
        yield Path(folder)


@dataclass(frozen=True)
class Disk:
    """A disk, in bytes."""

    free: int
    """What its users may still write."""
    total: int


def disk(folder: Path) -> Disk | None:
    """The disk that a folder is on; None where there is no such folder."""
    try:
        found = shutil.disk_usage(folder)
    except OSError:
        return None
    return Disk(found.free, found.total)


def _of_queue(queue: watching.Queue, worker: str | None) -> Iterable[Metric]:
    """Of a worker only what it does itself; of the web all."""
    rate = GaugeMetricFamily("headscope_rate", "What running jobs do a second, in the unit.", labels=["kind", "unit"])
    for (kind, unit), value in watching.rates(queue, worker).items():
        rate.add_metric([kind, unit], value)
    yield rate
    if worker is not None:
        busy = any(one.worker == worker for one in queue.running)
        yield GaugeMetricFamily("headscope_worker_busy", "Whether this worker is at a job.", int(busy))
        return
    jobs = GaugeMetricFamily("headscope_jobs", "Jobs, by what became of them.", labels=["kind", "state"])
    for (kind, status), n in queue.counts.items():
        jobs.add_metric([kind, status], n)
    yield jobs
    yield GaugeMetricFamily(
        "headscope_oldest_queued_seconds", "How long the job waits that has waited longest; 0 where none does.", queue.waited
    )  # fmt: skip
    silent = GaugeMetricFamily("headscope_worker_silent_seconds", "Since a worker was heard last.", labels=["worker", "device"])
    for one in queue.workers:
        silent.add_metric([one.id, one.device], one.silent)
    yield silent
    if queue.bytes is not None:
        yield GaugeMetricFamily("headscope_database_bytes", "Size of the database.", queue.bytes)


class Watched:
    """Gives each request an id, counts and times it, writes its line, and answers when something fails that nobody foresaw.

    It stands inside of what puts headers on, so that such an answer has them too.
    """

    def __init__(self, app: ASGIApp, watch: Watch, on_fault: Callable[[Request, Exception], Response]) -> None:
        self.app, self.watch, self.on_fault = app, watch, on_fault

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        known = logs.accepted(given.decode("latin-1"))
        before, began, status = logs.request_id.set(known), time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", known.encode())]}
            await send(message)

        try:
            with telemetry.request(scope) as traced:
                try:
                    await self.app(scope, receive, answer)
                except Exception as error:
                    log.exception("a fault that nobody foresaw, at %s", _route(scope))
                    if status:
                        raise  # it has begun to answer; the server ends the connection
                    await self.on_fault(Request(scope), error)(scope, receive, answer)
                finally:
                    traced(_route(scope), status)
        finally:
            self._told(scope, status, time.perf_counter() - began)
            logs.request_id.reset(before)

    def _told(self, scope: Scope, status: int, seconds: float) -> None:
        route = _route(scope)
        self.watch.answered.labels(scope["method"], route, status).inc()
        self.watch.seconds.labels(route).observe(seconds)
        if logs.requests.isEnabledFor(logging.INFO):
            about = {
                "method": scope["method"], "route": route, "path": scope["path"][:300] if route != UNKNOWN else None,
                "status": status, "ms": round(1000 * seconds, 1), "address": (scope.get("client") or ("",))[0],
            }  # fmt: skip
            logs.requests.info("%s %s %d", scope["method"], route, status, extra={"about": about})


def _route(scope: Scope) -> str:
    path: str | None = getattr(scope.get("route"), "path_format", None)
    if path is not None:
        return path
    return "/static" if scope["path"].startswith("/static/") and "endpoint" in scope else UNKNOWN


def listening(settings: Settings, watch: Watch, lives: Callable[[], str | None]) -> Callable[[], None]:
    """Answer `/healthz` and `/metrics` on the settings' port, for a process that answers nothing else; give what ends it.

    `lives` says what is wrong, or None.
    """

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, watch.page(), FORMAT)
            elif self.path == "/healthz":
                wrong = lives()
                self._answer(503 if wrong else 200, json.dumps({"status": wrong or "ok"}).encode(), "application/json")
            else:
                self._answer(404, b"There are /healthz and /metrics.\n", "text/plain; charset=utf-8")

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if status == 503:
                self.send_header("Retry-After", "5")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *_: object) -> None:
            """Nothing: a line for each look would drown the rest."""

    socket = listen(settings.metrics_host, settings.metrics_port)
    server = ThreadingHTTPServer((settings.metrics_host, settings.metrics_port), Answers, bind_and_activate=False)
    server.socket.close()
    server.socket, server.daemon_threads = socket, True
    threading.Thread(target=server.serve_forever, name="watch", daemon=True).start()

    def end() -> None:
        server.shutdown()
        server.server_close()

    return end
