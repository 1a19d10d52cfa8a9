"""What interventions put in the place of what is taken out: means of what was harvested."""

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.errors import NotFound
from server.packing import I4, unpack
from server.tables import SAE, Context, Feature


def mean_activations(session: Session, sae: str, indices: Sequence[int]) -> dict[int, float]:
    """Mean activation of features over all tokens of the SAE's published harvest, those where it is silent too.

    NotFound where the SAE has none.
    """
    fired = sa.select(Feature.idx, Feature.mean_act, Feature.density).where(Feature.harvest_id == _harvest_of(session, sae))
    rows = session.execute(fired.where(Feature.idx.in_(list(indices))))
    return dict.fromkeys(indices, 0.0) | {idx: mean * density for idx, mean, density in rows}


def sample_rows(session: Session, saes: Sequence[str], most: int) -> tuple[int, list[list[int]]]:
    """A harvest of one of these SAEs, and token ids of its first kept rows, at most so many; rows are shuffled text.

    NotFound where none has a harvest with tokens (an imported one has texts alone).
    """
    for name in saes:
        harvest = session.scalar(sa.select(SAE.harvest_id).where(SAE.name == name))
        if harvest is not None:
            rows = sa.select(Context.tokens).where(Context.harvest_id == harvest).order_by(Context.row).limit(most)
            if found := [unpack(tokens, I4).tolist() for tokens in session.scalars(rows) if tokens]:
                return harvest, found
    raise NotFound(
        f"A mean of z is taken over harvested text, and of {' or '.join(saes)} none was harvested here; harvest one, or choose "
        "zero or resample.",
        field="ablations",
    )


def _harvest_of(session: Session, sae: str) -> int:
    found = session.scalar(sa.select(SAE.harvest_id).where(SAE.name == sae))
    if found is None:
        raise NotFound(
            f"{sae} has no harvest, so its features' means are not known; harvest it, or choose another way.", field="features"
        )
    return found
