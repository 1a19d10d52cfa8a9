"""Several processes on one socket, forked from one that has loaded everything, so that they share its memory. No torch."""

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

PATIENCE = 10.0
"""Seconds that a process has to end what it is answering; uvicorn itself waits for less."""
SHORTEST = 1.0
"""Seconds between two starts of a process that dies, so that one which cannot live does not take a core."""


def keep(n: int, work: Callable[[], None]) -> None:
    """Run `work` in `n` processes until SIGTERM or SIGINT, which each of them gets too; one that dies is started again."""
    stopping = False

    def stop(number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True
        for pid in running:
            _send(pid, number)

    running: dict[int, float] = {}
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    while not stopping:
        while len(running) < n and not stopping:
            running[_fork(work, before)] = time.monotonic()
        pid, _ = os.waitpid(-1, 0)  # a signal interrupts it only to be handled
        begun = running.pop(pid, 0.0)
        if not stopping:
            time.sleep(max(0.0, begun + SHORTEST - time.monotonic()))
    _end(running)


def _fork(work: Callable[[], None], before: Mapping[signal.Signals, object]) -> int:
    parent, pid = os.getpid(), os.fork()
    if pid:
        return pid
    status = 1
    try:
        threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() itself gave
        work()
        status = 0
    finally:
        os._exit(status)  # not the parent's way out, whose cleaning up is not ours


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SHORTEST)
    os.kill(os.getpid(), signal.SIGTERM)


def _end(running: dict[int, float]) -> None:
    deadline = time.monotonic() + PATIENCE
    while running:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        running.pop(pid, None)
        if not pid and time.monotonic() > deadline:
            for left in running:
                _send(left, signal.SIGKILL)
            deadline += PATIENCE
        time.sleep(0.02)


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
