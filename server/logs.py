"""What every process says while it runs, as text or as lines of JSON, with the request or the job that it is about. No torch.

What people type must never get here. So a request's line names its route and path and not its query, the database's errors do not
show their parameters (`db.make_engine`), and whatever looks like a key, a token or an address with a password is struck out last.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path

from server.settings import Settings

REQUEST_HEADER = "X-Request-ID"
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
job_id: ContextVar[str | None] = ContextVar("job_id", default=None)

requests = logging.getLogger("headscope.requests")
"""A line for each request."""
OURS = ("headscope", "server", "sae_core")
SECRETS = (
    (re.compile(r"headscope_[\w-]{20,}"), "headscope_[struck out]"),
    (re.compile(r"(?i)\b(authorization|x-api-key|x-headscope-secret|cookie|set-cookie)(['\"]?\s*[:=]\s*['\"]?)[^\r\n'\"]+"),
     r"\1\2[struck out]"),
    (re.compile(r"(?i)\b(token|password|secret|code|id_token|client_secret)=[^\s&'\"]+"), r"\1=[struck out]"),
    (re.compile(r"(\w://[^\s/:@]*):[^\s/@]+@"), r"\1:[struck out]@"),
    (re.compile(r"(?m)^(\s*DETAIL: ).*$"), r"\1[struck out]"),  # PostgreSQL's, which shows values of a row
    (re.compile(r"(?s)\binput_value=.*?(, input_type=)"), r"input_value=[struck out]\1"),  # pydantic's
)  # fmt: skip


def begin(settings: Settings, process: str) -> None:
    """Send what this process says to its error output, in the form that the settings ask for.

    Text says what is wrong; JSON also says what happens, since machines read it.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(form(settings, process))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO if settings.log_format == "json" else logging.WARNING)
    dbos = logging.getLogger("dbos")  # does not hand its messages on, see `jobs.quiet`
    dbos.handlers = [handler]


def to_file(settings: Settings, path: Path) -> Callable[[], None]:
    """What a worker says goes to a file of its own as well: what happens, in text as in JSON. What this gives ends it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _File(path)
    handler.setFormatter(form(settings, "worker"))
    loggers = [logging.getLogger(name) for name in ("headscope", "dbos")]
    for logger, level in zip(loggers, (logging.INFO, logging.WARNING), strict=True):
        logger.addHandler(handler)
        logger.setLevel(level)
    for other in logging.getLogger().handlers:  # the file's lines of what happens are not for a terminal
        other.setLevel(logging.INFO if settings.log_format == "json" else logging.WARNING)

    def end() -> None:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()

    return end


class _File(logging.FileHandler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # its folder is gone, or the disk: that must not end what was to be told of
            self.handleError(record)


def form(settings: Settings, process: str) -> logging.Formatter:
    """How a line is written."""
    return JsonLines(process) if settings.log_format == "json" else Lines()


@contextmanager
def about_job(job: str) -> Iterator[None]:
    """Everything said meanwhile is about this job."""
    before = job_id.set(job)
    try:
        yield
    finally:
        job_id.reset(before)


def accepted(given: str | None) -> str:
    """The request's id as somebody before us gave it, if it can stand in a header and a log; else a new one."""
    return given if given and re.fullmatch(r"[\w.:/=+-]{1,100}", given, re.ASCII) else os.urandom(8).hex()


def struck(text: str) -> str:
    """`text` without what looks like a secret."""
    for shape, instead in SECRETS:
        text = shape.sub(instead, text)
    return text


class Lines(logging.Formatter):
    """For people: time, level, who says it, and in brackets the request and the job."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """A line, and a traceback below it."""
        ids = [f"{name} {one}" for name, one in (("request", request_id.get()), ("job", job_id.get())) if one]
        first, *rest = struck(super().format(record)).splitlines() or [""]
        return "\n".join([f"{first} [{', '.join(ids)}]" if ids else first, *rest])


class JsonLines(logging.Formatter):
    """For machines: an object in a line. What a message is about has fields of its own (`extra={"about": {...}}`)."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The object."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": at, "level": record.levelname.lower(), "process": self._process, "pid": os.getpid(),
            "logger": record.name, "message": struck(record.getMessage()), "request": request_id.get(), "job": job_id.get(),
        }  # fmt: skip
        if record.exc_info:
            line["exception"] = struck(self.formatException(record.exc_info))
        line.update(getattr(record, "about", {}))
        return json.dumps({name: value for name, value in line.items() if value is not None}, ensure_ascii=False, default=str)
