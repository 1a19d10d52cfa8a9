"""The web process in a process of its own, and how long its answers take."""

import gzip
import http.client
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

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


class Answer(NamedTuple):
    """What a server sent."""

    sent: bytes
    """The body as it came."""
    encoding: str

    @property
    def content(self) -> bytes:
        """The body as it was meant."""
        return gzip.decompress(self.sent) if self.encoding == "gzip" else self.sent


class Client:
    """One connection that is kept, by the standard library: others take longer over an answer than a server may."""

    def __init__(self, address: str, headers: Mapping[str, str] | None = None) -> None:
        self._connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        self._headers = {"Accept-Encoding": "gzip", **(headers or {})}

    def get(self, path: str) -> Answer:
        """The answer to a path, which has to be 200."""
        self._connection.request("GET", path, headers=self._headers)
        answer = self._connection.getresponse()
        sent = answer.read()
        if answer.status != 200:
            raise OSError(f"GET {path} was answered by {answer.status}: {sent[:200]!r}")
        return Answer(sent, answer.getheader("content-encoding", ""))


def processor_seconds(pid: int) -> float:
    """What a process has used so far of the processor, in user and system mode; Linux alone tells."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def times_of(client: Client, path: Callable[[], str], n: int, warm: int = 10) -> tuple[list[float], list[Answer]]:
    """Milliseconds of `n` requests one after another, and their answers; the first `warm` are not counted."""
    times, answers = [], []
    for index in range(n + warm):
        asked = path()
        begun = time.perf_counter()
        answer = client.get(asked)
        took = (time.perf_counter() - begun) * 1e3
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
