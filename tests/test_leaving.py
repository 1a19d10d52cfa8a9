"""Each process as a service of its own: it comes, leaves within ten seconds of SIGTERM, and comes again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from bench import _served
from server import jobs
from server.db import Database
from server.settings import Settings
from server.store import jobs as store
from server.up import environment

SECONDS = 10.0


def pulse(name: str, settings: Settings) -> str:
    """Where the process says that it lives."""
    port = {"serve": settings.port, "worker": settings.metrics_port, "engine": settings.engine_port}[name]
    return f"http://127.0.0.1:{port}/{'health' if name == 'engine' else 'healthz'}"


def come(name: str, settings: Settings, log: Path) -> subprocess.Popen[bytes]:
    """The process, once it answers."""
    with log.open("w") as output:
        command = [sys.executable, "-m", "server.cli", name]
        process = subprocess.Popen(command, env=os.environ | environment(settings), stderr=output)
    for _ in range(1200):
        try:
            if httpx.get(pulse(name, settings), trust_env=False).status_code < 500:  # the engine refuses a stranger, and lives
                return process
        except httpx.TransportError:
            assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"{name} does not answer")


@pytest.mark.parametrize("name", ["serve", "worker", "engine"])
def test_a_service_leaves_when_asked_to_and_comes_again(tmp_path: Path, name: str) -> None:
    settings = Settings(
        data=tmp_path, cache=tmp_path / "cache", port=_served.free_port(), engine_port=_served.free_port(),
        metrics_port=_served.free_port(), worker_id="gpu0", log_format="json",
    ).prepare()  # fmt: skip
    db = Database(settings.url)
    jobs.upgrade(settings, db)
    log = tmp_path / "said"
    for _ in range(2):
        process = come(name, settings, log)
        try:
            if name == "worker":
                with db.read() as session:
                    assert [one.id for one in store.workers(session)] == ["gpu0"]
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            code = process.wait(60)
            seconds = time.monotonic() - began
        finally:
            process.kill()
            process.wait()
        assert code == 0, log.read_text()
        assert seconds < SECONDS
        assert "Traceback" not in log.read_text()
    with db.read() as session:
        assert store.workers(session) == []
    db.close()
