"""What a long computation says while it runs. No torch, so that the web may read it."""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TypeVar

S = TypeVar("S")
R = TypeVar("R")


@dataclass(frozen=True)
class Progress:
    """One report of a generator such as `train()`; the caller stores it, shows it or drops it."""

    phase: str
    """What is being done now, as a person would say it: `collect`, `train`, `evaluate`, `scan`, `visit`."""
    done: int
    """How much of this phase is done, in `unit`."""
    total: int
    """How much there is, in `unit`."""
    unit: str = "tokens"
    """`tokens`, `rows` or `bytes`."""
    rate: float = 0.0
    """Units per second, over the last few seconds; 0 while unknown."""
    values: dict[str, float] = field(default_factory=dict)
    """What to plot at `step`, by name: `loss`, `fvu`, `l0`, `dead`, `threshold`; of a scan `firings` and `live` so far."""
    step: int | None = None
    """The training step that `values` belong to; None where there is no curve."""
    run: int | None = None
    """Which of several training runs on one stream this belongs to, counted from 0; None where there is but one."""
    note: str | None = None
    """Something that a person should read in the job's log."""

    @property
    def seconds_left(self) -> float | None:
        """Seconds until this phase ends at the present rate; None while the rate is unknown."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None


def relayed(reports: Generator[S, None, R], tell: Callable[[S], Progress]) -> Generator[Progress, None, R]:
    """`reports`, each told in another way; what it returns is returned, and it is closed when this is."""
    try:
        while True:
            yield tell(next(reports))
    except StopIteration as end:
        value: R = end.value
        return value
    finally:
        reports.close()


class Clock:
    """Makes the reports of a phase, with a rate over what was done since it began."""

    def __init__(self, phase: str, total: int, unit: str = "tokens") -> None:
        self.phase, self.total, self.unit, self.begun = phase, total, unit, time.monotonic()

    def at(self, done: int) -> Progress:
        """The report that so much is done."""
        return Progress(self.phase, done, self.total, self.unit, rate=done / max(time.monotonic() - self.begun, 1e-9))
