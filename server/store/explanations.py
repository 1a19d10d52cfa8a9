"""Labels by the words in them, over many SAEs: nearest first."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from server.store.search import words
from server.tables import Label

LOOKED_AT = 5000
"""Labels that share a word with the query, the newest first, of which the nearest are found."""


@dataclass(frozen=True)
class NearLabel:
    """A label that says something like what was looked for."""

    sae_id: int
    index: int
    text: str
    method: str
    cosine: float
    """Of the counts of words in the label and in the query: 1 where both have the same words."""


def search_labels(session: Session, sae_ids: Sequence[int], query: str, offset: int, limit: int) -> list[NearLabel]:
    """Labels of these SAEs that share a word, or the beginning of one, with `query`, by `cosine`."""
    wanted = Counter(words(query))
    if not wanted:
        return []
    rows = session.execute(
        sa.select(Label.sae_id, Label.idx, Label.text, Label.method)
        .where(Label.sae_id.in_(sae_ids), Label.ended_at.is_(None))
        .where(sa.or_(*(Label.text.icontains(word, autoescape=True) for word in wanted)))
        .order_by(Label.id.desc())
        .limit(LOOKED_AT)
    )
    found = [NearLabel(*row, cosine=_cosine(wanted, Counter(words(row.text)))) for row in rows]
    near = sorted((one for one in found if one.cosine > 0), key=lambda one: -one.cosine)
    return near[offset : offset + limit]


def _cosine(wanted: Counter[str], said: Counter[str]) -> float:
    """Cosine of two counts of words. A word of the query counts where one of the label begins with it."""
    together = sum(n * max((m for word, m in said.items() if word.startswith(asked)), default=0) for asked, n in wanted.items())
    size = math.sqrt(sum(n * n for n in wanted.values()) * sum(m * m for m in said.values()))
    return min(1.0, together / size) if size else 0.0
