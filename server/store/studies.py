"""Studies: questions put to a feature, or to the heads of a model, with what was found. Written once, never changed."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.config import SAEConfig, TrainConfig
from sae_core.errors import NotFound
from server.tables import SAE, Model, Study


@dataclass(frozen=True)
class StudyLine:
    """A study in a list."""

    id: int
    kind: str
    """specificity, induction, heads, ioi or prefix."""
    title: str
    model: str
    sae: str | None
    feature: int | None
    summary: str
    """What it found, in a line."""
    created_at: datetime


@dataclass(frozen=True)
class StudyRecord:
    """A study with all that it found."""

    id: int
    job_id: str
    kind: str
    title: str
    model: str
    sae: str | None
    feature: int | None
    config: dict[str, Any]
    """One of `AnyStudy` of sae_core/config.py."""
    result: dict[str, Any]
    """`Specificity`, `Induction`, `Heads`, `Ioi` or `Prefix` of sae_core/studies."""
    created_at: datetime


def write(
    session: Session,
    *,
    job_id: str,
    kind: str,
    title: str,
    model_id: int,
    sae_id: int | None,
    feature: int | None,
    config: dict[str, Any],
    result: dict[str, Any],
) -> int:
    """Keep what a job found, once however often the job says it; the study's id."""
    row = session.scalar(sa.select(Study).where(Study.job_id == job_id))
    if row is None:
        row = Study(job_id=job_id)
        session.add(row)
    row.kind, row.title, row.model_id, row.sae_id, row.feature = kind, title, model_id, sae_id, feature
    row.config, row.result = config, result
    session.flush()
    return row.id


def study(session: Session, study_id: int) -> StudyRecord:
    """The study of that id; NotFound without one."""
    found = session.execute(_WHOLE.where(Study.id == study_id)).one_or_none()
    if found is None:
        raise NotFound(f"There is no study {study_id}; /studies lists those there are.", field="study")
    row, model, sae = found
    return StudyRecord(
        row.id, row.job_id, row.kind, row.title, model, sae, row.feature, row.config, row.result, row.created_at
    )  # fmt: skip


def studies(session: Session, sae: str | None = None, feature: int | None = None, limit: int = 200) -> tuple[StudyLine, ...]:
    """Studies, newest first; of one SAE, or of one feature of it."""
    listed = _LISTED if sae is None else _LISTED.where(SAE.name == sae)
    return _lines(session, (listed if feature is None else listed.where(Study.feature == feature)).limit(limit))


def training_of(session: Session, model: str) -> TrainConfig | None:
    """The training of the newest SAE of the model; None where none was trained here."""
    of_model = sa.select(SAE.config).join(Model, Model.id == SAE.model_id).where(Model.name == model).order_by(SAE.id.desc())
    return next((found for config in session.scalars(of_model) if (found := SAEConfig.model_validate(config).train)), None)


def of_job(session: Session, job_id: str) -> int | None:
    """The id of the study that a job made, once it is there."""
    return session.scalar(sa.select(Study.id).where(Study.job_id == job_id))


_WHOLE = (
    sa.select(Study, Model.name, SAE.name)
    .join(Model, Model.id == Study.model_id)
    .outerjoin(SAE, SAE.id == Study.sae_id)
)  # fmt: skip
_SUMMARY = Study.result["summary"].as_string()  # the rest of a result is large
_LISTED = (
    sa.select(
        Study.id,
        Study.kind,
        Study.title,
        Model.name,
        SAE.name,
        Study.feature,
        Study.result["summary"].as_string(),
        Study.created_at,
    )
    .join(Model, Model.id == Study.model_id)
    .outerjoin(SAE, SAE.id == Study.sae_id)
    .order_by(Study.created_at.desc(), Study.id.desc())
)


def _lines(session: Session, listed: sa.Select[Any]) -> tuple[StudyLine, ...]:
    return tuple(StudyLine(*row) for row in session.execute(listed))
