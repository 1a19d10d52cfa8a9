"""How often somebody may ask: a sliding window for each, in the memory of one process, of bounded size."""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from sae_core.errors import TooOften

MOST = 10_000
"""Askers that are remembered; of more, those who asked longest ago are forgotten."""


class Limit:
    """At most `times` in `seconds` for each asker."""

    def __init__(self, times: int, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._times, self._seconds, self._clock = times, seconds, clock
        self._asked: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, asker: str, what: str) -> None:
        """Count one more; TooOften, which says how long to wait, and not counted, where it is one too many."""
        with self._lock:
            now = self._clock()
            asked = self._asked.setdefault(asker, deque())
            self._asked.move_to_end(asker)
            if len(self._asked) > MOST:
                self._asked.popitem(last=False)
            while asked and asked[0] <= now - self._seconds:
                asked.popleft()
            if len(asked) >= self._times:
                wait = max(1, round(asked[0] + self._seconds - now))
                raise TooOften(f"That is {what} too often: at most {self._times} in {self._seconds:g} s. Wait {wait} s.", wait)
            asked.append(now)

    def forget(self, asker: str) -> None:
        """Begin anew for an asker."""
        with self._lock:
            self._asked.pop(asker, None)
