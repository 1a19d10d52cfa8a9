"""Writing dashboards that others made as a harvest: file by file, each once however often it is read.

What they lack is not there: an example without DFA has an empty `dfa`, and DFA by source with its heads summed is stored as that
of one head. Texts come as token strings, so contexts have no token ids.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from sae_core.records import FeatureRecord
from server.db import Database
from server.packing import ManyActs, ManyDfa, pack_many_acts, pack_many_dfa
from server.store.harvests import Fence, cut, insert_examples, insert_features, write_chunks, write_heads
from server.store.labels import touch
from server.store.people import LONGEST_LABEL
from server.tables import Context, Feature, Harvest, HarvestPart, Label

EXAMPLES_AT_ONCE = 1000
NAME = 60
"""Characters of an author or a method."""


Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ForeignExamples:
    """A feature's examples as dashboards have them, strongest band first, within it the strongest first: arrays of one example
    after the other. Positions count from the text's first token."""

    band: Ints
    rank: Ints
    dest: Ints
    act: Floats
    """At the destination."""
    keys: list[bytes]
    """What tells their texts from others: `text_key`."""
    fired: Ints
    """[n]: how many of `pos` and `value` are each example's: where the feature fires."""
    pos: Ints
    value: Floats
    attributed: NDArray[np.bool_]
    """[n]: whether the files have DFA for this destination."""
    sources: Ints
    """[n]: how many of `src` and `dfa` are each example's: what a source token gave, heads summed."""
    src: Ints
    dfa: Floats


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
    examples: ForeignExamples
    texts: dict[bytes, list[str]]
    """By key: texts of its examples, other than those that came with a feature before it."""
    labels: Sequence[ForeignLabel] = ()


@dataclass(frozen=True)
class Chunk:
    """A run of features, their examples packed: what a transaction writes. It may be made in another process."""

    records: list[FeatureRecord]
    labels: list[tuple[int, ForeignLabel]]
    """By feature."""
    texts: dict[bytes, list[str]]
    examples: list[tuple[int, bytes, int, int, int, float, bytes, bytes]]
    """(feature, key of its text, band, rank, destination, activation, `acts`, `dfa`)."""


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


def text_key(texts: Sequence[str]) -> bytes:
    """What tells a text from others."""
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def note_source(db: Database, harvest_id: int, source: dict[str, Any], fence: Fence) -> None:
    """Say of a harvest that it was not made here, and what it lacks."""
    with db.write() as session:
        fence(session)
        session.get_one(Harvest, harvest_id).source = source


def chunks(features: Iterable[ForeignFeature]) -> Iterator[Chunk]:
    """A file's features, ready to be written; always the same runs of the same features."""
    for some in cut(features, lambda feature: 1 + len(feature.examples.keys), EXAMPLES_AT_ONCE):
        yield Chunk(
            [feature.record for feature in some],
            [(feature.record.idx, label) for feature in some for label in feature.labels],
            {key: words for feature in some for key, words in feature.texts.items()},
            list(_packed(some)),
        )


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


def _packed(features: Sequence[ForeignFeature]) -> Iterator[tuple[int, bytes, int, int, int, float, bytes, bytes]]:
    """The examples as they are stored. The files have no bias, so it is what is left of the activation."""
    idx = np.repeat([feature.record.idx for feature in features], [len(feature.examples.keys) for feature in features])
    if not len(idx):
        return

    def joined(name: str) -> Any:
        return np.concatenate([getattr(feature.examples, name) for feature in features])

    band, rank, dest, act, attributed = (joined(name) for name in ("band", "rank", "dest", "act", "attributed"))
    start, sources, dfa = np.zeros_like(dest), joined("sources"), joined("dfa")
    value, gave = joined("value").astype(np.float32).astype(np.float64), dfa.astype(np.float32).astype(np.float64)
    acts = pack_many_acts(ManyActs(start, dest, joined("fired"), joined("pos"), value))
    whose = np.repeat(np.arange(len(dest)), sources)
    total, size = (np.bincount(whose, part, len(dest))[attributed] for part in (dfa, np.abs(dfa)))
    nothing = np.zeros((len(total), 1))
    preact = act[attributed]
    packed = iter(
        pack_many_dfa(
            ManyDfa(
                start[attributed], dest[attributed], sources[attributed], joined("src"), np.zeros(len(dfa), np.int64), gave,
                nothing, nothing, preact, preact - total, size,
            )
        )
        if len(total)
        else ()
    )  # fmt: skip
    keys = [key for feature in features for key in feature.examples.keys]
    of_dfa = (next(packed) if has else b"" for has in attributed.tolist())
    yield from zip(idx.tolist(), keys, band.tolist(), rank.tolist(), dest.tolist(), act.tolist(), acts, of_dfa, strict=True)


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
