"""One stored example by its place, with the tokens of its whole row: what the engine needs to look at it again."""

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.errors import NotFound
from server.packing import I4, unpack
from server.store.saes import Door
from server.tables import Context, Example, Feature


@dataclass(frozen=True)
class ExampleRow:
    """A row's tokens, and where in it the feature fired."""

    tokens: tuple[int, ...]
    dest: int


def example_row(session: Session, door: Door, index: int, band: int, rank: int) -> ExampleRow:
    """The row of an example of feature `index` in the published harvest; NotFound where none has that place."""
    harvest_id = door.sae.harvest.id if door.sae.harvest else None
    found = session.execute(
        sa.select(Context.tokens, Example.dest)
        .join(Context, Context.id == Example.context_id)
        .join(Feature, Feature.id == Example.feature_id)
        .where(Feature.harvest_id == harvest_id, Feature.idx == index, Example.band == band, Example.rank == rank)
    ).one_or_none()
    if found is None:
        raise NotFound(f"Feature {index} of {door.sae.name} keeps no example {rank} in band {band}.", field="rank")
    return ExampleRow(tuple(unpack(found.tokens, I4).tolist()), found.dest)
