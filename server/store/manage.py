"""Keeping house: SAEs and harvests are described, renamed, archived, deleted."""

import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.errors import JobError, NotFound, UsageError
from server.db import Database
from server.store import stored_harvests
from server.store.home import SaeCard, archived_cards
from server.store.jobs import OPEN, saes_of
from server.store.labels import touch
from server.store.people import LONGEST_TITLE, many_lines, one_line
from server.store.saes import Door, SaeRef
from server.store.viewers import Visibility, check_own, check_visibility, everything, noted
from server.tables import SAE, Account, Corpus, FormerName, Harvest, Job, Label, ListEntry, Model, Note, Review, Star, Study, now

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class HarvestLine:
    """A stored harvest."""

    id: int
    sae: str
    """Name of the SAE."""
    name: str | None
    """What people call it."""
    description: str | None
    """What people say of it."""
    status: str
    """running, published, replaced"""
    corpus: str
    n_tokens: int
    n_live: int
    n_examples: int
    created_at: datetime
    archived_at: datetime | None
    """When it was archived, in UTC; null while it is not."""


@dataclass(frozen=True)
class SaeLine:
    """An SAE as `headscope saes list` shows it."""

    name: str
    model: str
    layer: int
    arch: str
    d_sae: int
    harvest: int | None
    """The one that is shown."""
    archived_at: datetime | None
    description: str | None


@dataclass(frozen=True)
class Belongings:
    """What people wrote about an SAE and its features, and what was made of it: all of it goes with it."""

    labels: int
    notes: int
    stars: int
    list_entries: int
    reviews: int
    studies: int


@dataclass(frozen=True)
class ManagePage:
    """What there is to keep in order about an SAE."""

    sae: SaeRef
    description: str | None
    archived_at: datetime | None
    former_names: tuple[str, ...]
    """They still lead to it."""
    harvests: tuple[HarvestLine, ...]
    """Newest first."""
    belongings: Belongings
    job: str | None
    """An open job that works on it: until it ends nothing is renamed or deleted."""
    visibility: Visibility = "shared"
    """Who sees it, where there are accounts."""
    owner: str | None = None
    """Whose it is; None where it was made without accounts."""


@dataclass(frozen=True)
class ArchivePage:
    """SAEs that the first page leaves out, newest first."""

    saes: tuple[SaeCard, ...]


# ---- reading ----


def manage_page(session: Session, door: Door) -> ManagePage:
    """All there is to keep in order: five queries."""
    whose = sa.select(SAE.visibility, Account.name).outerjoin(Account, Account.id == SAE.owner_id).where(SAE.id == door.id)
    visibility, owner = session.execute(whose).one()
    former = session.scalars(sa.select(FormerName.name).where(FormerName.sae_id == door.id).order_by(FormerName.created_at))
    harvests = harvest_lines(session, door)
    return ManagePage(
        sae=door.sae,
        description=door.description,
        archived_at=door.archived_at,
        former_names=tuple(former),
        harvests=harvests,
        belongings=_belongings(session, door.id),
        job=_open_job(session, door.sae.name, door.job_id),
        visibility=check_visibility(visibility),
        owner=owner,
    )


def archive_page(session: Session) -> ArchivePage:
    """Every archived SAE."""
    return ArchivePage(archived_cards(session))


def sae_lines(session: Session) -> tuple[SaeLine, ...]:
    """Every SAE, by name; archived ones last."""
    columns = (SAE.name, Model.name, SAE.layer, SAE.arch, SAE.d_sae, SAE.harvest_id, SAE.archived_at, SAE.description)
    listed = sa.select(*columns).join(Model, Model.id == SAE.model_id).order_by(SAE.archived_at.is_not(None), SAE.name)
    return tuple(SaeLine(*row) for row in session.execute(listed))


def harvest_line(session: Session, harvest_id: int) -> HarvestLine:
    """The harvest of that id; NotFound without one."""
    found = _harvests(session, Harvest.id == harvest_id)
    if not found:
        raise NotFound(f"There is no harvest {harvest_id}.", field="id")
    return found[0]


def harvest_lines(session: Session, door: Door | None = None) -> tuple[HarvestLine, ...]:
    """Every stored harvest, or those of one SAE, newest first."""
    return tuple(_harvests(session, sa.true() if door is None else Harvest.sae_id == door.id))


def _harvests(session: Session, which: sa.ColumnElement[bool]) -> list[HarvestLine]:
    columns = (
        Harvest.id, SAE.name, Harvest.name, Harvest.description, Harvest.status, Corpus.name, Harvest.n_tokens, Harvest.n_live,
        Harvest.n_examples, Harvest.created_at, Harvest.archived_at,
    )  # fmt: skip
    listed = sa.select(*columns).join(SAE, SAE.id == Harvest.sae_id).join(Corpus, Corpus.id == Harvest.corpus_id)
    return [HarvestLine(*row) for row in session.execute(listed.where(which).order_by(Harvest.id.desc()))]


def _belongings(session: Session, sae_id: int) -> Belongings:
    def n(table: Any, *conditions: sa.ColumnElement[bool]) -> Any:
        return sa.select(sa.func.count()).select_from(table).where(table.sae_id == sae_id, *conditions).scalar_subquery()

    return Belongings(
        *session.execute(
            sa.select(
                n(Label),
                n(Note, Note.deleted_at.is_(None)),
                n(Star),
                n(ListEntry, ListEntry.removed_at.is_(None)),
                n(Review),
                n(Study),
            )
        ).one()
    )


def _open_job(session: Session, name: str, made_by: str | None) -> str | None:
    """An open job that made, measures or sweeps the SAE."""
    jobs = session.execute(everything(sa.select(Job.id, Job.config).where(Job.status.in_(OPEN)).order_by(Job.created_at)))
    return next((job for job, config in jobs if job == made_by or name in (*saes_of(config), *config.get("against", ()))), None)


# ---- writing ----


def describe(session: Session, door: Door, name: str, description: str) -> str:
    """Give an SAE another name and description; its name now. A name that it gives up still leads to it."""
    row = _idle(session, door) if name.strip() != door.sae.name else session.get_one(SAE, door.id, with_for_update=True)
    check_own(session, row, f"rename or describe {row.name}")
    row.description = many_lines(description, "description", field="description", empty=True) or None
    if name.strip() != row.name:
        _rename(session, row, name.strip())
    touch(session, [row.id])
    return row.name


def _rename(session: Session, row: SAE, name: str) -> None:
    if not NAME.fullmatch(name) or name.endswith(".json"):
        raise UsageError(
            f"'{name[:60]}' is no name for an SAE: at most 100 letters, digits, dots, dashes and underscores, with a letter or "
            "a digit first, and not .json at the end.",
            field="name",
        )
    former = session.scalar(everything(sa.select(FormerName).where(FormerName.name == name)))
    if session.scalar(everything(sa.select(SAE.id).where(SAE.name == name))) or (former and former.sae_id != row.id):
        raise UsageError(f"The name {name} is taken{' and still leads to another SAE' if former else ''}.", field="name")
    if former:
        session.delete(former)
    session.add(FormerName(name=row.name, sae_id=row.id))
    row.name = name


def archive(session: Session, door: Door, on: bool) -> None:
    """Leave an SAE out of the first page, or bring it back; its pages stay."""
    row = session.get_one(SAE, door.id, with_for_update=True)
    check_own(session, row, f"archive {row.name}")
    row.archived_at = now() if on else None
    touch(session, [door.id])


def set_visibility(session: Session, door: Door, visibility: str) -> None:
    """Say who sees an SAE. The training that made it alone is seen as it is."""
    row = session.get_one(SAE, door.id, with_for_update=True)
    check_own(session, row, f"say who sees {row.name}")
    row.visibility = check_visibility(visibility)
    alone = sa.select(sa.func.count()).where(SAE.job_id == Job.id).scalar_subquery() == 1
    session.execute(
        sa.update(Job)
        .where(Job.id == row.job_id, alone)
        .values(visibility=row.visibility, owner_id=row.owner_id)
        .execution_options(synchronize_session=False)
    )
    noted(session, visibility=row.visibility)
    touch(session, [row.id])


def give(session: Session, door: Door, account_id: int) -> None:
    """Make an SAE somebody else's."""
    row = session.get_one(SAE, door.id, with_for_update=True)
    check_own(session, row, f"give {row.name} away")
    row.owner_id = account_id


def describe_harvest(session: Session, harvest_id: int, name: str, description: str) -> None:
    """Give a harvest a name and a description; empty ones take them away."""
    row = _harvest(session, harvest_id)
    row.name = one_line(name, "name", LONGEST_TITLE, field="name", empty=True) or None
    row.description = many_lines(description, "description", field="description", empty=True) or None


def archive_harvest(session: Session, harvest_id: int, on: bool) -> None:
    """Move a harvest to the end of the list, or back; nothing of it is deleted."""
    _harvest(session, harvest_id).archived_at = now() if on else None


def delete_sae(db: Database, door: Door, data: Path) -> None:
    """Delete an SAE: harvests, what people wrote, studies, its row, and its folder. Broken off, it is to be called again."""
    with db.write() as session:
        row = _idle(session, door)
        check_own(session, row, f"delete {row.name}")
        row.archived_at = row.archived_at or now()  # half deleted, it stands on no first page
        folder = row.folder
        harvests = session.scalars(sa.select(Harvest.id).where(Harvest.sae_id == door.id)).all()
    for harvest_id in harvests:
        stored_harvests.delete(db, harvest_id, force=True)
    with db.write() as session:
        _idle(session, door)
        session.execute(everything(sa.delete(Study).where(Study.sae_id == door.id)))
        session.execute(sa.delete(SAE).where(SAE.id == door.id))
    weights, saes = (data / folder).resolve(), (data / "saes").resolve()
    if weights.is_relative_to(saes) and weights != saes:  # one that was imported where it lay is left there
        shutil.rmtree(weights, ignore_errors=True)


def _idle(session: Session, door: Door) -> SAE:
    """The SAE, locked; JobError while a job works on it."""
    row = session.get(SAE, door.id, with_for_update=True)
    if row is None:
        raise NotFound(f"{door.sae.name} was deleted.", field="sae")
    if job := _open_job(session, row.name, row.job_id):
        raise JobError(f"The job {job} works on {row.name}; wait for its end or cancel it first.")
    return row


def _harvest(session: Session, harvest_id: int) -> Harvest:
    row = session.get(Harvest, harvest_id, with_for_update=True)
    if row is None:
        raise NotFound(f"There is no harvest {harvest_id}.", field="id")
    check_own(session, session.get_one(SAE, row.sae_id), "change this harvest")
    return row
