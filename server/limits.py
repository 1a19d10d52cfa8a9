"""How often somebody may ask: a sliding window for each, bounded, in a process's memory or in a file that several share."""

import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sae_core.errors import TooOften

MOST = 10_000
"""Questions that are remembered; of more, the oldest are forgotten."""
PATIENCE = 5.0
"""Seconds that a process waits for another that is counting; it takes microseconds."""


class Limit:
    """At most `times` in `seconds` for each asker, in all processes that are given the same file.

    The clock must be the same in all of them, as the machine's monotonic one is.
    """

    def __init__(
        self, times: int, seconds: float, *, file: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._times, self._seconds, self._file, self._clock = times, seconds, file, clock
        self._opened: tuple[int, sqlite3.Connection] | None = None
        self._lock = threading.Lock()

    def take(self, asker: str, what: str) -> None:
        """Count one more; TooOften, which says how long to wait, and not counted, where it is one too many."""
        with self._lock, self._database() as db:
            db.execute("begin immediate")
            now = self._clock()
            db.execute("delete from asked where at <= ?", (now - self._seconds,))
            times, oldest = db.execute("select count(*), min(at) from asked where asker = ?", (asker,)).fetchone()
            if times >= self._times:
                wait = max(1, round(oldest + self._seconds - now))
                raise TooOften(f"That is {what} too often: at most {self._times} in {self._seconds:g} s. Wait {wait} s.", wait)
            last = db.execute("insert into asked (asker, at) values (?, ?)", (asker, now)).lastrowid
            db.execute("delete from asked where rowid <= ?", ((last or 0) - MOST,))

    def forget(self, asker: str) -> None:
        """Begin anew for an asker."""
        with self._lock, self._database() as db:
            db.execute("delete from asked where asker = ?", (asker,))

    def _database(self) -> sqlite3.Connection:
        """This process's connection: one that was opened before a fork must not be used after it. As a context it commits."""
        if self._opened is None or self._opened[0] != os.getpid():
            db = sqlite3.connect(
                self._file or ":memory:", timeout=PATIENCE, isolation_level=None, check_same_thread=False
            )  # fmt: skip
            db.execute("pragma synchronous = off")  # what a machine that stops forgets is no loss
            db.execute("create table if not exists asked (asker text, at real)")
            db.execute("create index if not exists asked_by on asked (asker, at)")
            db.execute("create index if not exists asked_at on asked (at)")
            self._opened = os.getpid(), db
        return self._opened[1]
