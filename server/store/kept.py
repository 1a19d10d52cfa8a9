"""Answers about published harvests, kept in memory: such a harvest does not change, so an answer holds as long as it is shown."""

from collections.abc import Callable
from datetime import datetime
from typing import Protocol, TypeVar, cast

from sqlalchemy.orm import Session

T = TypeVar("T")

MOST = 10_000
"""Answers held; beyond, all are forgotten."""


class Published(Protocol):
    """A harvest as readers see it."""

    @property
    def id(self) -> int: ...
    @property
    def published_at(self) -> datetime | None: ...


def kept(session: Session, harvest: Published, question: str, ask: Callable[[], T]) -> T:
    """What `ask` answers to `question` about `harvest`, asked once by this process."""
    # A deleted harvest's id may be given to another one, of another time.
    key = (str(session.get_bind().engine.url), harvest.id, harvest.published_at, question)
    if key not in _answers:
        answer = ask()
        if len(_answers) >= MOST:
            _answers.clear()
        _answers[key] = answer
        return answer
    return cast(T, _answers[key])


_answers: dict[tuple[str, int, datetime | None, str], object] = {}
