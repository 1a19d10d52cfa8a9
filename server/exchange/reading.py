"""Reads dashboards ahead in processes of their own, since reading JSON and packing numbers is most of an import. What they
made is handed to the one process that writes, file by file in order, so that each is stored once."""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from types import TracebackType

from sae_core.errors import ProcessLost
from server.exchange.dashboards import About, Layout, Prompts, read
from server.store.foreign import Chunk, chunks

SMALL = 32 * 2**20
"""Bytes of files that are read sooner than processes are started."""
AHEAD = 1
"""Files that wait to be written, beyond those that are being read."""


class Readers:
    """The features of a folder's files as chunks, each file once, in the order of `numbers`.

    `processes` is how many read; by default none but this one where there is little to read or one core, else one a core. They
    leave when this process does, however it does.
    """

    def __init__(self, layout: Layout, about: About, numbers: Sequence[int], processes: int | None = None) -> None:
        self._layout, self._about, self._prompts = layout, about, Prompts()
        self._numbers = deque(numbers)
        self._read: dict[int, Future[list[Chunk]]] = {}
        n = _processes(layout, numbers) if processes is None else processes
        self._ahead = n + AHEAD
        self._pool = ProcessPoolExecutor(n, get_context("spawn"), _begin, (layout, about)) if n else None

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)

    @property
    def pids(self) -> list[int]:
        """Of the processes that read."""
        return list(self._pool._processes) if self._pool else []

    def chunks(self, number: int) -> Iterable[Chunk]:
        """One file's, ready to be written. UnreadableDashboards says what is wrong with it."""
        if self._pool is None:
            return chunks(read(self._layout, number, self._about, self._prompts))
        return self._from(self._pool, number)

    def _from(self, pool: ProcessPoolExecutor, number: int) -> Iterator[Chunk]:
        try:
            while self._numbers and (number not in self._read or len(self._read) < self._ahead):
                ahead = self._numbers.popleft()
                self._read[ahead] = pool.submit(_chunks, ahead)
            found = self._read.pop(number) if number in self._read else pool.submit(_chunks, number)
            yield from found.result()
        except BrokenProcessPool as error:
            raise ProcessLost(
                f"A process that read {self._layout.folder} was ended, perhaps for want of memory; run the job again, it goes on "
                "where it was."
            ) from error


def _processes(layout: Layout, numbers: Sequence[int]) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores == 1 or layout.size(numbers) < SMALL else min(cores, len(numbers))


# ---- in a process of its own ----


class _Own:
    """What such a process keeps from file to file."""

    layout: Layout
    about: About
    prompts: Prompts


def _begin(layout: Layout, about: About) -> None:
    _Own.layout, _Own.about, _Own.prompts = layout, about, Prompts()
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: int) -> None:
    # A parent that was killed closes nothing that a queue of `multiprocessing` waits for.
    wait([sentinel])
    os._exit(1)


def _chunks(number: int) -> list[Chunk]:
    return list(chunks(read(_Own.layout, number, _Own.about, _Own.prompts)))
