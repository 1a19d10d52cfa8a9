"""A document taken out of a corpus: out of every harvest, of what is searched, of rows and activations on disk, of what people
quoted; and left out of all that is cut from the corpus later. No torch."""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from sae_core.config import CorpusSource
from sae_core.corpus import document_hash, documents, rows_of
from sae_core.errors import UnknownCorpus, UnreadableCorpus, UsageError
from server.db import Database, sqlite_path
from server.jobs import Jobs
from server.keeping.room import size_of
from server.settings import Settings
from server.store import jobs as store
from server.store import removals
from server.store.redact import Matcher

LEAST_HASH = 8


@dataclass(frozen=True)
class Found:
    """Documents that are to go, and where their text is."""

    corpora: tuple[str, ...]
    """By every name that the text is registered by."""
    texts: tuple[str, ...]
    held: removals.Held
    folders: tuple[Path, ...]
    """Rows, activations and jobs' files that were made of it; what is needed of them is made anew."""
    bytes: int

    @property
    def hashes(self) -> tuple[str, ...]:
        """What the documents are known by, their text being gone."""
        return tuple(map(document_hash, self.texts))


def search(source: CorpusSource, *, text: str | None = None, digest: str | None = None, index: int | None = None) -> list[str]:
    """The corpus's documents that are this text or hold it, have this hash (or its first characters), or this place; a text that
    the corpus does not hold any more stands for itself. UsageError where no document is meant."""
    if digest is not None and (len(digest) < LEAST_HASH or not set(digest) <= set("0123456789abcdef")):
        raise UsageError(f"A hash is at least {LEAST_HASH} of the digits 0-9 and a-f of a document's SHA-256.", field="hash")
    if text is not None and not text.strip():
        raise UsageError("The text is empty.", field="text")
    found: list[str] = []
    try:
        for document in documents(source):
            if (
                (index is not None and document.index == index)
                or (digest is not None and document_hash(document.text).startswith(digest))
                or (text is not None and text.strip() in document.text)
            ):
                found.append(document.text)
                if index is not None:
                    break
    except (UnknownCorpus, UnreadableCorpus):
        if text is None:
            raise
    if not found and text is not None:
        return [text]
    if not found:
        raise UsageError(f"{source.location} holds no such document; give its text instead, if it is gone there.", field="id")
    return list(dict.fromkeys(found))


def find(settings: Settings, db: Database, corpus: str, texts: list[str]) -> Found:
    """Where the documents' text is; nothing is changed."""
    with db.read() as session:
        corpora = removals.same_text(session, corpus)
    held = removals.look(db, corpora, Matcher(texts), take_out=False)
    folders = tuple(_folders(settings, db, [one.name for one in corpora], [one.source for one in corpora]))
    return Found(tuple(one.name for one in corpora), tuple(texts), held, folders, sum(map(size_of, folders)))


def remove(settings: Settings, db: Database, found: Found) -> removals.Held:
    """Take them out. Broken off, it is to be called again. JobError while a job has begun that reads the corpus."""
    with db.read() as session:
        corpora = removals.same_text(session, found.corpora[0])
    removals.forget(db, corpora, found.hashes)
    for folder in _folders(settings, db, [one.name for one in corpora], [one.source for one in corpora]):
        shutil.rmtree(folder, ignore_errors=True)
    _forget_steps(settings, db, found.corpora)
    held = removals.look(db, corpora, Matcher(found.texts), take_out=True)
    removals.scrub(db)
    if (queue := sqlite_path(sa.make_url(settings.jobs_url))) is not None:
        with closing(sqlite3.connect(queue, timeout=30, isolation_level=None)) as connection:
            connection.execute("vacuum")
            connection.execute("pragma wal_checkpoint(truncate)")
    return held


def _folders(settings: Settings, db: Database, names: list[str], sources: list[CorpusSource]) -> Iterator[Path]:
    """What was made of the corpora's text: rows, activations of jobs and with names, the files of jobs that have ended."""
    yield from (folder for source in sources for folder in rows_of(source, settings.data / "rows"))
    with db.read() as session:
        found = removals.jobs_of(session, names)
    places = [settings.data / "jobs" / job for job, _, _, _ in found]
    places += [settings.data / "activations" / name for name in dict.fromkeys(cache for _, _, cache, _ in found) if name]
    yield from (place for place in places if place.is_dir())


def _forget_steps(settings: Settings, db: Database, corpora: tuple[str, ...]) -> None:
    """What the queue remembers of steps that jobs have done may hold text: a study's step is what it found."""
    queue = Jobs(settings, db)
    try:
        with db.read() as session:
            ended = [job for job, status, _, _ in removals.jobs_of(session, corpora) if status in store.ENDED]
        for job in ended:
            with suppress(LookupError):
                queue.client.delete_workflow(job)
    finally:
        queue.close()
