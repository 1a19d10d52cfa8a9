"""Two SAEs, two features or two harvests side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.errors import NotFound
from server.store.features import FeaturePage, feature_page
from server.store.saes import DENSITY_EDGES, Bin, Door, SaeRef, find_sae
from server.tables import SAE, Corpus, Feature, FeatureDetail, Harvest, Model, Study

LARGEST_CHANGES = 30
"""Features whose density changed most that are listed."""


class TooFew(NotFound):
    """An SAE has fewer than two harvests."""


@dataclass(frozen=True)
class Chosen:
    """An SAE that can be compared."""

    name: str
    model: str
    layer: int


@dataclass(frozen=True)
class ComparedSae:
    """A side of a comparison."""

    sae: SaeRef
    metrics: dict[str, Any]
    density: tuple[Bin, ...]
    """Live features by density."""


@dataclass(frozen=True)
class MatchedFeature:
    """What is told of a feature beside its match."""

    index: int
    family: str | None
    promoted: tuple[str, ...]


@dataclass(frozen=True)
class Matched:
    """How the two SAEs' features match, as a job found it."""

    study: int
    job_id: str
    created_at: datetime
    swapped: bool
    """Whether the job was asked the other way round; the result below is turned to how the page was asked."""
    result: dict[str, Any]
    ours: dict[int, MatchedFeature]
    theirs: dict[int, MatchedFeature]
    outdated: bool
    """Whether one of the SAEs was harvested again since."""


@dataclass(frozen=True)
class SaeComparison:
    """Two SAEs side by side."""

    a: ComparedSae
    b: ComparedSae
    same_site: bool
    matched: Matched | None


@dataclass(frozen=True)
class FeatureComparison:
    """Two features side by side."""

    a: FeaturePage
    b: FeaturePage
    cosine: float | None
    """Of their decoder directions, where one is among the other's nearest."""


@dataclass(frozen=True)
class HarvestSide:
    """A harvest of an SAE."""

    id: int
    status: str
    corpus: str
    n_tokens: int
    n_rows: int
    n_live: int
    n_examples: int
    context: int
    worst_gap: float | None
    published_at: datetime | None
    config: dict[str, Any]
    density: tuple[Bin, ...]


@dataclass(frozen=True)
class DensityChange:
    """A feature as two harvests saw it."""

    index: int
    a: float
    b: float


@dataclass(frozen=True)
class HarvestComparison:
    """Two harvests of one SAE."""

    sae: SaeRef
    harvests: tuple[int, ...]
    """All that are kept, newest first."""
    a: HarvestSide
    b: HarvestSide
    both: int
    """Features alive in both."""
    only_a: int
    only_b: int
    changes: tuple[DensityChange, ...]
    """Those whose density changed by the largest factor, of those alive in both."""


def choices(session: Session) -> tuple[Chosen, ...]:
    """All SAEs, by model, layer and name."""
    rows = session.execute(sa.select(SAE.name, Model.name, SAE.layer).join(Model, Model.id == SAE.model_id))
    return tuple(sorted((Chosen(*row) for row in rows), key=lambda one: (one.model, one.layer, one.name)))


def compare_saes(session: Session, a: str, b: str) -> SaeComparison:
    """Two SAEs side by side, with the match of their features where a job has made it."""
    doors = [find_sae(session, name) for name in (a, b)]
    sides = [_side(session, door) for door in doors]
    fingerprints = [(d.config.get("model_fingerprint"), d.sae.model, d.sae.layer, d.sae.d_in) for d in doors]
    return SaeComparison(sides[0], sides[1], fingerprints[0] == fingerprints[1], _matched(session, *doors))


def compare_features(session: Session, a: tuple[str, int], b: tuple[str, int]) -> FeatureComparison:
    """Two features side by side."""
    pages = [feature_page(session, find_sae(session, name), index) for name, index in (a, b)]
    cosine = None
    if a[0] == b[0]:
        seen = [(pages[0], b[1]), (pages[1], a[1])]
        cosine = next((near.cosine for page, index in seen for near in page.neighbours if near.index == index), None)
    return FeatureComparison(pages[0], pages[1], cosine)


def compare_harvests(session: Session, sae: str, a: int | None, b: int | None) -> HarvestComparison:
    """Two harvests of an SAE; left out, the two newest that were published, the older as `a`."""
    door = find_sae(session, sae)
    found = session.execute(
        sa.select(Harvest, Corpus.name)
        .join(Corpus, Corpus.id == Harvest.corpus_id)
        .where(Harvest.sae_id == door.id, Harvest.status.in_(("published", "replaced")))
        .order_by(Harvest.id.desc())
    ).all()
    of = {harvest.id: (harvest, corpus) for harvest, corpus in found}
    if len(of) < 2:
        raise TooFew(f"{sae} has {'one harvest' if of else 'no harvest'}, and two are needed to compare.", field="sae")
    ids = list(of)
    wanted = [ids[1] if a is None else a, ids[0] if b is None else b]
    for one in wanted:
        if one not in of:
            raise NotFound(f"{sae} has no harvest {one}. There are: {', '.join(map(str, ids))}.", field="harvest")
    sides = [_harvest(session, *of[one]) for one in wanted]
    densities = [_densities(session, one) for one in wanted]
    both = densities[0].keys() & densities[1].keys()
    changed = sorted(both, key=lambda idx: -abs(_ratio(densities[0][idx], densities[1][idx])))[:LARGEST_CHANGES]
    return HarvestComparison(
        sae=door.sae,
        harvests=tuple(ids),
        a=sides[0],
        b=sides[1],
        both=len(both),
        only_a=len(densities[0].keys() - both),
        only_b=len(densities[1].keys() - both),
        changes=tuple(DensityChange(idx, densities[0][idx], densities[1][idx]) for idx in changed),
    )


def _ratio(a: float, b: float) -> float:
    return max(a, b) / min(a, b) if min(a, b) > 0 else 0.0


def _densities(session: Session, harvest_id: int) -> dict[int, float]:
    live = sa.select(Feature.idx, Feature.density).where(Feature.harvest_id == harvest_id, Feature.n_fired > 0)
    return {row.idx: row.density for row in session.execute(live)}


def _side(session: Session, door: Door) -> ComparedSae:
    return ComparedSae(door.sae, door.metrics, _histogram(session, door.sae.harvest.id) if door.sae.harvest else ())


def _harvest(session: Session, row: Harvest, corpus: str) -> HarvestSide:
    return HarvestSide(
        row.id, row.status, corpus, row.n_tokens, row.n_rows, row.n_live, row.n_examples, row.context, row.worst_gap,
        row.published_at, row.config, _histogram(session, row.id),
    )  # fmt: skip


def _histogram(session: Session, harvest_id: int) -> tuple[Bin, ...]:
    """Live features by density; the first bar takes whatever is rarer."""
    sums = [
        sa.func.sum(sa.case((sa.and_(Feature.density >= (low if i else 0.0), Feature.density < high), 1), else_=0))
        for i, (low, high) in enumerate(pairwise(DENSITY_EDGES))
    ]
    counts = session.execute(sa.select(*sums).where(Feature.harvest_id == harvest_id, Feature.n_fired > 0)).one()
    return tuple(Bin(low, high, int(n or 0)) for (low, high), n in zip(pairwise(DENSITY_EDGES), counts, strict=True))


def _matched(session: Session, ours: Door, theirs: Door) -> Matched | None:
    pair = {ours.sae.name, theirs.sae.name}
    rows = session.scalars(
        sa.select(Study)
        .where(Study.kind == "compare", Study.sae_id.in_((ours.id, theirs.id)))
        .order_by(Study.created_at.desc(), Study.id.desc())
    )
    study = next((row for row in rows if {row.config["sae"], row.config["against"]} == pair), None)
    if study is None:
        return None
    swapped = study.config["sae"] != ours.sae.name
    result = _turned(study.result) if swapped else study.result
    pairs = [*result["best"], *result["spread"]]
    here, there = result["ours"]["alone"], result["theirs"]["alone"]
    mine = {one["a"] for one in (*pairs, *here)} | {one["b"] for one in there}
    other = {one["b"] for one in (*pairs, *here)} | {one["a"] for one in there}
    published = [door.sae.harvest.published_at for door in (ours, theirs) if door.sae.harvest]
    outdated = any(at is not None and at.replace(tzinfo=None) > study.created_at.replace(tzinfo=None) for at in published)
    told = _told(session, ours, sorted(mine)), _told(session, theirs, sorted(other))
    return Matched(study.id, study.job_id, study.created_at, swapped, result, told[0], told[1], outdated)


def _turned(result: dict[str, Any]) -> dict[str, Any]:
    """The same match, seen from the other SAE. `alone` names each side's own feature first already."""
    turned = {key: [{**one, "a": one["b"], "b": one["a"]} for one in result[key]] for key in ("best", "spread")}
    return {**result, **turned, "ours": result["theirs"], "theirs": result["ours"]}


def _told(session: Session, door: Door, indices: Sequence[int]) -> dict[int, MatchedFeature]:
    if door.sae.harvest is None:
        return {}
    rows = session.execute(
        sa.select(Feature.idx, Feature.family, FeatureDetail.promoted)
        .join(FeatureDetail, FeatureDetail.feature_id == Feature.id)
        .where(Feature.harvest_id == door.sae.harvest.id, Feature.idx.in_(indices))
    )
    return {row.idx: MatchedFeature(row.idx, row.family, tuple(text for _, text, _ in row.promoted[:3])) for row in rows}
