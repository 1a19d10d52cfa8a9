"""Documents that were removed from a corpus: which they were, by hash, and their text taken out of everything that is stored."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.errors import JobError
from server.db import Database
from server.packing import I4, pack, unpack
from server.store import registry, search
from server.store.accounts import record
from server.store.jobs import OPEN, QUEUED
from server.store.redact import REMOVED, Matcher
from server.tables import (
    SAE,
    Context,
    Corpus,
    Example,
    FeatureList,
    Harvest,
    Job,
    JobLog,
    Label,
    ListEntry,
    Note,
    Rating,
    RemovedDocument,
    Study,
)

AT_ONCE = 200
WRITTEN: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (Label, ("text",)), (Note, ("text",)), (FeatureList, ("name", "description")), (ListEntry, ("note",)),
    (Rating, ("label", "note")),
    (SAE, ("description",)), (Harvest, ("name", "description")), (Job, ("title", "error")), (JobLog, ("text",)),
)  # fmt: skip
"""What people and jobs wrote, which may quote a document."""


@dataclass
class Held:
    """Where text of the documents is."""

    contexts: int = 0
    examples: int = 0
    """That lie in those contexts; they stay, with their numbers."""
    studies: int = 0
    written: int = 0
    """Labels, notes and the like that quote it."""


def hashes(session: Session, corpus: str) -> frozenset[str]:
    """Of the documents that rows of a corpus are cut without."""
    of = sa.select(RemovedDocument.digest).join(Corpus, Corpus.id == RemovedDocument.corpus_id).where(Corpus.name == corpus)
    return frozenset(session.scalars(of))


def same_text(session: Session, corpus: str) -> list[registry.CorpusRecord]:
    """The corpora that read the same place as this one does, itself included."""
    asked = registry.corpus(session, corpus)
    return [other for other in registry.corpora(session) if other.source.location == asked.source.location]


def jobs_of(session: Session, corpora: Sequence[str]) -> list[tuple[str, str, str | None, int]]:
    """(id, status, activation cache, attempt) of every job that reads one of the corpora."""
    found = session.execute(sa.select(Job.id, Job.status, Job.config, Job.attempt).order_by(Job.created_at))
    return [
        (row.id, row.status, config.get("cache"), row.attempt)
        for row in found
        if (config := {**row.config, **row.config.get("base", {})}).get("corpus") in corpora
    ]


def forget(db: Database, corpora: Sequence[registry.CorpusRecord], digests: Sequence[str]) -> None:
    """Leave the documents out of all rows that are cut from now on. JobError while a job has begun that reads the corpora."""
    names = [corpus.name for corpus in corpora]
    with db.write() as session:
        begun = [job for job, status, _, attempt in jobs_of(session, names) if status in OPEN and (status != QUEUED or attempt)]
        if begun:
            raise JobError(
                f"The job {begun[0]} reads {names[0]} and has begun; wait for its end or cancel it first, so that nothing that "
                "it holds is written afterwards."
            )
        for corpus in corpora:
            there = set(session.scalars(sa.select(RemovedDocument.digest).where(RemovedDocument.corpus_id == corpus.id)))
            session.add_all(RemovedDocument(corpus_id=corpus.id, digest=new) for new in digests if new not in there)
        record(session, "corpus remove-document", names[0], documents=list(digests))


def look(db: Database, corpora: Sequence[registry.CorpusRecord], matcher: Matcher, *, take_out: bool) -> Held:
    """Find the documents' text in what is stored, and take it out if asked to. Counts stay as they were measured."""
    held, harvests = Held(), set[int]()
    for changed in _contexts(db, [corpus.id for corpus in corpora], matcher):
        ids = [row.id for row, _ in changed]
        with db.write() if take_out else db.read() as session:
            held.contexts += len(ids)
            examples = sa.select(sa.func.count(Example.id)).where(Example.context_id.in_(ids))
            held.examples += session.scalar(examples) or 0
            if take_out:
                _rewrite(session, changed)
                harvests.update(row.harvest_id for row, _ in changed)
    _tokens_anew(db, harvests)
    with db.write() if take_out else db.read() as session:
        held.studies = _each(session, Study, ("result", "title"), matcher.json, take_out)
        held.written = sum(_each(session, table, names, matcher.json, take_out) for table, names in WRITTEN)
        if take_out:
            session.execute(sa.update(SAE).values(revision=SAE.revision + 1))  # no browser takes its old page for the newest
    return held


def _contexts(db: Database, corpora: Sequence[int], matcher: Matcher) -> Iterator[list[tuple[Any, list[str]]]]:
    """Rows with text of the documents, and their texts without it."""
    last = 0
    while True:
        of = sa.select(Context.id, Context.harvest_id, Context.tokens, Context.texts).join(Harvest).where(Context.id > last)
        with db.read() as session:
            part = session.execute(of.where(Harvest.corpus_id.in_(corpora)).order_by(Context.id).limit(AT_ONCE)).all()
        if not part:
            return
        last = part[-1].id
        kept = [(row, matcher.tokens(row.texts, packed=bool(row.tokens))) for row in part]
        if changed := [(row, texts) for row, texts in kept if texts != row.texts]:
            yield changed


def _rewrite(session: Session, changed: Sequence[tuple[Any, list[str]]]) -> None:
    search.delete_texts(session, [row.id for row, _ in changed])
    for row, texts in changed:
        tokens = row.tokens
        if tokens:
            ids = unpack(tokens, I4).copy()
            # The row start, which says nothing, stands for what was there.
            ids[[i for i, text in enumerate(texts[: len(ids)]) if text == REMOVED]] = ids[0]
            tokens = pack(ids, I4)
        session.execute(sa.update(Context).where(Context.id == row.id).values(texts=texts, tokens=tokens))
        search.index_text(session, row.harvest_id, row.id, texts)


def _tokens_anew(db: Database, harvests: set[int]) -> None:
    """Find anew on which tokens the features fire: some did in what is gone."""
    with db.read() as session:
        searched = [one for one in sorted(harvests) if search.is_searched(session, one)]
    for harvest_id in searched:
        with db.write() as session:
            search.forget_tokens(session, harvest_id)
        search.write(db, harvest_id, search.unfenced)
    if searched:
        with db.write() as session:
            search.drop_unused_tokens(session)


def _each(session: Session, table: Any, names: Sequence[str], redacted: Callable[[Any], Any], take_out: bool) -> int:
    """Rows of a table in whose columns `names` something was found."""
    n = 0
    for row in session.scalars(sa.select(table).execution_options(yield_per=AT_ONCE)):
        new = {name: redacted(getattr(row, name)) for name in names}
        if any(new[name] != getattr(row, name) for name in names):
            n += 1
            if take_out:
                for name, value in new.items():
                    setattr(row, name, value)
    return n


def scrub(db: Database) -> None:
    """See that the files of the database hold nothing of what was taken out: SQLite is written anew, of PostgreSQL the tables
    that held it."""
    sqlite = db.url.get_backend_name() == "sqlite"
    with db.engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        if sqlite:
            driver.execute("insert into context_text (context_text) values ('optimize')")
            driver.execute("vacuum")
            busy, _, _ = driver.execute("pragma wal_checkpoint(truncate)").fetchone()
            if busy:
                raise JobError(
                    "The text is taken out, but the database's journal still holds it while something reads; stop the web and "
                    "run this again."
                )
        else:
            connection.rollback()
            driver.autocommit = True
            try:
                for name in ("context", "context_text", "study", *(table.__tablename__ for table, _ in WRITTEN)):
                    driver.execute(f"vacuum (full) {name}")
                driver.execute("vacuum (full) dbos.operation_outputs")
            finally:
                driver.autocommit = False
