"""One stored example by its place: taken apart source by source, or as the tokens that the engine needs to look at it again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.errors import NotFound, UsageError
from server.packing import I4, unpack
from server.store.features import EXAMPLE_COLUMNS, FeatureExample, taken_apart
from server.store.redact import REMOVED
from server.store.saes import Door, SaeRef
from server.tables import Context, Example, Feature


@dataclass(frozen=True)
class ExampleRow:
    """A row's tokens, and where in it the feature fired."""

    tokens: tuple[int, ...]
    dest: int


@dataclass(frozen=True)
class HeadPart:
    """What a head moved from one source."""

    head: int
    value: float


@dataclass(frozen=True)
class Source:
    """A source token and what it gave to the destination, of the entries that were kept."""

    position: int
    offset: int
    """Its position less the destination's."""
    text: str
    act: float
    """The feature's own activation there."""
    value: float
    """DFA, heads summed."""
    heads: tuple[HeadPart, ...]
    """By size, largest first."""


@dataclass(frozen=True)
class ExamplePage:
    """An example with its sources."""

    sae: SaeRef
    index: int
    max_act: float
    """The feature's, over the whole harvest."""
    example: FeatureExample
    sources: tuple[Source, ...]
    """By size, largest first."""
    left_over: float
    """Sum of what is no entry: small ones, and sources before the window. Sources + this + bias = the pre-activation."""


def example_page(session: Session, door: Door, index: int, band: int, rank: int) -> ExamplePage:
    """An example of feature `index` in the published harvest; NotFound where none has that place. One query."""
    found = _at(session, door, index, band, rank, Feature.max_act, *EXAMPLE_COLUMNS)
    config = door.sae.harvest.config if door.sae.harvest else {}
    (example,) = taken_apart([found], int(config.get("window", 256)))
    sources = sources_of(example)
    left_over = example.dfa_sum - sum(source.value for source in sources)
    return ExamplePage(door.sae, index, found.max_act, example, sources, left_over)


def sources_of(example: FeatureExample) -> tuple[Source, ...]:
    """The sources of an example that have an entry, by size."""
    parts: dict[int, list[HeadPart]] = {}
    for src, head, value in example.dfa:
        parts.setdefault(src, []).append(HeadPart(head, value))
    sources = [
        Source(
            src, src - example.dest, example.texts[src - example.start], example.acts.get(src, 0.0),
            sum(part.value for part in heads), tuple(heads),
        )
        for src, heads in parts.items()
    ]  # fmt: skip
    return tuple(sorted(sources, key=lambda source: -abs(source.value)))


def example_row(session: Session, door: Door, index: int, band: int, rank: int) -> ExampleRow:
    """The row of an example of feature `index` in the published harvest; NotFound where none has that place,
    UsageError where it was imported as text."""
    found = _at(session, door, index, band, rank, Context.tokens, Context.texts, Example.dest)
    if not found.tokens:
        raise UsageError("This example was imported as text, so the model cannot read it again as it was.", field="rank")
    if REMOVED in found.texts:
        raise UsageError("Text of this example was removed from its corpus, so the model cannot read it again.", field="rank")
    return ExampleRow(tuple(unpack(found.tokens, I4).tolist()), found.dest)


def _at(session: Session, door: Door, index: int, band: int, rank: int, *columns: Any) -> sa.Row[Any]:
    harvest_id = door.sae.harvest.id if door.sae.harvest else None
    found: Sequence[sa.Row[Any]] = session.execute(
        sa.select(*columns)
        .select_from(Example)
        .join(Context, Context.id == Example.context_id)
        .join(Feature, Feature.id == Example.feature_id)
        .where(Feature.harvest_id == harvest_id, Feature.idx == index, Example.band == band, Example.rank == rank)
    ).all()
    if not found:
        raise NotFound(f"Feature {index} of {door.sae.name} keeps no example {rank} in band {band}.", field="rank")
    return found[0]
