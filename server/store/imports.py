"""Writing dashboards that others made as a harvest: file by file, each once however often it is read.

What they lack is not there: an example without DFA has an empty `dfa`, and DFA by source with its heads summed is stored as that
of one head. Texts come as token strings, so contexts have no token ids.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.records import FeatureRecord
from server.db import Database
from server.store.chunks import cut
from server.store.foreign import EXAMPLES_AT_ONCE, Chunk, text_key
from server.store.harvests import Fence, insert_examples, insert_features, write_chunks, write_heads
from server.store.labels import touch
from server.store.people import LONGEST_LABEL
from server.tables import Context, Feature, Harvest, HarvestPart, Label

NAME = 60
"""Characters of an author or a method."""


@dataclass
class Texts:
    """Contexts of a harvest by their text, so that one that many features share is stored once."""

    ids: dict[bytes, int] = field(default_factory=dict)
    rows: int = 0
    """How many are stored."""

    @classmethod
    def of(cls, db: Database, harvest_id: int) -> "Texts":
        """Those that are stored already."""
        found, last = cls(), 0
        while True:
            with db.read() as session:
                some = session.execute(
                    sa.select(Context.id, Context.texts)
                    .where(Context.harvest_id == harvest_id, Context.id > last)
                    .order_by(Context.id)
                    .limit(EXAMPLES_AT_ONCE)
                ).all()
            if not some:
                return found
            found.ids.update({text_key(texts): id for id, texts in some})
            found.rows += len(some)
            last = some[-1].id


def note_source(db: Database, harvest_id: int, source: dict[str, Any], fence: Fence) -> None:
    """Say of a harvest that it was not made here, and what it lacks."""
    with db.write() as session:
        fence(session)
        session.get_one(Harvest, harvest_id).source = source


def write_file(
    db: Database, harvest_id: int, sae_id: int, number: int, chunks: Iterable[Chunk], texts: Texts, fence: Fence
) -> None:
    """Store one file's features, examples and labels."""

    def insert(session: Session, harvest_id: int, one: list[Chunk]) -> None:
        (chunk,) = one
        insert_features(session, harvest_id, chunk.records)
        indices = [record.idx for record in chunk.records]
        stored = sa.select(Feature.idx, Feature.id).where(Feature.harvest_id == harvest_id, Feature.idx.in_(indices))
        ids = {row.idx: row.id for row in session.execute(stored)}
        _insert_texts(session, harvest_id, chunk, texts)
        of_text = texts.ids
        insert_examples(
            session,
            [
                (ids[idx], of_text[key], band, rank, dest, 0, act, acts, dfa)
                for idx, key, band, rank, dest, act, acts, dfa in chunk.examples
            ],
        )
        _insert_labels(session, sae_id, chunk)

    write_chunks(db, harvest_id, _part(number), ([chunk] for chunk in chunks), insert, fence)


def unwritten(db: Database, harvest_id: int, numbers: Sequence[int]) -> list[int]:
    """The files that are not stored yet, or not to their end."""
    with db.read() as session:
        done = set(session.scalars(sa.select(HarvestPart.part).where(HarvestPart.harvest_id == harvest_id)))
    return [number for number in numbers if _part(number) not in done]


def _part(number: int) -> str:
    return f"part {number}"


def write_dead(db: Database, harvest_id: int, features: Iterable[FeatureRecord], fence: Fence) -> None:
    """Store the features that the files say are dead, after all files; and that there is nothing to say of heads."""
    runs = cut(features, lambda _: 1, EXAMPLES_AT_ONCE)
    write_chunks(db, harvest_id, "features", runs, lambda session, id, chunk: insert_features(session, id, chunk), fence)
    write_heads(db, harvest_id, [], fence)


def count_up(db: Database, harvest_id: int, fence: Fence) -> None:
    """Put what the files came to into the harvest's totals."""
    with db.write() as session:
        fence(session)
        harvest = session.get_one(Harvest, harvest_id)
        live = sa.select(sa.func.count()).where(Feature.harvest_id == harvest_id, Feature.n_fired > 0)
        rows = sa.select(sa.func.count()).where(Context.harvest_id == harvest_id)
        harvest.n_live, harvest.n_rows = session.scalar(live) or 0, session.scalar(rows) or 0


def _insert_texts(session: Session, harvest_id: int, chunk: Chunk, texts: Texts) -> None:
    new = [(key, words) for key, words in chunk.texts.items() if key not in texts.ids]
    if new:
        rows = [
            {"harvest_id": harvest_id, "row": texts.rows + at, "tokens": b"", "texts": words} for at, (_, words) in enumerate(new)
        ]
        made = {row.row: row.id for row in session.execute(sa.insert(Context).returning(Context.row, Context.id), rows)}
        texts.ids.update({key: made[texts.rows + at] for at, (key, _) in enumerate(new)})
        texts.rows += len(new)


def _insert_labels(session: Session, sae_id: int, chunk: Chunk) -> None:
    """Explanations as labels; one that the feature has already is not given again."""
    if not chunk.labels:
        return
    indices = {idx for idx, _ in chunk.labels}
    held = sa.select(Label.idx, Label.text, Label.method).where(Label.sae_id == sae_id, Label.idx.in_(indices))
    there = {(idx, text, method) for idx, text, method in session.execute(held)}
    rows = []
    for idx, label in chunk.labels:
        text = " ".join(label.text.split())
        text = text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"
        key = (idx, text, label.method[:NAME])
        if text and key not in there:
            there.add(key)
            rows.append(Label(sae_id=sae_id, idx=idx, text=text, author=label.author[:NAME], method=key[2]))
    session.add_all(rows)
    if rows:
        touch(session, [sae_id])
