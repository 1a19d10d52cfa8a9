"""What the first page shows: models with their layer x head maps, and SAEs with their key figures."""

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from server.store import jobs
from server.store.heads import HeadLine, summaries_of
from server.store.jobs import JobRecord
from server.store.saes import Count, SaeRef, sae_ref
from server.store.sweeps import SweepLine, sweeps
from server.store.viewers import seen_metrics
from server.tables import SAE, Corpus, Feature, Harvest, Job, Model


@dataclass(frozen=True)
class SaeCard:
    """An SAE with what one wants to know before opening it."""

    sae: SaeRef
    """Which SAE."""
    metrics: dict[str, Any]
    created_at: datetime


@dataclass(frozen=True)
class HeadCell:
    """A head of a model, and how many live features it leads in the newest published harvest of its layer."""

    layer: int
    head: int
    features: int
    sae: str
    family: Count | None
    """The family of most of the features it leads by data, `unclear` left out."""


@dataclass(frozen=True)
class ModelMap:
    """A model; its shape is unknown until a worker has loaded it."""

    name: str
    n_layers: int | None
    n_heads: int | None
    d_head: int | None
    cells: tuple[HeadCell, ...]


@dataclass(frozen=True)
class HomePage:
    """All that the first page shows."""

    models: tuple[ModelMap, ...]
    saes: tuple[SaeCard, ...]
    """Newest first; of a sweep's only those with a harvest, the others stand in the sweep's table."""
    archived: int
    """SAEs that are archived, and so left out."""
    sweeps: tuple[SweepLine, ...]
    jobs: tuple[JobRecord, ...]
    """Queued and running, oldest first."""


def home_page(session: Session) -> HomePage:
    """The first page: five queries, and one for harvests of before heads had summaries."""
    every = _cards(session)
    saes = tuple(card for card, archived in every if not archived)
    shown = [card.sae.harvest.id for card in saes if card.sae.harvest]
    lines = summaries_of(session, shown)
    led = _led(session, sorted(set(shown) - {harvest_id for harvest_id, _ in lines}))
    models = session.scalars(sa.select(Model).order_by(Model.name)).all()
    return HomePage(
        models=tuple(
            ModelMap(row.name, row.n_layers, row.n_heads, row.d_head, _cells(row.name, saes, led, lines)) for row in models
        ),
        saes=saes,
        archived=len(every) - len(saes),
        sweeps=sweeps(session),
        jobs=open_jobs(session),
    )


def archived_cards(session: Session) -> tuple[SaeCard, ...]:
    """The SAEs that the first page leaves out, newest first."""
    return tuple(card for card, archived in _cards(session) if archived)


def sae_cards(
    session: Session, *, model: str | None = None, layer: int | None = None, archived: bool = False, after: str | None = None,
    limit: int,
) -> tuple[SaeCard, ...]:  # fmt: skip
    """SAEs by name, from the one after `after`, of a model or a layer; those archived or the others."""
    listed = _CARDS.where(SAE.archived_at.is_not(None) if archived else SAE.archived_at.is_(None))
    if model is not None:
        listed = listed.where(Model.name == model)
    if layer is not None:
        listed = listed.where(SAE.layer == layer)
    if after is not None:
        listed = listed.where(SAE.name > after)
    return tuple(card for card, _ in _read_cards(session, listed.order_by(SAE.name).limit(limit)))


_CARDS = (
    sa.select(SAE, Model.name, Harvest, Corpus.name)
    .join(Model, Model.id == SAE.model_id)
    .outerjoin(Harvest, Harvest.id == SAE.harvest_id)
    .outerjoin(Corpus, Corpus.id == Harvest.corpus_id)
)


def _cards(session: Session) -> list[tuple[SaeCard, bool]]:
    """Every SAE that stands alone or has a harvest, newest first, and whether it is archived."""
    listed = (
        _CARDS.outerjoin(Job, sa.and_(Job.id == SAE.job_id, Job.kind == "sweep"))
        .where(sa.or_(Job.id.is_(None), SAE.harvest_id.is_not(None), SAE.archived_at.is_not(None)))
        .order_by(SAE.created_at.desc(), SAE.id.desc())
    )
    return _read_cards(session, listed)


def _read_cards(session: Session, listed: sa.Select[*tuple[Any, ...]]) -> list[tuple[SaeCard, bool]]:
    return [
        (
            SaeCard(sae_ref(row, model, harvest, corpus), seen_metrics(session, row.metrics), row.created_at),
            row.archived_at is not None,
        )
        for row, model, harvest, corpus in session.execute(listed)
    ]


def open_jobs(session: Session) -> tuple[JobRecord, ...]:
    """Jobs queued or running, oldest first."""
    return tuple(jobs.of_status(session, jobs.OPEN))


def _led(session: Session, harvest_ids: list[int]) -> dict[int, dict[int, int]]:
    counts: defaultdict[int, dict[int, int]] = defaultdict(dict)
    if not harvest_ids:
        return counts
    rows = session.execute(
        sa.select(Feature.harvest_id, Feature.top_head, sa.func.count())
        .where(Feature.harvest_id.in_(harvest_ids), Feature.n_fired > 0)
        .group_by(Feature.harvest_id, Feature.top_head)
    )
    for harvest_id, head, n in rows:
        counts[harvest_id][head] = n
    return counts


def _cells(
    model: str, saes: tuple[SaeCard, ...], led: dict[int, dict[int, int]], lines: dict[tuple[int, int], HeadLine]
) -> tuple[HeadCell, ...]:
    # Newest first, so the first SAE met at a layer is the one shown.
    by_layer: dict[int, SaeRef] = {}
    for card in saes:
        if card.sae.model == model and card.sae.harvest:
            by_layer.setdefault(card.sae.layer, card.sae)
    cells = []
    for layer, sae in sorted(by_layer.items()):
        harvest_id = sae.harvest.id if sae.harvest else 0
        for head in range(sae.n_heads):
            line, counted = lines.get((harvest_id, head)), led.get(harvest_id, {})
            n_led = line.n_led_norm if line else counted.get(head, 0)
            cells.append(HeadCell(layer, head, n_led, sae.name, line.family if line else None))
    return tuple(cells)
