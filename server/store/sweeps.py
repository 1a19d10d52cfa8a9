"""A sweep's table: each of its runs, what it is at now, and what its SAE was measured to be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.orm import Session

from sae_core.config import SweepConfig, TrainConfig
from sae_core.errors import NotFound, Unfitting
from server.store import jobs
from server.store.jobs import JobRecord
from server.tables import SAE, Job, JobPoint, Model

Text = Literal["prose", "repeated"]
Measure = Literal["ce", "kl"]
Ablation = Literal["zero", "mean"]
SORTS = ("run", "layer", "arch", "k", "expansion", "seed", "l0", "fvu", "zero", "mean", "dead", "gamma", "rate")


@dataclass(frozen=True)
class Kept:
    """How much of what an ablation costs the SAE keeps."""

    value: float | None
    """1 - loss(SAE) / loss(ablation), both over the clean model's; None where it is withheld or not measured."""
    low: float | None
    high: float | None
    """Its 95 % interval. The two losses are measured on the same rows; taken as independent, which widens it a little."""
    note: str | None
    """Why it is withheld."""


@dataclass(frozen=True)
class SweepRun:
    """One training run of a sweep."""

    index: int
    label: str
    """What tells it from the others."""
    sae: str
    """Name of its SAE, which has a page once it is `evaluated`."""
    layer: int
    arch: str
    k: int
    expansion: int
    seed: int
    state: str
    """waiting, training, trained (all are, and evaluation has begun), evaluated; diverged, known at the sweep's end."""
    step: int | None
    """Of the newest point of its curves."""
    l0: float | None
    """On held-out tokens once it is evaluated, of the newest training batch before; so are `fvu` and `dead`."""
    fvu: float | None
    dead: float | None
    gamma: float | None
    """Relative reconstruction bias, 1 where nothing shrinks; known once it is evaluated."""
    rate: float | None
    """Tokens per second of training, model pass not counted."""
    kept: dict[str, Kept]
    """By text, measure and ablation: `prose ce zero`."""


@dataclass(frozen=True)
class SweepRecord:
    """A sweep with its runs."""

    job: JobRecord
    name: str
    model: str
    corpus: str
    tokens: int
    layers: tuple[int, ...]
    runs: tuple[SweepRun, ...]
    """In the order of the config; none while it is not known how many layers `all` are."""


@dataclass(frozen=True)
class SweepLine:
    """A sweep in a list."""

    id: str
    title: str
    status: str
    saes: int
    """Published so far."""


class SweepQuery(BaseModel):
    """How a sweep's page is looked at. Its address is exactly this."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    layer: int | None = Field(None, ge=0)
    """Only runs on this layer."""
    text: Text = "prose"
    """What the model reads while the SAE stands in: held-out text, or random tokens said twice."""
    measure: Measure = "ce"
    """What the model loses: cross-entropy, or divergence from its own predictions."""
    against: Ablation = "zero"
    """What the loss is compared with: z replaced by zero, or by its mean."""
    sort: str = "run"
    """Column to sort by; a leading `-` turns the order round."""

    @model_validator(mode="after")
    def _known_sort(self) -> Self:
        if self.key not in SORTS:
            raise Unfitting(f"there is no column '{self.key}' to sort by; the columns are {', '.join(SORTS)}", field="sort")
        return self

    @property
    def key(self) -> str:
        """The column, without its direction."""
        return self.sort.removeprefix("-")

    @property
    def descending(self) -> bool:
        """Largest first."""
        return self.sort.startswith("-")

    def asked(self, **changes: Any) -> dict[str, Any]:
        """The parameters of the address that differ from the defaults, with some of them changed."""
        fields = type(self).model_fields
        values = self.model_dump() | changes
        return {name: value for name, value in values.items() if value not in (None, fields[name].default)}


def sweep_name(sweep_id: str) -> str:
    """The name of a sweep, with which the names of its SAEs begin: `sweep-x-1` is `x`, `sweep-x-2` is `x-2`."""
    return sweep_id.removeprefix("sweep-").removesuffix("-1")


def run_names(sweep_id: str, cfg: SweepConfig, runs: Sequence[TrainConfig]) -> list[str]:
    """The names of the SAEs that a sweep's runs make, in their order."""
    return ["-".join(filter(None, (sweep_name(sweep_id), cfg.label(run)))) for run in runs]


def sweep(session: Session, job_id: str) -> SweepRecord:
    """The sweep as it stands: four queries. NotFound where the job is none."""
    job = jobs.get(session, job_id)
    if job.kind != "sweep":
        raise NotFound(f"The job {job_id} is no sweep; its page is /jobs/{job_id}.", field="job")
    cfg = SweepConfig.model_validate(job.config)
    n_layers = session.scalar(sa.select(Model.n_layers).where(Model.name == cfg.base.model))
    runs = cfg.runs(n_layers or 1) if n_layers or cfg.layers != "all" else ()
    made = {row.run: row for row in session.execute(_MADE, {"job": job_id})}
    newest = {row.run: row for row in session.execute(_NEWEST, {"job": job_id})}
    names = run_names(job_id, cfg, runs)
    missing = "diverged" if job.status == jobs.DONE else "trained" if job.phase == "evaluate" else "training"
    found = [
        _run(index, cfg.label(one), names[index], one, made.get(index), newest.get(index), missing)
        for index, one in enumerate(runs)
    ]
    return SweepRecord(
        job,
        sweep_name(job_id),
        cfg.base.model,
        cfg.base.corpus,
        cfg.base.rows.tokens,
        tuple(sorted({r.layer for r in found})),
        tuple(found),
    )


def chosen(record: SweepRecord, query: SweepQuery) -> tuple[SweepRun, ...]:
    """The runs that the query asks for, in its order; what has no value comes last."""
    runs = [run for run in record.runs if query.layer in (None, run.layer)]

    def value(run: SweepRun) -> Any:
        if query.key in ("zero", "mean"):
            kept = run.kept.get(f"{query.text} {query.measure} {query.key}")
            return kept.value if kept else None
        return run.index if query.key == "run" else getattr(run, query.key)

    known = sorted((run for run in runs if value(run) is not None), key=value, reverse=query.descending)
    return (*known, *(run for run in runs if value(run) is None))


def sweeps(session: Session, limit: int = 20) -> tuple[SweepLine, ...]:
    """Sweeps, newest first."""
    count = sa.select(sa.func.count()).where(SAE.job_id == Job.id).scalar_subquery()
    listed = sa.select(Job.id, Job.title, Job.status, count).where(Job.kind == "sweep").order_by(Job.created_at.desc(), Job.id)
    return tuple(SweepLine(*row) for row in session.execute(listed.limit(limit)))


_MADE = sa.select(SAE.run, SAE.name, SAE.metrics).where(SAE.job_id == sa.bindparam("job"))
_LAST = (
    sa.select(JobPoint.run, sa.func.max(JobPoint.step).label("step"))
    .where(JobPoint.job_id == sa.bindparam("job"))
    .group_by(JobPoint.run)
    .subquery()
)
_NEWEST = sa.select(JobPoint.run, JobPoint.step, JobPoint.values).join(
    _LAST, sa.and_(JobPoint.job_id == sa.bindparam("job"), JobPoint.run == _LAST.c.run, JobPoint.step == _LAST.c.step)
)


def _run(
    index: int, label: str, sae: str, cfg: TrainConfig, made: sa.Row[Any] | None, newest: sa.Row[Any] | None, missing: str
) -> SweepRun:
    metrics = made.metrics if made else {}
    values = newest.values if newest else {}
    fit = metrics.get("reconstruction") or {}
    return SweepRun(
        index=index,
        label=label,
        sae=made.name if made else sae,
        layer=cfg.site.layer,
        arch=cfg.arch,
        k=cfg.k,
        expansion=cfg.expansion,
        seed=cfg.seed,
        state="evaluated" if made else "waiting" if missing == "training" and not newest else missing,
        step=newest.step if newest else None,
        l0=fit.get("l0", values.get("l0")),
        fvu=fit.get("fvu", values.get("fvu")),
        dead=fit.get("dead", values.get("dead")),
        gamma=fit.get("gamma"),
        rate=values.get("rate"),
        kept=_all_kept(metrics),
    )


def _all_kept(metrics: dict[str, Any]) -> dict[str, Kept]:
    found = {}
    for text in ("prose", "repeated"):
        ce = metrics.get(text) or {}
        for against in ("zero", "mean"):
            if f"{against}_minus_clean" in ce:
                shares = (ce.get("sae_minus_clean"), ce.get(f"{against}_minus_clean"))
                found[f"{text} ce {against}"] = _kept(*shares, ce.get(f"recovered_{against}"), ce.get("note"))
            if ce.get(f"{against}_kl"):
                shares = (ce.get("sae_kl"), ce.get(f"{against}_kl"))
                found[f"{text} kl {against}"] = _kept(*shares, ce.get(f"kl_recovered_{against}"), ce.get("note"))
    return found


def _kept(sae: dict[str, Any] | None, ablated: dict[str, Any] | None, value: float | None, note: str | None) -> Kept:
    """A share 1 - a / b with the interval that follows from those of a and b, to first order: the relative errors of a ratio
    add in squares."""
    if value is None:
        return Kept(None, None, None, note or "not measured")
    halves = [_half(one) for one in (sae, ablated)]
    if sae is None or ablated is None or None in halves or not ablated["mean"]:
        return Kept(value, None, None, None)
    ratio, half_a, half_b = 1.0 - value, halves[0] or 0.0, halves[1] or 0.0
    half = ((half_a / ablated["mean"]) ** 2 + (ratio * half_b / ablated["mean"]) ** 2) ** 0.5
    return Kept(value, value - half, value + half, None)


def _half(interval: dict[str, Any] | None) -> float | None:
    if not interval or interval.get("low") is None or interval.get("high") is None:
        return None
    return float(interval["high"] - interval["low"]) / 2
