"""A PostgreSQL server of one's own: in a temporary folder, on a free port of 127.0.0.1, gone afterwards."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa


def programs() -> Path | None:
    """Where `initdb` and `pg_ctl` are; None where PostgreSQL is not installed."""
    found = shutil.which("pg_ctl")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists()), None)


@contextmanager
def server() -> Iterator[sa.URL]:
    """The address of an empty database, with PostgreSQL's own settings but for where it listens."""
    with restartable() as (url, _):
        yield url


@contextmanager
def restartable() -> Iterator[tuple[sa.URL, Callable[[], None]]]:
    """The same, and what restarts it at once, as if the machine had lost its power: who is connected is cut off."""
    place = programs()
    if place is None:
        raise FileNotFoundError("PostgreSQL is not installed; on Debian: apt-get install postgresql.")
    # PostgreSQL refuses to run as root; the package brings a user of its own.
    user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="headscope-postgres-") as folder, socket.socket() as probe:
        if user:
            shutil.chown(folder, "postgres", "postgres")
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()

        def call(program: str, *given: str) -> None:
            command = [str(place / program), "-D", f"{folder}/data", *given]
            subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, **user)

        call("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8")
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories=''"
        call("pg_ctl", "-l", f"{folder}/log", "-w", "-o", options, "start")

        def restart() -> None:
            call("pg_ctl", "-m", "immediate", "-l", f"{folder}/log", "-w", "-o", options, "restart")

        try:
            yield sa.URL.create("postgresql+psycopg", "postgres", host="127.0.0.1", port=port, database="postgres"), restart
        finally:
            call("pg_ctl", "-m", "immediate", "-w", "stop")
