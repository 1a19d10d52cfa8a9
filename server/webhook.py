"""Tells an address of the operator's choosing that a job has ended. No torch.

It is a courtesy: it takes a bounded time, is tried twice, and whatever comes of it is a line in the log. A job never fails for
it. Who must not miss an end asks `/api/v1/jobs`.
"""

import logging
import threading
from urllib.parse import quote, urlsplit

import httpx

from server.settings import Settings
from server.store.jobs import JobRecord

log = logging.getLogger("headscope.webhook")

TRIES = 2
SECONDS = 5.0
"""For one try."""
LONGEST = 15.0
"""For all of it; an address that drips its answer is left alone then."""


def announce(settings: Settings, job: JobRecord) -> None:
    """POST what became of `job` to the settings' webhook, if there is one."""
    if settings.webhook is None:
        return
    telling = threading.Thread(target=_tell, args=(settings.webhook, said_of(settings, job)), name="webhook", daemon=True)
    telling.start()
    telling.join(LONGEST)
    if telling.is_alive():
        log.warning("%s was not told of %s within %.0f s", _host(settings.webhook), job.id, LONGEST)


def said_of(settings: Settings, job: JobRecord) -> dict[str, str | None]:
    """What is sent."""
    return {
        "id": job.id,
        "kind": job.kind,
        "title": job.title,
        "status": job.status,
        "error": job.error,
        "finished_at": job.finished_at.isoformat() if job.finished_at else None,
        "address": f"{settings.address}/jobs/{quote(job.id)}",
    }


def _tell(address: str, said: dict[str, str | None]) -> None:
    for attempt in range(TRIES):
        try:
            # Only the status matters: the answer is not read, and a redirect is not followed to where nobody chose.
            with httpx.stream("POST", address, json=said, timeout=SECONDS, follow_redirects=False) as answer:
                if answer.is_success:
                    return
                trouble = f"it answers {answer.status_code}"
        except httpx.HTTPError as error:
            trouble = type(error).__name__
        log.warning("%s was not told of %s (try %d of %d): %s", _host(address), said["id"], attempt + 1, TRIES, trouble)


def _host(address: str) -> str:
    """What may stand in a log: the rest of an address often holds a secret."""
    return urlsplit(address).hostname or "the webhook"
