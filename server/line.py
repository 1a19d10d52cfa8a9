"""The engine's line: questions are answered one at a time, in the order in which they came. No torch.

A question that comes with a ticket need not be waited for: its place can be asked for, it can be cancelled, and its answer is
kept for a moment. One whose asker has stopped asking is dropped, so that a closed page holds nobody up.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sae_core.errors import Cancelled, EngineBusy, NotFound

T = TypeVar("T")

MOST = 32
"""Questions in the line; one more is refused."""
PATIENCE = 30.0
"""Seconds without a look after which a question is dropped, and an answer forgotten."""


@dataclass(eq=False)
class _Asked:
    ticket: str | None
    future: Any = None
    stopped: threading.Event = field(default_factory=threading.Event)
    seen: float = field(default_factory=time.monotonic)


class Line:
    """One thread that answers, and who waits for it."""

    def __init__(self, most: int = MOST, patience: float = PATIENCE) -> None:
        self._most, self._patience = most, patience
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._lock = threading.Lock()
        self._line: list[_Asked] = []  # not yet answered, the one under way first
        self._by_ticket: dict[str, _Asked] = {}
        self._now: _Asked | None = None

    def ask(self, work: Callable[[], T]) -> T:
        """What `work` gives, when its turn has come. Raises as it does; EngineBusy where too many wait."""
        found: T = self._enter(work, None).future.result()
        return found

    def leave(self, ticket: str, work: Callable[[], Any]) -> None:
        """Put a question in the line, to be looked for by its ticket; one that is there already is not put there twice."""
        with self._lock:
            known = ticket in self._by_ticket
        if not known:
            self._enter(work, ticket)

    def look(self, ticket: str, wait: float) -> tuple[int | None, Any]:
        """(how many are before it, None) while it waits, 0 when it is being answered; (None, answer) once there is one.

        Waits for up to so many seconds. Raises as the question's work did, Cancelled for one that was, NotFound for a ticket that
        nobody has, or has no longer.
        """
        asked = self._of(ticket)
        try:
            answer = asked.future.result(wait)
        except NotYet:
            return self._place(asked), None
        except CancelledError:
            self._forget(asked)
            raise Cancelled("The question was cancelled.") from None
        except Exception:
            self._forget(asked)
            raise
        return None, answer

    def cancel(self, ticket: str) -> None:
        """Take a question out of the line; one under way ends at its next step. NotFound as `look`."""
        asked = self._of(ticket)
        asked.stopped.set()
        if asked.future.cancel():
            self._leave(asked)
        self._forget(asked)

    def check(self) -> None:
        """For work to call between its steps: raises Cancelled when it was."""
        if self._now is not None and self._now.stopped.is_set():
            raise Cancelled("The question was cancelled.")

    @property
    def length(self) -> int:
        """Questions that wait or are being answered."""
        with self._lock:
            return len(self._line)

    def sweep(self) -> None:
        """Drop what nobody has asked for in a while."""
        now = time.monotonic()
        with self._lock:
            left = [one for one in self._by_ticket.values() if now - one.seen > self._patience]
        for one in left:
            one.stopped.set()
            if one.future.cancel():
                self._leave(one)
            self._forget(one)

    def close(self) -> None:
        """Answer nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _enter(self, work: Callable[[], Any], ticket: str | None) -> _Asked:
        self.sweep()
        asked = _Asked(ticket)

        def answer() -> Any:
            self._now = asked
            try:
                self.check()
                return work()
            finally:
                self._now = None
                self._leave(asked)

        with self._lock:
            if len(self._line) >= self._most:
                raise EngineBusy(f"{len(self._line)} questions wait for the engine already; try again in a moment.")
            self._line.append(asked)
            if ticket is not None:
                self._by_ticket[ticket] = asked
            asked.future = self._thread.submit(answer)
        return asked

    def _of(self, ticket: str) -> _Asked:
        with self._lock:
            asked = self._by_ticket.get(ticket)
            if asked is None:
                raise NotFound("The engine knows no question of that ticket: it was answered, cancelled or dropped; ask again.")
            asked.seen = time.monotonic()
            return asked

    def _place(self, asked: _Asked) -> int:
        with self._lock:
            return self._line.index(asked) if asked in self._line else 0

    def _leave(self, asked: _Asked) -> None:
        with self._lock:
            if asked in self._line:
                self._line.remove(asked)

    def _forget(self, asked: _Asked) -> None:
        with self._lock:
            if asked.ticket is not None and self._by_ticket.get(asked.ticket) is asked:
                del self._by_ticket[asked.ticket]
