"""Writing dashboards that others made as a harvest: file by file, each once however often it is read.

What they lack is not there: an example without DFA has an empty `dfa`, and DFA by source with its heads summed is stored as that
of one head. Texts come as token strings, so contexts have no token ids.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from sae_core.records import ExampleRecord, FeatureRecord
from server.db import Database
from server.packing import pack_acts, pack_dfa
from server.store.harvests import Fence, cut, insert_examples, insert_features, write_chunks, write_heads
from server.store.labels import touch
from server.store.people import LONGEST_LABEL
from server.tables import Context, Feature, Harvest, Label

EXAMPLES_AT_ONCE = 1000
NAME = 60
"""Characters of an author or a method."""


@dataclass(frozen=True)
class ForeignExample:
    """An example as dashboards have it: a text, activations, and what each source token gave, heads summed."""

    band: int
    rank: int
    dest: int
    act: float
    """At the destination."""
    texts: tuple[str, ...]
    pos: NDArray[np.int64]
    """Where the feature fires."""
    value: NDArray[np.float64]
    dfa: NDArray[np.float64] | None
    """[len(texts)]: by source; None where the files have none for this destination."""

    @cached_property
    def key(self) -> bytes:
        """What tells its text from others."""
        return _digest(self.texts)


@dataclass(frozen=True)
class ForeignLabel:
    """An explanation."""

    text: str
    author: str
    method: str


@dataclass(frozen=True)
class ForeignFeature:
    """A feature with its examples."""

    record: FeatureRecord
    examples: Sequence[ForeignExample]
    labels: Sequence[ForeignLabel] = ()


@dataclass
class Texts:
    """Contexts of a harvest by their text, so that one that many features share is stored once."""

    ids: dict[bytes, int] = field(default_factory=dict)

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
            found.ids.update({_digest(texts): id for id, texts in some})
            last = some[-1].id


def _digest(texts: Sequence[str]) -> bytes:
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def note_source(db: Database, harvest_id: int, source: dict[str, Any], fence: Fence) -> None:
    """Say of a harvest that it was not made here, and what it lacks."""
    with db.write() as session:
        fence(session)
        session.get_one(Harvest, harvest_id).source = source


def write_file(
    db: Database, harvest_id: int, sae_id: int, number: int, features: Iterable[ForeignFeature], texts: Texts, fence: Fence
) -> None:
    """Store one file's features, examples and labels."""

    def insert(session: Session, harvest_id: int, chunk: list[ForeignFeature]) -> None:
        insert_features(session, harvest_id, [feature.record for feature in chunk])
        indices = [feature.record.idx for feature in chunk]
        stored = sa.select(Feature.idx, Feature.id).where(Feature.harvest_id == harvest_id, Feature.idx.in_(indices))
        ids = {row.idx: row.id for row in session.execute(stored)}
        _insert_texts(session, harvest_id, chunk, texts)
        insert_examples(session, _examples(chunk, ids, texts))
        _insert_labels(session, sae_id, chunk)

    chunks = cut(features, lambda feature: 1 + len(feature.examples), EXAMPLES_AT_ONCE)
    write_chunks(db, harvest_id, f"part {number}", chunks, insert, fence)


def write_dead(db: Database, harvest_id: int, features: Iterable[FeatureRecord], fence: Fence) -> None:
    """Store the features that the files say are dead, after all files; and that there is nothing to say of heads."""
    chunks = cut(features, lambda _: 1, EXAMPLES_AT_ONCE)
    write_chunks(db, harvest_id, "features", chunks, lambda session, id, chunk: insert_features(session, id, chunk), fence)
    write_heads(db, harvest_id, [], fence)


def count_up(db: Database, harvest_id: int, fence: Fence) -> None:
    """Put what the files came to into the harvest's totals."""
    with db.write() as session:
        fence(session)
        harvest = session.get_one(Harvest, harvest_id)
        live = sa.select(sa.func.count()).where(Feature.harvest_id == harvest_id, Feature.n_fired > 0)
        rows = sa.select(sa.func.count()).where(Context.harvest_id == harvest_id)
        harvest.n_live, harvest.n_rows = session.scalar(live) or 0, session.scalar(rows) or 0


def _insert_texts(session: Session, harvest_id: int, chunk: list[ForeignFeature], texts: Texts) -> None:
    new: dict[bytes, tuple[str, ...]] = {}
    for feature in chunk:
        for example in feature.examples:
            if example.key not in texts.ids:
                new[example.key] = example.texts
    begin = len(texts.ids)
    rows = [
        {"harvest_id": harvest_id, "row": begin + at, "tokens": b"", "texts": list(words)}
        for at, words in enumerate(new.values())
    ]
    if rows:
        found = session.execute(sa.insert(Context).returning(Context.row, Context.id), rows)
        made = {context.row: context.id for context in found}
        texts.ids.update({key: made[begin + at] for at, key in enumerate(new)})


def _examples(chunk: list[ForeignFeature], feature_ids: dict[int, int], texts: Texts) -> Iterable[tuple[object, ...]]:
    found = [(feature.record.idx, example) for feature in chunk for example in feature.examples]
    records = [_record(idx, example) for idx, example in found]
    with_dfa = [record for record, (_, example) in zip(records, found, strict=True) if example.dfa is not None]
    packed = iter(pack_dfa(with_dfa)) if with_dfa else iter(())
    for (idx, example), record, acts in zip(found, records, pack_acts(records) if records else (), strict=True):
        where = (feature_ids[idx], texts.ids[example.key], example.band, example.rank, example.dest, 0)
        yield (*where, record.act, acts, next(packed) if example.dfa is not None else b"")


def _record(idx: int, example: ForeignExample) -> ExampleRecord:
    """An example in the form that is packed. The files have no bias, so it is what is left of the activation."""
    act, dfa = example.act, np.zeros(0) if example.dfa is None else example.dfa
    src = np.flatnonzero(dfa)
    nothing = np.zeros(1, np.float32)
    return ExampleRecord(
        feature=idx, band=example.band, rank=example.rank, row=0, dest=example.dest, start=0, act=act, preact=act,
        bias=act - float(dfa.sum()), gap=0.0, abs_dfa=float(np.abs(dfa).sum()), acts_pos=example.pos.astype(np.uint16),
        acts_value=example.value.astype(np.float32), dfa_src=src.astype(np.uint16), dfa_head=np.zeros(len(src), np.uint8),
        dfa_value=dfa[src].astype(np.float32), dropped=nothing, before=nothing,
    )  # fmt: skip


def _insert_labels(session: Session, sae_id: int, chunk: list[ForeignFeature]) -> None:
    """Explanations as labels; one that the feature has already is not given again."""
    indices = [feature.record.idx for feature in chunk if feature.labels]
    if not indices:
        return
    held = sa.select(Label.idx, Label.text, Label.method).where(Label.sae_id == sae_id, Label.idx.in_(indices))
    there = {(idx, text, method) for idx, text, method in session.execute(held)}
    rows = []
    for feature in chunk:
        for label in feature.labels:
            text = " ".join(label.text.split())
            text = text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"
            key = (feature.record.idx, text, label.method[:NAME])
            if text and key not in there:
                there.add(key)
                rows.append(Label(sae_id=sae_id, idx=key[0], text=text, author=label.author[:NAME], method=key[2]))
    session.add_all(rows)
    if rows:
        touch(session, [sae_id])
