"""An SAE's door and its overview."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from itertools import islice, pairwise
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.errors import NotFound, Renamed
from server.db import read_stored
from server.store.kept import kept
from server.store.viewers import seen_metrics, sees_all
from server.tables import SAE, Corpus, Feature, FormerName, Harvest, Job, JobPoint, Model

DENSITY_EDGES = tuple(10 ** (exponent / 3) for exponent in range(-18, 1))
"""Edges of the density histogram: 10^-6 to 1, three bars a decade; the first bar takes whatever is rarer."""


@dataclass(frozen=True)
class HarvestRef:
    """The published sweep that a page's numbers come from."""

    id: int
    corpus: str
    n_tokens: int
    n_rows: int
    """Rows of text that were swept."""
    n_live: int
    n_examples: int
    context: int
    """Tokens of a row."""
    worst_gap: float | None
    """Largest gap of any example between DFA with biases and the pre-activation; null where DFA lacks."""
    config: dict[str, Any]
    published_at: datetime | None
    """When it was published, in UTC."""
    source: dict[str, Any] | None = None
    """Of a harvest that was not made here: its format, its path, what it has of DFA, and what it lacks."""


@dataclass(frozen=True)
class SaeRef:
    """Which SAE a page is about."""

    name: str
    model: str
    layer: int
    hook: str
    """Name of the site that it reads."""
    arch: str
    d_in: int
    d_sae: int
    k: int
    """Active features per token that training held or aimed at."""
    n_heads: int
    sha256: str
    """Hash of its weights' file."""
    harvest: HarvestRef | None
    """The published one; null before there is one."""

    @property
    def no_family(self) -> str:
        """What stands where a feature has no family: an imported harvest never looked for one."""
        return "–" if self.harvest is not None and self.harvest.source else "unclear"


@dataclass(frozen=True)
class Door:
    """What one query finds out about an SAE before a page is made."""

    id: int
    sae: SaeRef
    job_id: str | None
    run: int
    created_at: datetime
    revision: int
    """Raised by what people write about it and its features."""
    description: str | None
    archived_at: datetime | None
    stored_config: Any
    """`config` as the driver gave it, and below `metrics`: the most of an SAE's row, and few pages look at them."""
    stored_metrics: Any

    @cached_property
    def config(self) -> dict[str, Any]:
        """How it was trained."""
        found: dict[str, Any] = read_stored(self.stored_config)
        return found

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """What is known of how good it is."""
        found: dict[str, Any] = read_stored(self.stored_metrics)
        return found


@dataclass(frozen=True)
class Count:
    """How many features have something in common."""

    key: int | str
    """What they have in common: a head, a family."""
    features: int
    """How many there are."""


@dataclass(frozen=True)
class Bin:
    """A bar of a histogram: `low` <= value < `high`."""

    low: float
    high: float
    count: int


@dataclass(frozen=True)
class CurvePoint:
    """What training measured at a step."""

    step: int
    """Batches trained on."""
    values: dict[str, Any]
    """What was measured, by name."""


@dataclass(frozen=True)
class HarvestRun:
    """A harvest that is on its way."""

    job_id: str
    """Id of its job."""
    status: str
    phase: str | None
    done: int
    """How much of the phase is done."""
    total: int
    """How much the phase is in all."""


@dataclass(frozen=True)
class SaeOverview:
    """An SAE as a whole: how good it is, how it was trained, what its features are like."""

    sae: SaeRef
    """Which SAE."""
    created_at: datetime
    job_id: str | None
    """Id of the job that made it; null where none did."""
    config: dict[str, Any]
    metrics: dict[str, Any]
    description: str | None
    """What people say of it."""
    archived_at: datetime | None
    """When it was archived, in UTC; null while it is not."""
    curve: tuple[CurvePoint, ...]
    """How training went, step by step."""
    density: tuple[Bin, ...]
    """Live features by density."""
    led_by_head: tuple[Count, ...]
    """Live features by the head with the largest decoder norm; every head is listed."""
    families: tuple[Count, ...]
    """Live features by family, most first, equal ones by name; `unclear` for those of none."""
    dead: int
    """Features that never fired."""
    running: HarvestRun | None
    """The harvest under way, looked up only while none is published."""


def find_sae(session: Session, name: str) -> Door:
    """The SAE called `name` with its published harvest; Renamed when it once was, else NotFound with those there are."""
    door = _door(session, _BY_NAME, name)
    if door is None:
        if now_called := current_name(session, name):
            raise Renamed(name, now_called)
        raise NotFound(_unknown(name, session.scalars(sa.select(SAE.name).order_by(SAE.name).limit(6)).all()), field="sae")
    return door


def sae_by_id(session: Session, sae_id: int) -> Door:
    """The SAE of that id."""
    door = _door(session, _BY_ID, sae_id)
    if door is None:
        raise NotFound("That SAE was deleted.", field="sae")
    return door


_STORED = sa.Text()
"""Type of a JSON column that is not read yet. PostgreSQL's driver reads it all the same."""
_HARVEST = (
    Harvest.id, sa.func.coalesce(Corpus.name, ""), Harvest.n_tokens, Harvest.n_rows, Harvest.n_live, Harvest.n_examples,
    Harvest.context, Harvest.worst_gap, Harvest.config, Harvest.published_at, Harvest.source,
)  # fmt: skip
_SAE = (
    SAE.name, Model.name, SAE.layer, SAE.hook, SAE.arch, SAE.d_in, SAE.d_sae, SAE.k, SAE.n_heads, SAE.sha256,
)  # fmt: skip
_BESIDE = (
    SAE.job_id, SAE.run, SAE.created_at, SAE.revision, SAE.description, SAE.archived_at,
    sa.type_coerce(SAE.config, _STORED).label("config"), sa.type_coerce(SAE.metrics, _STORED).label("metrics"),
)  # fmt: skip
"""Columns in the order of `HarvestRef`, `SaeRef` and `Door`: the door of every page, so of columns and no objects."""
_DOOR: sa.Select[*tuple[Any, ...]] = (
    sa.select(SAE.id, *_HARVEST, *_SAE, *_BESIDE)
    .join(Model, Model.id == SAE.model_id)
    .outerjoin(Harvest, Harvest.id == SAE.harvest_id)
    .outerjoin(Corpus, Corpus.id == Harvest.corpus_id)
)
_BY_NAME, _BY_ID = _DOOR.where(SAE.name == sa.bindparam("which")), _DOOR.where(SAE.id == sa.bindparam("which"))
"""Made once: every page begins with one of them, and making it took longer than the database does."""


def _door(session: Session, statement: sa.Select[*tuple[Any, ...]], which: str | int) -> Door | None:
    found = session.execute(statement, {"which": which}).one_or_none()
    if found is None:
        return None
    columns = iter(found)
    sae_id, harvest, sae = next(columns), list(islice(columns, len(_HARVEST))), list(islice(columns, len(_SAE)))
    sae.append(None if harvest[0] is None else HarvestRef(*harvest))
    *beside, metrics = columns
    beside.append(metrics if sees_all(session) else seen_metrics(session, read_stored(metrics)))
    return Door(sae_id, SaeRef(*sae), *beside)


def current_name(session: Session, former: str) -> str | None:
    """What the SAE that was called `former` is called now; None where no SAE gave up that name."""
    return session.scalar(sa.select(SAE.name).join(FormerName, FormerName.sae_id == SAE.id).where(FormerName.name == former))


def newest_of_each_layer(session: Session, model: Model) -> tuple[SaeRef, ...]:
    """The newest SAE with a published harvest of every layer that has one, by layer; none that is archived."""
    found = session.execute(
        sa.select(SAE, Harvest, Corpus.name)
        .join(Harvest, Harvest.id == SAE.harvest_id)
        .join(Corpus, Corpus.id == Harvest.corpus_id)
        .where(SAE.model_id == model.id, SAE.archived_at.is_(None))
        .order_by(SAE.created_at.desc(), SAE.id.desc())
    )
    newest: dict[int, SaeRef] = {}
    for row, harvest, corpus in found:
        newest.setdefault(row.layer, sae_ref(row, model.name, harvest, corpus))
    return tuple(newest[layer] for layer in sorted(newest))


def _unknown(name: str, known: Sequence[str]) -> str:
    there_are = f"There are: {', '.join(known)}." if known else "There are none yet."
    return f"There is no SAE called '{name}'. {there_are}"


def sae_ref(row: SAE, model: str, harvest: Harvest | None, corpus: str | None) -> SaeRef:
    """A row of the database as pages name it."""
    ref = None if harvest is None else HarvestRef(
        harvest.id, corpus or "", harvest.n_tokens, harvest.n_rows, harvest.n_live, harvest.n_examples,
        harvest.context, harvest.worst_gap, harvest.config, harvest.published_at, harvest.source,
    )  # fmt: skip
    return SaeRef(
        row.name, model, row.layer, row.hook, row.arch, row.d_in, row.d_sae, row.k, row.n_heads, row.sha256, ref
    )  # fmt: skip


def sae_overview(session: Session, door: Door) -> SaeOverview:
    """Everything above the feature table."""
    harvest = door.sae.harvest
    groups = kept(session, harvest, "groups", partial(_feature_groups, session, harvest.id)) if harvest else []
    led: defaultdict[int, int] = defaultdict(int)
    families: defaultdict[str, int] = defaultdict(int)
    for group in groups:
        led[group.top_head] += group.live
        families[group.family or "unclear"] += group.live
    counts = [sum(getattr(group, f"bin{i}") or 0 for group in groups) for i in range(len(DENSITY_EDGES) - 1)]
    return SaeOverview(
        sae=door.sae,
        created_at=door.created_at,
        job_id=door.job_id,
        config=door.config,
        metrics=door.metrics,
        description=door.description,
        archived_at=door.archived_at,
        curve=_curve(session, door.job_id, door.run),
        density=tuple(Bin(DENSITY_EDGES[i], DENSITY_EDGES[i + 1], n) for i, n in enumerate(counts)) if harvest else (),
        led_by_head=tuple(Count(head, led[head]) for head in range(door.sae.n_heads)) if harvest else (),
        families=tuple(Count(name, n) for name, n in sorted(families.items(), key=lambda item: (-item[1], item[0])) if n),
        dead=sum(group.n - group.live for group in groups),
        running=None if harvest else _running_harvest(session, door.id),
    )


def _feature_groups(session: Session, harvest_id: int) -> Sequence[sa.Row[Any]]:
    # One scan answers four charts. Sums of CASE, since log10 is not in every build of SQLite.
    live = Feature.n_fired > 0
    bins = []
    for i, (low, high) in enumerate(pairwise(DENSITY_EDGES)):
        inside = sa.and_(live, Feature.density < high if i == 0 else sa.and_(Feature.density >= low, Feature.density < high))
        bins.append(sa.func.sum(sa.case((inside, 1), else_=0)).label(f"bin{i}"))
    return session.execute(
        sa.select(
            Feature.top_head,
            Feature.family,
            sa.func.count().label("n"),
            sa.func.sum(sa.case((live, 1), else_=0)).label("live"),
            *bins,
        )
        .where(Feature.harvest_id == harvest_id)
        .group_by(Feature.top_head, Feature.family)
    ).all()


def _curve(session: Session, job_id: str | None, run: int) -> tuple[CurvePoint, ...]:
    if job_id is None:
        return ()
    mine = sa.select(JobPoint.step, JobPoint.values).where(JobPoint.job_id == job_id, JobPoint.run == run)
    return tuple(CurvePoint(step, values) for step, values in session.execute(mine.order_by(JobPoint.step)))


def _running_harvest(session: Session, sae_id: int) -> HarvestRun | None:
    row = session.execute(
        sa.select(Job.id, Job.status, Job.phase, Job.done, Job.total)
        .join(Harvest, Harvest.job_id == Job.id)
        .where(Harvest.sae_id == sae_id)
        .order_by(Harvest.id.desc())
        .limit(1)
    ).one_or_none()
    return HarvestRun(*row) if row else None


def saes_made_by(session: Session, job_id: str, named: Sequence[str]) -> tuple[str, ...]:
    """The names of the SAEs that are `named`, or else of the one that a job trained, as far as they are there."""
    return tuple(
        session.scalars(sa.select(SAE.name).where(SAE.name.in_(named) if named else SAE.job_id == job_id).order_by(SAE.name))
    )
