"""What a harvest says of each head of an SAE's site."""

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from server.store.saes import Count, Door
from server.tables import HeadSummary


@dataclass(frozen=True)
class HeadFeature:
    """A feature and the share of its decoder's norm that lies at the head."""

    index: int
    share: float


@dataclass(frozen=True)
class HeadLine:
    """A head: what it leads, of what families, and how many things it seems to do."""

    head: int
    n_led: int
    """Live features of which it has the largest |mean DFA|."""
    n_led_norm: int
    """Live features of which it has the largest decoder norm."""
    families: tuple[Count, ...]
    """Of those it leads by |mean DFA|, most first; `unclear` for those of none."""
    diversity: float | None
    """Directions that its features write into as if equally, weighed by how much each is there; None where few are alive."""
    polysemantic: float | None
    """Share of pairs of its top features that nothing measured relates: an upper estimate."""
    top: tuple[HeadFeature, ...]
    """Its live features with the largest decoder share."""
    detail: dict[str, Any]
    """The numbers behind the two, and how they hold up on more features."""


def head_summaries(session: Session, door: Door) -> tuple[HeadLine, ...]:
    """One line per head, in order; none before a harvest is published, nor of harvests made before heads were summarised."""
    if door.sae.harvest is None:
        return ()
    rows = session.scalars(sa.select(HeadSummary).where(HeadSummary.harvest_id == door.sae.harvest.id).order_by(HeadSummary.head))
    return tuple(
        HeadLine(
            head=row.head,
            n_led=row.n_led,
            n_led_norm=row.n_led_norm,
            families=tuple(Count(name, n) for name, n in sorted(row.families.items(), key=lambda item: -item[1])),
            diversity=row.diversity,
            polysemantic=row.polysemantic,
            top=tuple(HeadFeature(int(idx), share) for idx, share in row.detail.get("top", [])),
            detail=row.detail,
        )
        for row in rows
    )
