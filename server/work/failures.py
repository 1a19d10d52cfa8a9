"""Why a run ends without being done: what is raised, what may pass by itself, and what a person reads."""

import traceback
from pathlib import Path

import sqlalchemy as sa
import torch
from dbos import PortableWorkflowError

from sae_core.errors import CacheBusy, DatabaseAway, DiskFull, DownloadFailed, EngineAway, HeadscopeError, ProcessLost
from server.settings import Settings

NO_ROOM = (27, 28, 122)  # EFBIG, ENOSPC, EDQUOT

PASSING = (DatabaseAway, EngineAway, DownloadFailed, CacheBusy, ProcessLost, ConnectionError, TimeoutError)
"""Failures that may be gone when the job is tried again; all others are of what was asked for, or need somebody's hand."""


class Broken(BaseException):
    """Raised from outside into a step that does not notice that it must end."""


class Leave(BaseException):
    """Stop working at a job here without ending it. Not an `Exception`, so that DBOS records no outcome."""


class Failed(Exception):
    """The job has been marked as failed; DBOS may record the step as such."""


def may_pass(error: Exception) -> bool:
    """Whether it may go well when it is tried again, though nobody does anything."""
    if isinstance(error, sa.exc.DBAPIError):
        return isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError) and "disk is full" not in str(error)
    return isinstance(error, PASSING)


def sentence(error: Exception, settings: Settings, log_path: Path) -> str:
    """What a person reads about `error`."""
    if isinstance(error, HeadscopeError):
        return str(error)
    if isinstance(error, PortableWorkflowError):
        return str(error.message)
    if (isinstance(error, OSError) and error.errno in NO_ROOM) or "disk is full" in str(error):
        return str(no_room(settings))
    if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError):
        return f"The database did not answer ({str(error.orig).strip().splitlines()[0][:200]})."
    if isinstance(error, torch.OutOfMemoryError):
        return "The device ran out of memory; lower `collect_rows`, `batch` or `batch_rows`, or choose another device."
    first = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    return f"It stopped with an error that is not foreseen ({first[:300]}); see the worker's log, {log_path}."


def no_room(settings: Settings) -> DiskFull:
    """The disk is full."""
    return DiskFull(f"No room is left in {settings.data}; free some space there, then run the job again.")
