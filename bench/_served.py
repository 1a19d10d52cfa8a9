"""The web process in a process of its own, and how long its answers take."""

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import httpx

Figure = dict[str, object]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Address(str):
    """Where a server is, and its process."""

    pid: int


@contextmanager
def served(command: Sequence[str], port: int, ready: str, environment: Mapping[str, str] | None = None) -> Iterator[Address]:
    """A server's address while it runs; it is there once `ready` answers."""
    process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdout=subprocess.DEVNULL)
    try:
        address = Address(f"http://127.0.0.1:{port}")
        address.pid = process.pid
        for _ in range(1200):
            try:
                httpx.get(f"{address}{ready}")
                break
            except httpx.TransportError:
                if process.poll() is not None:
                    sys.exit(f"{' '.join(map(str, command))} ended with status {process.returncode}.")
                time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def headscope(environment: Mapping[str, str] | None = None) -> Iterator[Address]:
    """One worker of ours."""
    port = free_port()
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port)]
    with served(command, port, "/healthz", environment) as address:
        yield address


def times_of(client: httpx.Client, path: Callable[[], str], n: int, warm: int = 10) -> tuple[list[float], list[httpx.Response]]:
    """Milliseconds of `n` requests one after another, and their answers; the first `warm` are not counted."""
    times, answers = [], []
    for index in range(n + warm):
        begun = time.perf_counter()
        answer = client.get(path())
        took = (time.perf_counter() - begun) * 1e3
        answer.raise_for_status()
        if index >= warm:
            times.append(took)
            answers.append(answer)
    return times, answers


def spread(name: str, times: Sequence[float], p50: str | None = None, p99: str | None = None) -> dict[str, Figure]:
    """`name`_p50_ms and `name`_p99_ms with their targets."""
    ordered = sorted(times)
    return {
        f"{name}p50_ms": {"value": round(statistics.median(ordered), 2), "unit": "ms", "target": p50},
        f"{name}p99_ms": {"value": round(ordered[int(0.99 * len(ordered))], 2), "unit": "ms", "target": p99},
    }
