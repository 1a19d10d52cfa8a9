"""What nothing refers to any more: listed with its size and the reason, and given back when asked to.

Nothing goes that a job may still need: a job's files are moved out of its way in the transaction that sees that it has ended,
which a worker or a person who wants to run it again waits for. No torch.
"""

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy.orm import Session

from sae_core.corpus import rows_source
from server.db import Database
from server.jobs import names_taken
from server.keeping.room import size_of
from server.settings import Settings
from server.store import jobs as store
from server.store import registry, stored_harvests, transcoders

DAY = 86_400.0
HALF_WRITTEN = (".aside-*", ".restore-*", "rows/*.part-*", "rows/files.json.*", "jobs/*/*.part-*")
"""What is written aside until it is whole."""
WRITTEN_WITHIN = 3600.0
"""Seconds after which nobody writes to something half written any more."""
PLACE = ".gone-"


@dataclass(frozen=True)
class Garbage:
    """Something that can go."""

    what: str
    why: str
    bytes: int
    path: Path | None = None
    harvest: int | None = None
    """Id of a harvest, where it is rows of the database; its size is not known then."""
    unneeded: Callable[[Session], bool] = field(default=lambda _: True, repr=False, compare=False)
    """Whether it may go, asked once more in the transaction in which it goes."""


def find(settings: Settings, db: Database, *, days: float = 30.0, caches: bool = False) -> list[Garbage]:
    """What can go. Files of failed and cancelled jobs, from which they would be run again, and logs are kept for `days`;
    `caches`: also activation caches that no open job reads, and models converted for models that are not registered any more."""
    with db.read() as session:
        found = [
            *_jobs(settings, session, days),
            *_rows(settings, session),
            *_saes(settings, session),
            *_transcoders(settings, session),
            *_harvests(session, days),
            *_activations(settings, session, caches),
        ]
        if caches:
            found += _models(settings, session)
    found += _half_written(settings)
    found += _logs(settings, db, days)
    return found


def collect(settings: Settings, db: Database, found: list[Garbage]) -> list[Garbage]:
    """Give it back; what went. What has come to be needed since it was listed stays."""
    gone = []
    for garbage in found:
        if garbage.harvest is not None:
            with db.read() as session:
                unneeded = garbage.unneeded(session)
            if unneeded:
                stored_harvests.delete(db, garbage.harvest)
                gone.append(garbage)
        elif garbage.path is not None and _take(settings, db, garbage):
            gone.append(garbage)
    for left in settings.data.glob(f"{PLACE}*"):
        shutil.rmtree(left, ignore_errors=True)
    return gone


def _take(settings: Settings, db: Database, garbage: Garbage) -> bool:
    """Move it away while nobody can begin to need it, then delete it, which may take long."""
    assert garbage.path is not None
    aside = settings.data / f"{PLACE}{uuid.uuid4().hex[:12]}"
    with db.write() as session:
        if not garbage.unneeded(session):
            return False
        try:
            garbage.path.rename(aside)
        except OSError:  # gone meanwhile, or on another disk: the cache folder often is
            aside = garbage.path
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)
    return True


# ---- what there is ----


def _jobs(settings: Settings, session: Session, days: float) -> Iterator[Garbage]:
    for folder in _folders(settings.data / "jobs"):
        name = folder.name
        job = store.find(session, name)
        if job is None:
            yield Garbage(f"jobs/{name}", "there is no such job", size_of(folder), folder, unneeded=_no_job(name))
        elif job.status == store.DONE:
            if _is_over(name)(session):
                yield Garbage(f"jobs/{name}", "the job is done", size_of(folder), folder, unneeded=_is_over(name))
        elif job.ended and job.finished_at is not None and _age(folder) > days * DAY:
            why = f"the job {'failed' if job.status == store.FAILED else 'was cancelled'} and was not run again for {days:g} days"
            yield Garbage(f"jobs/{name}", why, size_of(folder), folder, unneeded=_is_over(name))


def _no_job(name: str) -> Callable[[Session], bool]:
    return lambda session: store.find(session, name) is None


def _is_over(name: str) -> Callable[[Session], bool]:
    """Whether the job has ended, and with it all that follow from it and read its activations."""

    def over(session: Session) -> bool:
        if not store.ended_for_now(session, name):
            return False
        return all(child.ended for child in store.children(session, name))

    return over


def _rows(settings: Settings, session: Session) -> Iterator[Garbage]:
    for folder in _folders(settings.data / "rows"):
        if ".part-" in folder.name:
            continue
        location = rows_source(folder)

        def unneeded(session: Session, location: str | None = location) -> bool:
            return all(corpus.source.location != location for corpus in registry.corpora(session))

        if unneeded(session) and (location is not None or _age(folder) > WRITTEN_WITHIN):
            why = f"no corpus reads {location}" if location else "it is damaged, and is made again when it is needed"
            yield Garbage(f"rows/{folder.name}", why, size_of(folder), folder, unneeded=unneeded)


def _saes(settings: Settings, session: Session) -> Iterator[Garbage]:
    for folder in _folders(settings.data / "saes"):
        place = f"saes/{folder.name}"

        def unneeded(session: Session, place: str = place, name: str = folder.name) -> bool:
            # A worker gives the folder its name before it writes the row; the job is open until then.
            return place not in registry.sae_folders(session) and name not in names_taken(session)

        if unneeded(session):
            yield Garbage(place, "no SAE is kept there", size_of(folder), folder, unneeded=unneeded)


def _transcoders(settings: Settings, session: Session) -> Iterator[Garbage]:
    for file in sorted((settings.data / transcoders.HOME).glob("*")):
        place = f"{transcoders.HOME}/{file.name}"

        def unneeded(session: Session, place: str = place) -> bool:
            return all(one.file != place for one in transcoders.every(session))

        if unneeded(session) and _age(file) > WRITTEN_WITHIN:
            yield Garbage(place, "no transcoder is kept there", size_of(file), file, unneeded=unneeded)


def _harvests(session: Session, days: float) -> Iterator[Garbage]:
    for harvest in stored_harvests.unfinished(session):
        job = harvest.job_id

        def unneeded(session: Session, job: str = job) -> bool:
            return store.find(session, job) is None or store.ended_for_now(session, job)

        old = (time.time() - harvest.created_at.timestamp()) > days * DAY
        if unneeded(session) and (old or store.find(session, job) is None):
            why = f"it was never finished, and its job {job} is not run any more"
            yield Garbage(f"harvest {harvest.id} of {harvest.sae}", why, 0, harvest=harvest.id, unneeded=unneeded)


def _activations(settings: Settings, session: Session, caches: bool) -> Iterator[Garbage]:
    for folder in _folders(settings.data / "activations"):
        name = folder.name
        if caches:
            needed, why = _reads_cache(name, only_open=True), "no open job reads it"
        else:
            needed, why = _reads_cache(name, only_open=False), "no job has ever read it"

        def unneeded(session: Session, needed: Callable[[Session], bool] = needed) -> bool:
            return not needed(session)

        if unneeded(session) and _age(folder) > WRITTEN_WITHIN:
            yield Garbage(f"activations/{name}", why, size_of(folder), folder, unneeded=unneeded)


def _reads_cache(name: str, *, only_open: bool) -> Callable[[Session], bool]:
    def reads(session: Session) -> bool:
        jobs = store.all_open(session) if only_open else store.of_status(session, (*store.OPEN, *store.ENDED))
        return any(name in (job.config.get("cache"), job.config.get("base", {}).get("cache")) for job in jobs)

    return reads


def _models(settings: Settings, session: Session) -> Iterator[Garbage]:
    known = {(model.fingerprint or "").removeprefix("gguf:") for model in registry.models(session)}
    for folder in _folders(settings.cache / "models"):
        if folder.name not in known and _age(folder) > WRITTEN_WITHIN:
            yield Garbage(f"cache: models/{folder.name[:12]}", "no registered model was converted to it", size_of(folder), folder)


def _half_written(settings: Settings) -> Iterator[Garbage]:
    for pattern in (*HALF_WRITTEN, f"{PLACE}*"):
        for path in sorted(settings.data.glob(pattern)):
            if _age(path) > WRITTEN_WITHIN:
                yield Garbage(str(path.relative_to(settings.data)), "it was never finished", size_of(path), path)


def _logs(settings: Settings, db: Database, days: float) -> Iterator[Garbage]:
    with db.read() as session:
        alive = {f"{worker.id}.log" for worker in store.workers(session)}
    for path in sorted((settings.data / "logs").rglob("*")):
        if path.is_file() and path.name not in alive and _age(path) > days * DAY:
            yield Garbage(
                str(path.relative_to(settings.data)), f"nothing was written to it for {days:g} days", size_of(path), path
            )


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.glob("*") if path.is_dir() and not path.name.startswith("."))


def _age(path: Path) -> float:
    """Seconds since something in it was last written."""
    newest = 0.0
    for inner in (path, *path.rglob("*")):
        with suppress(OSError):
            newest = max(newest, inner.lstat().st_mtime)
    return time.time() - newest
