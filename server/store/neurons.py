"""Features whole, many at once: what other programs want of each, its examples as rows of numbers beside their tokens."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.orm import Session

from sae_core.errors import NotFound
from server.packing import F4, read_examples, unfold, unpack
from server.store.features import TokenWeight
from server.store.labels import PERSON
from server.store.saes import Door
from server.tables import Context, Example, Feature, FeatureDetail, Label, Note

DIGITS = 7
"""Of a row's largest number; the others have as many decimal places. Stored values are within 0.7 % themselves."""


@dataclass(frozen=True)
class Firing:
    """A row where the feature fired. All counts from the first token shown, so `tokens`, `values` and `dfa` go together."""

    id: int
    row: int
    """In the corpus."""
    band: int
    rank: int
    dest: int
    tokens: tuple[str, ...]
    values: list[float]
    """The feature's activation on each token."""
    dfa: list[float]
    """What each source token gave at `dest`: the entries kept, heads summed. Empty where no DFA is stored."""
    by_head: list[float]
    """What each head gave at `dest`, everything counted."""
    dropped: float
    """DFA of the tokens shown that is not in `dfa`, being of entries that were not kept."""
    before: float
    """DFA of sources before the first token shown."""
    bias: float
    preact: float
    """`dfa`, `dropped`, `before` and `bias` sum to it; it was computed on its own."""
    low: float | None
    """Of the band that the example was drawn from; None for the strongest ones."""
    high: float | None
    share: float | None
    """Of all firings, that are in the band."""


@dataclass(frozen=True)
class Explained:
    """A label that holds."""

    id: int
    text: str
    author: str
    method: str
    created_at: datetime


@dataclass(frozen=True)
class Noted:
    """A note that is not deleted."""

    id: int
    text: str
    author: str
    created_at: datetime


@dataclass(frozen=True)
class Neuron:
    """A feature, as its harvest saw it."""

    index: int
    n_fired: int
    density: float
    max_act: float
    head_shares: tuple[float, ...]
    """Of the decoder's norm; they sum to 1."""
    histogram: tuple[tuple[float, ...], tuple[int, ...]]
    """Edges, equal in log, and firings between them."""
    logits: tuple[tuple[float, ...], tuple[int, ...]]
    """Edges, equal, and tokens of the vocabulary between them."""
    promoted: tuple[TokenWeight, ...]
    suppressed: tuple[TokenWeight, ...]
    neighbours: tuple[tuple[int, float], ...]
    """Index and cosine, nearest first."""
    family: str | None
    verdict: str | None
    explained: tuple[Explained, ...]
    """A person's first, then the newest."""
    firings: tuple[Firing, ...]
    """The strongest first, by the activation at the destination."""


def published(door: Door) -> int:
    """The number of the SAE's published harvest; NotFound while there is none."""
    if door.sae.harvest is None:
        raise NotFound(f"{door.sae.name} has no published harvest yet; its features appear when one is complete.", field="layer")
    return door.sae.harvest.id


def neurons(session: Session, door: Door, wanted: Sequence[int], most: int | None = None) -> dict[int, Neuron]:
    """The features `wanted` that the published harvest has, each with all its examples or at most `most`: three queries
    however many."""
    found = session.execute(
        sa.select(Feature, FeatureDetail)
        .join(FeatureDetail, FeatureDetail.feature_id == Feature.id)
        .where(Feature.harvest_id == published(door), Feature.idx.in_(wanted))
    ).all()
    explained = _explained(session, door, [feature.idx for feature, _ in found])
    firings = firings_of(session, door, [(feature, detail.bands) for feature, detail in found], most)
    return {
        feature.idx: Neuron(
            index=feature.idx,
            n_fired=feature.n_fired,
            density=feature.density,
            max_act=feature.max_act,
            head_shares=tuple(unpack(detail.head_norm, F4).tolist()),
            histogram=unfold(detail.histogram, log=True),
            logits=unfold(detail.logits, log=False),
            promoted=tuple(TokenWeight(*entry) for entry in detail.promoted),
            suppressed=tuple(TokenWeight(*entry) for entry in detail.suppressed),
            neighbours=tuple((int(idx), cosine) for idx, cosine in detail.neighbours),
            family=feature.family,
            verdict=detail.verdict,
            explained=tuple(explained[feature.idx]),
            firings=firings[feature.id],
        )
        for feature, detail in found
    }


def live_indices(session: Session, door: Door, offset: int, limit: int) -> list[int]:
    """Features that fired, in the order of their index."""
    return list(
        session.scalars(
            sa.select(Feature.idx)
            .where(Feature.harvest_id == published(door), Feature.n_fired > 0)
            .order_by(Feature.idx)
            .offset(offset)
            .limit(limit)
        )
    )


def densities(session: Session, door: Door, wanted: Sequence[int]) -> dict[int, float]:
    """How often features fire, by index; of none while no harvest is published."""
    if door.sae.harvest is None:
        return {}
    mine = sa.select(Feature.idx, Feature.density).where(Feature.harvest_id == door.sae.harvest.id, Feature.idx.in_(wanted))
    return {row.idx: row.density for row in session.execute(mine)}


def notes_of(session: Session, door: Door, index: int) -> list[Noted]:
    """What people wrote about a feature at length, oldest first."""
    rows = session.execute(
        sa.select(Note.id, Note.text, Note.author, Note.created_at)
        .where(Note.sae_id == door.id, Note.idx == index, Note.deleted_at.is_(None))
        .order_by(Note.id)
    )
    return [Noted(*row) for row in rows]


def _explained(session: Session, door: Door, wanted: Sequence[int]) -> dict[int, list[Explained]]:
    rows = session.execute(
        sa.select(Label.idx, Label.id, Label.text, Label.author, Label.method, Label.created_at)
        .where(Label.sae_id == door.id, Label.idx.in_(wanted), Label.ended_at.is_(None))
        .order_by(Label.method != PERSON, Label.id.desc())
    )
    found: dict[int, list[Explained]] = defaultdict(list)
    for row in rows:
        found[row.idx].append(Explained(*row[1:]))
    return found


# ---- examples ----


def firings_of(
    session: Session, door: Door, features: Sequence[tuple[Feature, list[Any]]], most: int | None
) -> dict[int, tuple[Firing, ...]]:
    """The examples of features with their bands, by the feature's number; the strongest first."""
    found: dict[int, list[Firing]] = {feature.id: [] for feature, _ in features}
    if most == 0 or not features:
        return dict.fromkeys(found, ())
    columns = (Example.id, Example.feature_id, Example.band, Example.rank, Example.dest, Example.start, Example.act)
    kept = (
        sa.select(*columns, Example.acts, Example.dfa, Context.row, Context.texts)
        .join(Context, Context.id == Example.context_id)
        .where(Example.feature_id.in_(found))
    )
    if most is not None:
        place = sa.func.row_number().over(partition_by=Example.feature_id, order_by=(Example.band, Example.rank))
        placed = sa.select(Example.id, place.label("place")).where(Example.feature_id.in_(found)).subquery()
        kept = kept.where(Example.id.in_(sa.select(placed.c.id).where(placed.c.place <= most)))
    window = int(door.sae.harvest.config.get("window", 256)) if door.sae.harvest else 0
    about = {feature.id: (bands, feature.n_fired) for feature, bands in features}
    rows = session.execute(kept.order_by(Example.feature_id, Example.band, Example.rank)).all()
    for row, firing in zip(rows, _firings(rows, window, about), strict=True):
        found[row.feature_id].append(firing)
    return {feature_id: tuple(those) for feature_id, those in found.items()}


def _firings(rows: Sequence[Any], window: int, about: dict[int, tuple[list[Any], int]]) -> Iterator[Firing]:
    """Rows of `example` as they are read; `about` says each feature's bands, and how often it fired."""
    if not rows:
        return
    found = read_examples(rows)
    size, start = len(rows), np.array([row.start for row in rows])
    tokens = [tuple(row.texts[row.start : row.start + window]) for row in rows]
    width = max(map(len, tokens))

    def beside(of: NDArray[np.int64], pos: NDArray[np.int64], value: NDArray[np.float64]) -> NDArray[np.float64]:
        # [example, token]: numbers that belong to the same token are summed.
        found: NDArray[np.float64] = np.bincount(of * width + pos - start[of], value, size * width).astype(np.float64)
        return found.reshape(size, width)

    every = np.arange(size)
    values = beside(np.repeat(every, np.diff(found.acts_end, prepend=0)), found.acts_pos, found.acts_value)
    values[every, np.array([row.dest for row in rows]) - start] = [row.act for row in rows]
    of_entry, n_heads = np.repeat(every, np.diff(found.end, prepend=0)), np.diff(found.heads_end, prepend=0)
    given = beside(of_entry, found.src, found.value)
    by_head = np.zeros((size, int(n_heads.max())))
    by_head[np.arange(by_head.shape[1]) < n_heads[:, None]] = found.dropped + found.before
    np.add.at(by_head, (of_entry, found.head), found.value)
    of_head = np.repeat(every, n_heads)
    sums = (np.bincount(of_head, part, size).tolist() for part in (found.dropped, found.before))
    written = (_written(part).tolist() for part in (values, given, by_head))
    for row, shown, value, dfa, heads, n, dropped, before, bias, preact in zip(
        rows, tokens, *written, n_heads.tolist(), *sums, found.bias.tolist(), found.preact.tolist(), strict=True
    ):
        bands, n_fired = about[row.feature_id]
        band = bands[row.band - 1] if 0 < row.band <= len(bands) else None
        yield Firing(
            id=row.id,
            row=row.row,
            band=row.band,
            rank=row.rank,
            dest=row.dest - row.start,
            tokens=shown,
            values=value[: len(shown)],
            dfa=dfa[: len(shown)] if n else [],
            by_head=heads[:n],
            dropped=dropped,
            before=before,
            bias=bias,
            preact=preact,
            low=band["low"] if band else None,
            high=band["high"] if band else None,
            share=min(1.0, band["count"] / n_fired) if band and n_fired else None,
        )


def _written(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each row's numbers with as many decimal places as give its largest `DIGITS` digits."""
    top = np.abs(rows).max(1, initial=0, keepdims=True)
    places = DIGITS - 1 - np.floor(np.log10(np.where(top > 0, top, 1)))
    scale = 10.0 ** np.clip(places, 0, 15)
    found: NDArray[np.float64] = np.rint(rows * scale) / scale
    return found
