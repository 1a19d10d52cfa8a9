"""A webhook is called when a job ends, and can never spoil one."""

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from sae_core.errors import UsageError
from server import webhook
from server.settings import Settings
from server.store.jobs import JobRecord

JOB = JobRecord(
    id="train-x-1", kind="train", title="Train x", config={}, parent_id=None, status="failed", attempt=1, worker="worker-0",
    phase=None, done=0, total=0, unit="", rate=0.0, seconds_left=None, error="The disk is full.",
    created_at=datetime(2026, 11, 23, tzinfo=UTC), started_at=None, updated_at=None,
    finished_at=datetime(2026, 11, 23, 7, tzinfo=UTC),
)  # fmt: skip


@contextmanager
def listening(*statuses: int) -> Iterator[tuple[str, list[Any]]]:
    """A server that answers with these statuses one after the other; its address, and what it was sent."""
    heard: list[Any] = []
    answers = iter(statuses)

    class Ear(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append((self.headers["content-type"], json.loads(self.rfile.read(int(self.headers["content-length"])))))
            self.send_response(next(answers))
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Ear)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook?token=secret", heard
    server.shutdown()
    thread.join()
    server.server_close()


def settings(tmp_path: Path, address: str | None) -> Settings:
    return Settings(data=tmp_path, cache=tmp_path, webhook=address, port=8123)


def test_what_became_of_a_job_is_posted_as_json(tmp_path: Path) -> None:
    with listening(204) as (address, heard):
        webhook.announce(settings(tmp_path, address), JOB)
    assert heard == [
        (
            "application/json",
            {
                "id": "train-x-1", "kind": "train", "title": "Train x", "status": "failed", "error": "The disk is full.",
                "finished_at": "2026-11-23T07:00:00+00:00", "address": "http://127.0.0.1:8123/jobs/train-x-1",
            },
        )
    ]  # fmt: skip


@pytest.mark.parametrize(("statuses", "calls"), [((500, 200), 2), ((500, 500, 200), 2), ((302, 302), 2), ((200,), 1)])
def test_a_refusal_is_tried_once_more_and_no_redirect_is_followed(tmp_path: Path, statuses: tuple[int, ...], calls: int) -> None:
    with listening(*statuses) as (address, heard):
        webhook.announce(settings(tmp_path, address), JOB)
    assert len(heard) == calls


def test_an_address_that_is_not_there_is_a_line_in_the_log_without_its_secret(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/hook?token=secret"
    with caplog.at_level(logging.WARNING):
        webhook.announce(settings(tmp_path, address), JOB)
    assert caplog.text.count("was not told of train-x-1") == 2
    assert "secret" not in caplog.text


def test_an_address_that_never_ends_its_answer_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "LONGEST", 0.3)
    monkeypatch.setattr(webhook, "SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.monotonic()
        webhook.announce(settings(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}/"), JOB)
        assert time.monotonic() - begun < 10


def test_without_a_webhook_nobody_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "_tell", lambda *_: pytest.fail("called"))
    webhook.announce(settings(tmp_path, None), JOB)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://example.org/x", "example.org", "http://", "javascript:x"])
def test_what_is_no_web_address_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(UsageError, match="http:// or https://") as refused:
        settings(tmp_path, address)
    assert refused.value.field == "webhook"
