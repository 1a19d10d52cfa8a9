"""What a monitor is told, what stands in a log and what never does, and traces as a collector gets them."""

import io
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from sqlalchemy.orm import Session

from bench._served import free_port
from server import logs, telemetry, watch
from server.app import create_app
from server.db import Database
from server.settings import Settings
from server.store import jobs as store
from server.store import watching
from server.tables import Job, now
from tests.jobs.conftest import wait_for
from tests.processes import Command
from tests.web.accounts import PASSWORD, WORD, lab_app, settle, visitors
from tests.web.conftest import SAE, at

URL = "http://127.0.0.1:8000"
TYPED = "a secret thought of mine"


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample as Prometheus's own reader has it."""
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def named(found: dict[Any, float], name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


@contextmanager
def browser(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), base_url=URL, follow_redirects=False) as client:
        yield client


# ---- pulse ----


def test_a_process_lives_without_its_database_but_is_not_ready(tmp_path: Path) -> None:
    with browser(Settings(data=tmp_path / "gone" / "deeper", cache=tmp_path)) as client:
        assert client.get("/healthz").json() == {"status": "ok", "version": "0.1.0"}
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert "does not answer" in answer.text
        assert named(samples(client.get("/metrics").text), "headscope_database_up") == 0


def test_it_is_ready_when_the_schema_is_ours_and_not_a_moment_longer(peopled: Settings) -> None:
    with browser(peopled) as client:
        assert client.get("/readyz").json()["status"] == "ready"
        database = Database(peopled.url)
        with database.write() as session:
            session.execute(sa.text("update alembic_version set version_num = '9999'"))
        database.close()
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert "newer Headscope" in answer.text


def test_pages_without_a_database_say_when_to_ask_again(tmp_path: Path) -> None:
    with browser(Settings(data=tmp_path / "gone" / "deeper", cache=tmp_path)) as client:
        for address in ("/", "/index.json", "/api/v1/saes"):
            answer = client.get(address)
            assert (answer.status_code, answer.headers.get("retry-after")) == (503, "5"), address


# ---- metrics ----


def test_requests_are_counted_by_route_and_status(peopled: Settings) -> None:
    with browser(peopled) as client:
        for index in (1, 2, 3):
            client.get(f"{SAE}/features/{index}")
        client.get(f"{SAE}/features/99999")
        for path in ("/nowhere/a", "/nowhere/b"):
            client.get(path)
        found = samples(client.get("/metrics").text)
    route = "/saes/{sae}/features/{index}"
    assert named(found, "headscope_requests_total", method="GET", route=route, status="200") == 3
    assert named(found, "headscope_requests_total", method="GET", route=route, status="404") == 1
    assert named(found, "headscope_requests_total", method="GET", route="none", status="404") == 2
    assert named(found, "headscope_request_seconds_count", route=route) == 4
    assert 0 < named(found, "headscope_request_seconds_sum", route=route) < 60
    assert "nowhere" not in str(found)


def test_queue_and_rates_are_what_the_database_says(peopled: Settings) -> None:
    database = Database(peopled.url)
    with database.write() as session:
        for n in range(3):
            store.create(session, f"harvest-{n}", "harvest", "x", {})
        session.get_one(Job, "harvest-1").created_at = now() - timedelta(minutes=10)
        running = session.scalars(sa.select(Job).where(Job.status == "running")).all()
        expected = sum(one.rate for one in running)
    with database.read() as session:
        size = watching.database_bytes(session)
    database.close()
    assert expected > 0
    with browser(peopled) as client:
        found = samples(client.get("/metrics").text)
    assert named(found, "headscope_jobs", kind="harvest", state="queued") == 3
    assert 600 <= named(found, "headscope_oldest_queued_seconds") < 660
    assert sum(value for (name, _), value in found.items() if name == "headscope_rate") == expected
    assert named(found, "headscope_database_bytes") == size
    assert size is not None
    assert size == pytest.approx((peopled.data / "headscope.db").stat().st_size, rel=0.5)
    assert named(found, "headscope_disk_free_bytes", folder="data") > 0


def test_a_scrape_asks_the_database_at_most_once_in_a_while(peopled: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[object]()
    real = watching.queue

    def counted(session: Session) -> watching.Queue:
        asked.append(session)
        return real(session)

    monkeypatch.setattr(watching, "queue", counted)
    with browser(peopled) as client:
        for _ in range(5):
            client.get("/metrics")
        assert len(asked) == 1
        client.app.state.watch._asked -= watch.KEPT  # type: ignore[attr-defined]  # as if that long had passed
        client.get("/metrics")
        assert len(asked) == 2


def test_on_postgresql_the_queue_is_told_too(postgres: sa.URL) -> None:
    database = Database(postgres)
    database.upgrade()
    with database.write() as session:
        store.create(session, "harvest-watched", "harvest", "x", {})
        store.beat(session, "worker-watched", "cpu", 1)
    with database.read() as session:
        found = watching.queue(session)
        assert watching.database_version(session)[0] == "PostgreSQL"
    with database.write() as session:
        session.execute(sa.delete(Job).where(Job.id == "harvest-watched"))
        store.leave(session, "worker-watched")
    database.close()
    assert found.counts["harvest", "queued"] >= 1
    assert 0 <= found.waited < 600
    assert found.bytes is not None
    assert found.bytes > 1e6
    assert [one.silent < 60 for one in found.workers if one.id == "worker-watched"] == [True]


def test_who_may_read_them(tmp_path: Path) -> None:
    lab = settle(at(tmp_path))
    with visitors(lab_app(lab.settings)) as people:
        assert people["anonymous"].get("/metrics").status_code == 303  # to where one logs in
        assert people["anonymous"].get("/metrics", headers={"Accept": "application/json"}).status_code == 401
        answer = people["Rita"].get("/metrics")
        assert answer.status_code == 200
        assert WORD not in answer.text
        assert people["Rita"].get("/status").status_code == 403
        seen = people["Ines"].get("/status")
        assert seen.status_code == 200
        assert WORD not in seen.text
        assert 'href="/status"' in seen.text
        assert 'href="/status"' not in people["Rita"].get("/").text
    told = lab.settings.model_copy(update={"metrics_public": True})
    with visitors(lab_app(told)) as people:
        assert people["anonymous"].get("/metrics").status_code == 200
        assert people["anonymous"].get("/status").status_code == 303
    with browser(lab.settings.model_copy(update={"start_token": SecretStr("t0ken")})) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"Authorization": "Bearer t0ken"}).status_code == 200


def test_a_process_that_serves_no_pages_answers_on_a_port_of_its_own(peopled: Settings) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = peopled.model_copy(update={"metrics_port": port})
    wrong = list[str]()
    database = Database(settings.url)
    with database.write() as session:
        running = session.get_one(Job, "train-running-1")
        rate, worker = running.rate, running.worker
    gpu = watch.Gpu("cuda:0", 3, 9, 2)
    told = watch.Watch(settings, database, "worker", worker=worker, gpus=lambda: [gpu])
    end = watch.listening(settings, told, lambda: wrong[0] if wrong else None)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            assert client.get("/healthz").json() == {"status": "ok"}
            found = samples(client.get("/metrics").text)
            wrong.append("The heartbeat has stopped.")
            answer = client.get("/healthz")
            assert (answer.status_code, answer.json()["status"]) == (503, "The heartbeat has stopped.")
            assert client.get("/jobs").status_code == 404
    finally:
        end()
        database.close()
    assert named(found, "headscope_worker_busy") == 1
    assert named(found, "headscope_rate", kind="train", unit="tokens") == rate
    assert [named(found, "headscope_gpu_memory_bytes", device="cuda:0", of=of) for of in ("used", "total", "this process")] == [
        3,
        9,
        2,
    ]
    assert not [name for name, _ in found if name == "headscope_jobs"]


# ---- status ----


def test_the_status_page_says_what_the_database_and_the_machine_say(peopled: Settings) -> None:
    database = Database(peopled.url)
    with database.write() as session:
        store.beat(session, "worker-1", "cuda:0", 77)
        store.beat(session, "worker-2", "cpu", 78)
        session.execute(
            sa.text("update worker set last_seen = :then where id = 'worker-2'"),
            {"then": (now() - timedelta(minutes=3)).replace(tzinfo=None)},
        )
        session.get_one(Job, "train-running-1").worker = "worker-1"
    database.close()
    with browser(peopled) as client:
        page, text = client.get("/status.json").json(), client.get("/status").text
    workers = {one["id"]: one for one in page["workers"]}
    assert workers["worker-1"]["job"]["id"] == "train-running-1"
    assert (workers["worker-1"]["lost"], workers["worker-2"]["lost"]) == (False, True)
    assert page["engine"]["answers"] is False
    assert page["version"] == "0.1.0"
    assert page["database"].startswith("SQLite 3.")
    assert "silent for 3 min" in text
    assert 'href="/jobs/train-running-1"' in text


# ---- logs ----


@contextmanager
def said(settings: Settings, process: str = "web") -> Iterator[io.StringIO]:
    """What processes say, in place of their error output."""
    root, dbos = logging.getLogger(), logging.getLogger("dbos")
    before = root.handlers[:], root.level, dbos.handlers[:], {name: logging.getLogger(name).level for name in logs.OURS}
    logs.begin(settings, process)
    stream = io.StringIO()
    root.handlers[0].setStream(stream)  # type: ignore[attr-defined]
    try:
        yield stream
    finally:
        root.handlers[:], dbos.handlers[:] = before[0], before[2]
        root.setLevel(before[1])
        for name, level in before[3].items():
            logging.getLogger(name).setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_request_has_an_id_that_comes_back_and_stands_in_its_line(peopled: Settings) -> None:
    settings = peopled.model_copy(update={"log_format": "json"})
    with said(settings) as stream, browser(settings) as client:
        answer = client.get(f"{SAE}/features/3?context=full", headers={"X-Request-ID": "abc-1.2"})
        assert answer.headers["x-request-id"] == "abc-1.2"
        made = [
            client.get("/", headers={"X-Request-ID": bad}).headers["x-request-id"] for bad in ("a b", "x" * 101, 'a"b', "<b>")
        ]
        assert all(re.fullmatch("[0-9a-f]{16}", one) for one in made)
        assert len(set(made)) == 4
    first = lines(stream)[0]
    assert first["request"] == "abc-1.2"
    assert (first["method"], first["route"], first["status"]) == ("GET", "/saes/{sae}/features/{index}", 200)
    assert (first["process"], first["level"], first["path"]) == ("web", "info", f"{SAE}/features/3")
    assert 0 < first["ms"] < 60_000
    assert "context=full" not in stream.getvalue()


def test_a_fault_is_logged_with_its_request_and_answered_with_every_header(
    peopled: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.pages.home.home_page", lambda _: 1 / 0)
    with said(peopled) as stream, browser(peopled) as client:
        answer = client.get("/", headers={"X-Request-ID": "of-a-fault"})
        assert answer.status_code == 500
        assert answer.headers["x-request-id"] == "of-a-fault"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "[request of-a-fault]" in stream.getvalue()
    assert "ZeroDivisionError" in stream.getvalue()


@pytest.mark.parametrize("form", ["text", "json"])
def test_nothing_typed_and_no_secret_is_ever_in_a_log(peopled: Settings, form: str) -> None:
    lab = settle(at(peopled.data / "lab"))
    settings = lab.settings.model_copy(update={"log_format": form})
    app, labels = lab_app(settings), "/api/v1/saes/shared-sae/features/4/labels"

    def read_only(_: sa.Connection, cursor: Any, statement: str, *_rest: object) -> None:
        if statement.startswith("INSERT INTO label"):
            cursor.execute("pragma query_only=on")

    with said(settings) as stream, visitors(app) as people:
        logging.getLogger("server").setLevel(logging.DEBUG)
        ola, stranger = people["Ola"], people["anonymous"]
        key = next(
            word
            for word in re.split(r"[<>\s]", ola.post("/keys", data={"name": "k", "scope": "read"}).text)
            if word.startswith("headscope_")
        )
        stranger.post("/login", data={"name": "Ola", "password": TYPED})
        stranger.get("/api/v1/saes", headers={"x-api-key": key})
        stranger.get("/api/v1/saes", headers={"Authorization": f"Bearer {key}x"})
        stranger.get("/start", params={"token": TYPED})
        ola.get("/search", params={"q": TYPED})
        ola.post("/api/v1/live/firings", json={"sae": "shared-sae", "text": TYPED})
        ola.post("/api/v1/live/firings", json={"sae": "shared-sae", "text": [TYPED]})
        # A database that fails while somebody's words are on their way into it.
        assert ola.post(labels, json={"text": TYPED}).status_code < 300
        sa.event.listen(app.state.db.engine, "before_cursor_execute", read_only)
        assert ola.post(labels, json={"text": f"{TYPED} again"}).status_code == 503
        logins = [cookie.value for one in people.values() for cookie in one.cookies.jar]
    text = stream.getvalue()
    assert "the database failed" in text
    assert "INSERT INTO label" in text
    assert TYPED not in text
    assert TYPED.replace(" ", "+") not in text
    assert TYPED.replace(" ", "%20") not in text
    assert key not in text
    assert PASSWORD not in text
    assert len(logins) >= 4
    assert not [one for one in logins if str(one) in text]


@pytest.mark.parametrize(
    ("said_", "secret"),
    [
        ("Authorization: Bearer abcdef", "abcdef"),
        ("key headscope_Zm9vYmFyYmF6cXV4cXV1eA was used", "Zm9vYmFyYmF6cXV4cXV1eA"),
        ("postgresql+psycopg://headscope:hunter2@db/headscope", "hunter2"),  # pragma: allowlist secret
        ("GET /start?token=abcdef HTTP/1.1", "abcdef"),
        ("DETAIL:  Failing row contains (1, abcdef).", "abcdef"),
        ("text [type=string_type, input_value=['abcdef'], input_type=list]", "abcdef"),
    ],
)
def test_what_looks_like_a_secret_is_struck_out(said_: str, secret: str) -> None:
    assert secret in said_
    assert secret not in logs.struck(said_)
    assert "[struck out]" in logs.struck(said_)
    assert logs.struck("train-smollm2-l17-1: Reading attention outputs.") == "train-smollm2-l17-1: Reading attention outputs."


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_is_said_of_a_job_names_it(settings: Settings, form: str) -> None:
    told = settings.model_copy(update={"log_format": form})
    with said(told, "worker") as stream:
        with logs.about_job("train-x-1"):
            logging.getLogger("headscope.worker").warning("slow\nand more")
        logging.getLogger("headscope.worker").warning("idle")
    if form == "json":
        first, second = lines(stream)
        assert (first["job"], first["process"], first["message"]) == ("train-x-1", "worker", "slow\nand more")
        assert "job" not in second
    else:
        assert "slow [job train-x-1]\nand more" in stream.getvalue()
        assert "idle [" not in stream.getvalue()


# ---- traces ----


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ExportTraceServiceRequest]]:
    """What an OpenTelemetry collector on 127.0.0.1 got, in OTLP."""
    got = list[ExportTraceServiceRequest]()

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            assert self.headers["Content-Type"] == "application/x-protobuf"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield got
    server.shutdown()
    server.server_close()


def test_traces_reach_a_collector_and_hold_nothing_typed(peopled: Settings, collector: list[ExportTraceServiceRequest]) -> None:
    settings = peopled.model_copy(update={"telemetry": True})
    end = telemetry.begin(settings, "web")
    above = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    try:
        with browser(settings) as client:
            client.get(f"{SAE}/features/3", params={"q": TYPED}, headers={"traceparent": above, "Cookie": "headscope_login=abc"})
            client.get("/nowhere")
        with telemetry.job("train-x-1", "train"):
            carried = telemetry.onward()
    finally:
        end()
    spans = {
        span.name: span
        for request in collector
        for one in request.resource_spans
        for each in one.scope_spans
        for span in each.spans
    }
    assert set(spans) == {"GET /saes/{sae}/features/{index}", "GET none", "train"}
    asked = spans["GET /saes/{sae}/features/{index}"]
    assert asked.trace_id.hex() == above.split("-")[1]
    assert asked.parent_span_id.hex() == above.split("-")[2]
    told = {one.key: one.value for one in asked.attributes}
    assert told["http.response.status_code"].int_value == 200
    assert told["http.route"].string_value == "/saes/{sae}/features/{index}"
    assert asked.end_time_unix_nano > asked.start_time_unix_nano
    assert carried["traceparent"].split("-")[1] == spans["train"].trace_id.hex()
    resource = {one.key: one.value.string_value for one in collector[0].resource_spans[0].resource.attributes}
    assert resource["service.name"] == "headscope-web"
    assert TYPED not in str(collector)
    assert "headscope_login" not in str(collector)


def test_without_the_setting_nothing_is_traced(peopled: Settings, collector: list[ExportTraceServiceRequest]) -> None:
    end = telemetry.begin(peopled, "web")
    with browser(peopled) as client:
        client.get("/")
    assert telemetry.onward() == {}
    end()
    time.sleep(0.1)
    assert collector == []


# ---- several processes ----


def test_two_web_processes_are_told_of_together_and_send_their_last_traces(
    peopled: Settings, collector: list[ExportTraceServiceRequest], tmp_path: Path
) -> None:
    port, said = free_port(), tmp_path / "said"
    env = os.environ | {
        "HEADSCOPE_DATA": str(peopled.data), "HEADSCOPE_CACHE": str(peopled.cache), "HEADSCOPE_START_TOKEN": "off",
        "HEADSCOPE_LOG_FORMAT": "json", "HEADSCOPE_TELEMETRY": "true", "TMPDIR": str(tmp_path),
    }  # fmt: skip
    address, route = f"http://127.0.0.1:{port}", "/saes/{sae}/features/{index}"
    process = Command("serve", "--port", port, "--workers", 2, env=env, stderr=said)
    try:
        wait_for(lambda: answered(f"{address}/healthz"))
        asked = 0
        while len(by_process(said, route)) < 2 or asked < 20:  # each on a connection of its own, which either of the two takes
            assert httpx.get(f"{address}{SAE}/features/{asked % 5}", trust_env=False).status_code == 200
            asked += 1
            assert asked < 500, "one of the two answers nothing"
        scrapes = [samples(httpx.get(f"{address}/metrics", trust_env=False).text) for _ in range(8)]
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        rss = sum(resident(pid) for pid in (process.pid, *children))
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    shares = by_process(said, route)
    assert set(shares) == set(children)
    assert sum(shares.values()) == asked
    for found in scrapes:
        assert named(found, "headscope_requests_total", method="GET", route=route, status="200") == asked
        assert named(found, "headscope_request_seconds_count", route=route) == asked
        assert named(found, "headscope_request_seconds_bucket", route=route, le="+Inf") == asked
        assert named(found, "process_resident_memory_bytes") == pytest.approx(rss, rel=0.2)
        assert named(found, "headscope_database_up") == 1
    spans = [span for one in collector for each in one.resource_spans for scope in each.scope_spans for span in scope.spans]
    assert sum(span.name == f"GET {route}" for span in spans) == asked
    assert sum(span.name == "GET /metrics" for span in spans) == len(scrapes), "the last are sent too"
    assert not list(tmp_path.glob("headscope-metrics-*"))


def by_process(said: Path, route: str) -> Counter[int]:
    """Requests of a route that each process says it has answered."""
    lines = [json.loads(line) for line in said.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return Counter(line["pid"] for line in lines if line.get("route") == route)


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def answered(address: str) -> bool:
    try:
        return httpx.get(address, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
