"""A published harvest read from end to end, some features at a time, for those who write it elsewhere."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import attrgetter
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from sae_core.errors import UsageError
from server.db import Database
from server.packing import F4, I4, read_examples, unfold, unpack
from server.store.features import EXAMPLE_COLUMNS, Stored
from server.store.saes import Door
from server.tables import Context, Example, Feature, FeatureDetail, Label

AT_ONCE = 32
"""Features in memory: their examples are some hundred KB each."""


@dataclass(frozen=True)
class ExportedExample:
    """An example with its numbers as arrays; positions count from the row's start."""

    band: int
    rank: int
    row: int
    start: int
    """Position of the first token in `texts`."""
    dest: int
    texts: Sequence[str]
    pos: NDArray[np.int64]
    """Where the feature fires, rising."""
    act: NDArray[np.float64]
    by_source: NDArray[np.float64] | None
    """[len(texts)]: DFA of the tokens shown, heads summed, of the entries that are kept; None where nothing is known of it."""


@dataclass(frozen=True)
class ExportedLabel:
    """A label that holds."""

    text: str
    author: str
    method: str


@dataclass(frozen=True)
class ExportedFeature:
    """A feature with all that is stored of it that others have a place for."""

    index: int
    n_fired: int
    density: float
    max_act: float
    head_norm: tuple[float, ...]
    head_dfa: tuple[float, ...]
    """Mean signed DFA by head; empty where an imported harvest does not say it."""
    histogram: tuple[tuple[float, ...], tuple[int, ...]]
    """Edges and counts, of equal width or equal in log."""
    equal_width: bool
    logits: tuple[tuple[float, ...], tuple[int, ...]]
    bands: list[dict[str, Any]]
    promoted: list[list[Any]]
    suppressed: list[list[Any]]
    examples: tuple[ExportedExample, ...]
    labels: tuple[ExportedLabel, ...]

    def middles(self) -> list[float]:
        """Of the histogram's bars."""
        edges = self.histogram[0]
        return [(a + b) / 2 if self.equal_width else math.sqrt(a * b) for a, b in pairwise(edges)]


def features(db: Database, door: Door) -> Iterator[ExportedFeature]:
    """Every feature of the SAE's published harvest, by index; a session for each few, so that no writer waits for long."""
    assert door.sae.harvest is not None
    harvest_id, window = door.sae.harvest.id, int(door.sae.harvest.config.get("window", 256))
    last = -1
    while True:
        with db.read() as session:
            rows = session.execute(
                sa.select(Feature, FeatureDetail)
                .join(FeatureDetail, FeatureDetail.feature_id == Feature.id)
                .where(Feature.harvest_id == harvest_id, Feature.idx > last)
                .order_by(Feature.idx)
                .limit(AT_ONCE)
            ).all()
            if not rows:
                return
            examples = {
                feature_id: _taken(list(of), window)
                for feature_id, of in groupby(
                    session.execute(
                        sa.select(*EXAMPLE_COLUMNS)
                        .join(Context, Context.id == Example.context_id)
                        .where(Example.feature_id.in_([feature.id for feature, _ in rows]))
                        .order_by(Example.feature_id, Example.band, Example.rank)
                    ),
                    attrgetter("feature_id"),
                )
            }
            indices = [feature.idx for feature, _ in rows]
            labels: dict[int, list[ExportedLabel]] = {}
            for label in session.scalars(
                sa.select(Label)
                .where(Label.sae_id == door.id, Label.idx.in_(indices), Label.ended_at.is_(None))
                .order_by(Label.id)
            ):
                labels.setdefault(label.idx, []).append(ExportedLabel(label.text, label.author, label.method))
            found = [
                _exported(feature, detail, examples.get(feature.id, ()), labels.get(feature.idx, ())) for feature, detail in rows
            ]
        last = rows[-1][0].idx
        yield from found


def _taken(rows: Sequence[Stored], window: int) -> tuple[ExportedExample, ...]:
    """A feature's examples, read together."""
    found, made, a, e = read_examples(rows), [], 0, 0
    for row, a_end, e_end in zip(rows, found.acts_end.tolist(), found.end.tolist(), strict=True):
        start, texts = row.start, row.texts[row.start : row.start + window]
        before = a + int(np.searchsorted(found.acts_pos[a:a_end], row.dest))
        by_source = None
        if row.dfa:
            by_source = np.bincount(found.src[e:e_end] - start, found.value[e:e_end], len(texts)).astype(np.float64)
        made.append(
            ExportedExample(
                row.band,
                row.rank,
                row.row,
                start,
                row.dest,
                texts,
                np.concatenate([found.acts_pos[a:before], [row.dest], found.acts_pos[before:a_end]]),
                np.concatenate([found.acts_value[a:before], [row.act], found.acts_value[before:a_end]]),
                by_source,
            )
        )
        a, e = a_end, e_end
    return tuple(made)


def _exported(
    feature: Feature, detail: FeatureDetail, examples: tuple[ExportedExample, ...], labels: Sequence[ExportedLabel]
) -> ExportedFeature:
    return ExportedFeature(
        index=feature.idx,
        n_fired=feature.n_fired,
        density=feature.density,
        max_act=feature.max_act,
        head_norm=tuple(unpack(detail.head_norm, F4).tolist()),
        head_dfa=tuple(unpack(detail.head_dfa, F4).tolist()),
        histogram=unfold(detail.histogram, log=True),
        equal_width=detail.histogram.get("spacing") == "equal",
        logits=unfold(detail.logits, log=False),
        bands=detail.bands,
        promoted=detail.promoted,
        suppressed=detail.suppressed,
        examples=examples,
        labels=tuple(labels),
    )


def token_rows(db: Database, door: Door) -> tuple[dict[int, int], NDArray[np.int32]]:
    """The rows that examples are of: their places by number, and their token ids [rows, context], shorter ones filled with 0.

    UsageError for a harvest that was imported as text.
    """
    assert door.sae.harvest is not None
    rows = sa.select(Context.row, Context.tokens).where(Context.harvest_id == door.sae.harvest.id).order_by(Context.row)
    places: dict[int, int] = {}
    with db.read() as session:
        n = session.scalar(sa.select(sa.func.count()).where(Context.harvest_id == door.sae.harvest.id)) or 0
        found = np.zeros((n, door.sae.harvest.context), np.int32)
        for row, tokens in session.execute(rows.execution_options(yield_per=1000)):
            if not tokens:
                raise UsageError(
                    f"The harvest of {door.sae.name} was imported as text, and this form needs token ids; harvest it here.",
                    field="sae",
                )
            ids = unpack(tokens, I4)[: found.shape[1]]
            found[len(places), : len(ids)] = ids
            places[row] = len(places)
    return places, found
