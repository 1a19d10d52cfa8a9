"""Labels, notes and stars of features. They belong to (SAE, index), so a new harvest leaves them as they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session, aliased

from sae_core.errors import NotFound, Outdated
from server.store.people import LONGEST_AUTHOR, LONGEST_LABEL, LONGEST_TEXT, many_lines, one_line
from server.store.saes import SaeRef
from server.tables import SAE, FeatureList, Harvest, Label, ListEntry, Note, Star, now

PERSON = "person"
"""The method of a label that somebody typed."""


@dataclass(frozen=True)
class LabelRecord:
    """A label, holding or ended."""

    id: int
    text: str
    author: str
    method: str
    """`person`, or what made it."""
    created_at: datetime
    follows: int | None
    """Id of the label that it superseded."""
    ended: Literal["superseded", "withdrawn"] | None
    """How it ended; null while it holds."""
    ended_at: datetime | None
    """When it ended, in UTC."""
    ended_by: str | None
    """Who ended it."""


@dataclass(frozen=True)
class NoteRecord:
    """A note; of a deleted one only who deleted it, and when."""

    id: int
    text: str | None
    author: str
    created_at: datetime
    deleted_at: datetime | None
    deleted_by: str | None


@dataclass(frozen=True)
class ListChoice:
    """A list, as a feature's page offers it."""

    id: int
    name: str
    holds: bool
    """Whether the feature is in it."""


@dataclass(frozen=True)
class FeatureLabels:
    """What people wrote about a feature."""

    sae: SaeRef
    """Which SAE."""
    index: int
    labels: tuple[LabelRecord, ...]
    """Those that hold, the one shown first."""
    history: tuple[LabelRecord, ...]
    """Those that ended, newest first."""
    notes: tuple[NoteRecord, ...]
    """Oldest first."""
    stars: tuple[str, ...]
    """Who starred it."""
    lists: tuple[ListChoice, ...]
    """Every list, the last changed first."""


class LabelQuery(BaseModel):
    """Which labels are listed. The address of the page is exactly this."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    q: str = Field("", max_length=LONGEST_LABEL)
    """Only those that contain this, in upper or lower case."""
    sae: str = Field("", max_length=200)
    """Only those of this SAE's features."""
    author: str = Field("", max_length=LONGEST_AUTHOR)
    """Only this person's; of stars, whose."""
    starred: bool = False
    """Features that were starred, whether labelled or not."""
    before: int | None = Field(None, ge=0, le=2**31 - 1)
    """Only labels older than the one of this id: the next page."""
    limit: int = Field(100, ge=1, le=1000)
    """Rows on a page."""


@dataclass(frozen=True)
class LabelLine:
    """A label in a list, or a starred feature with the label shown."""

    id: int | None
    """Id of the label; null of a star whose feature has none."""
    sae: str
    """Name of the SAE."""
    index: int
    text: str | None
    """The label; null where there is none."""
    author: str
    """Who wrote the label, or gave the star."""
    method: str | None
    """`person`, or what made it."""
    created_at: datetime


@dataclass(frozen=True)
class LabelsPage:
    """Labels that hold, newest first; or features that were starred."""

    query: LabelQuery
    """What was asked, with defaults filled in."""
    lines: tuple[LabelLine, ...]
    """The labels or stars of this page."""
    next: int | None
    """`before` of the next page; None on the last."""


@dataclass(frozen=True)
class ListName:
    """A list, as the feature table's filter offers it."""

    id: int
    name: str


class LabelFound(NamedTuple):
    """A label that contains what was looked for."""

    id: int
    idx: int
    text: str


# ---- reading ----

_HOLDS = Label.ended_at.is_(None)


def shown_label(sae_id: Any, idx: Any) -> Any:
    """A column: the label shown for the feature `idx` of the SAE, NULL where it has none. A person's before a method's, the
    newest first."""
    return (
        sa.select(Label.text)
        .where(Label.sae_id == sae_id, Label.idx == idx, _HOLDS)
        .order_by(Label.method != PERSON, Label.id.desc())
        .limit(1)
        .scalar_subquery()
    )


def labelled(harvest_id: int, idx: Any, containing: str | None = None) -> sa.ColumnElement[bool]:
    """A condition: the feature `idx` of the harvest's SAE has a label, one that contains some text if that is given."""
    of_sae = sa.select(Harvest.sae_id).where(Harvest.id == harvest_id).scalar_subquery()
    found = sa.select(Label.idx).where(Label.sae_id == of_sae, _HOLDS)
    found = found if containing is None else found.where(Label.text.icontains(containing, autoescape=True))
    there: sa.ColumnElement[bool] = idx.in_(found)
    return there


def listed(harvest_id: int, idx: Any, list_id: int) -> sa.ColumnElement[bool]:
    """A condition: the feature `idx` of the harvest's SAE is in a list."""
    of_sae = sa.select(Harvest.sae_id).where(Harvest.id == harvest_id).scalar_subquery()
    held = (ListEntry.list_id == list_id, ListEntry.sae_id == of_sae, ListEntry.removed_at.is_(None))
    there: sa.ColumnElement[bool] = idx.in_(sa.select(ListEntry.idx).where(*held))
    return there


def lists_of(session: Session, sae_id: int) -> tuple[ListName, ...]:
    """The lists that hold features of an SAE, by name."""
    mine = sa.and_(ListEntry.list_id == FeatureList.id, ListEntry.sae_id == sae_id, ListEntry.removed_at.is_(None))
    found = sa.select(FeatureList.id, FeatureList.name).join(ListEntry, mine).where(FeatureList.deleted_at.is_(None)).distinct()
    return tuple(ListName(*row) for row in session.execute(found.order_by(FeatureList.name, FeatureList.id)))


def labels_containing(session: Session, sae_id: int, text: str, before: int | None, limit: int) -> list[LabelFound]:
    """Features of an SAE with a label that contains `text`, in upper or lower case: the newest such label of each, newest
    first, those older than the label `before`."""
    newest = sa.func.max(Label.id).label("id")
    found = sa.select(newest).where(Label.sae_id == sae_id, _HOLDS, Label.text.icontains(text, autoescape=True))
    found = found.group_by(Label.idx)
    if before is not None:
        found = found.having(newest < before)
    chosen = found.order_by(newest.desc()).limit(limit).subquery()
    rows = session.execute(sa.select(Label.id, Label.idx, Label.text).join(chosen, chosen.c.id == Label.id))
    return sorted((LabelFound(*row) for row in rows), reverse=True)


def feature_labels(session: Session, sae: SaeRef, sae_id: int, index: int) -> FeatureLabels:
    """All that people wrote about a feature: four queries."""
    rows = session.scalars(sa.select(Label).where(Label.sae_id == sae_id, Label.idx == index).order_by(Label.id.desc())).all()
    followed = {row.follows_id for row in rows}
    records = [_label(row, row.id in followed) for row in rows]
    notes = session.scalars(sa.select(Note).where(Note.sae_id == sae_id, Note.idx == index).order_by(Note.id))
    stars = session.scalars(sa.select(Star.author).where(Star.sae_id == sae_id, Star.idx == index).order_by(Star.created_at))
    return FeatureLabels(
        sae=sae,
        index=index,
        labels=tuple(sorted((one for one in records if one.ended is None), key=lambda one: one.method != PERSON)),
        history=tuple(one for one in records if one.ended is not None),
        notes=tuple(_note(row) for row in notes),
        stars=tuple(stars),
        lists=_lists(session, sae_id, index),
    )


def _label(row: Label, followed: bool) -> LabelRecord:
    ended: Literal["superseded", "withdrawn"] | None = None
    if row.ended_at is not None:
        ended = "superseded" if followed else "withdrawn"
    return LabelRecord(
        row.id, row.text, row.author, row.method, row.created_at, row.follows_id, ended, row.ended_at, row.ended_by
    )  # fmt: skip


def _note(row: Note) -> NoteRecord:
    text = row.text if row.deleted_at is None else None
    return NoteRecord(row.id, text, row.author, row.created_at, row.deleted_at, row.deleted_by)


def _lists(session: Session, sae_id: int, index: int) -> tuple[ListChoice, ...]:
    entry = sa.and_(
        ListEntry.list_id == FeatureList.id, ListEntry.sae_id == sae_id, ListEntry.idx == index, ListEntry.removed_at.is_(None)
    )
    rows = session.execute(
        sa.select(FeatureList.id, FeatureList.name, ListEntry.id.is_not(None))
        .outerjoin(ListEntry, entry)
        .where(FeatureList.deleted_at.is_(None))
        .order_by(FeatureList.changed_at.desc(), FeatureList.id.desc())
    )
    return tuple(ListChoice(id, name, holds) for id, name, holds in rows)


def labels_page(session: Session, query: LabelQuery) -> LabelsPage:
    """The labels that `query` asks for."""
    listed = _starred(query) if query.starred else _labels(query)
    if query.sae:
        listed = listed.where(SAE.name == query.sae)
    found = session.execute(listed.limit(query.limit + 1)).all()
    lines = tuple(LabelLine(*row) for row in found[: query.limit])
    more = len(found) > query.limit and not query.starred
    return LabelsPage(query, lines, lines[-1].id if more else None)


def _labels(query: LabelQuery) -> sa.Select[*tuple[Any, ...]]:
    listed: sa.Select[*tuple[Any, ...]] = (
        sa.select(Label.id, SAE.name, Label.idx, Label.text, Label.author, Label.method, Label.created_at)
        .join(SAE, SAE.id == Label.sae_id)
        .where(_HOLDS)
        .order_by(Label.id.desc())
    )
    if query.q:
        listed = listed.where(Label.text.icontains(query.q, autoescape=True))
    if query.author:
        listed = listed.where(Label.author == query.author)
    return listed if query.before is None else listed.where(Label.id < query.before)


def _starred(query: LabelQuery) -> sa.Select[*tuple[Any, ...]]:
    label = aliased(Label)
    text = shown_label(Star.sae_id, Star.idx)
    listed = (
        sa.select(sa.null(), SAE.name, Star.idx, text, Star.author, sa.null(), Star.created_at)
        .join(SAE, SAE.id == Star.sae_id)
        .order_by(Star.created_at.desc(), Star.sae_id, Star.idx)
    )
    if query.author:
        listed = listed.where(Star.author == query.author)
    if query.q:
        holding = sa.exists().where(label.sae_id == Star.sae_id, label.idx == Star.idx, label.ended_at.is_(None))
        listed = listed.where(holding.where(label.text.icontains(query.q, autoescape=True)))
    return listed


# ---- writing ----


def touch(session: Session, sae_ids: Sequence[int]) -> None:
    """Note that people wrote about these SAEs, so that no browser takes its old page for the newest."""
    session.execute(sa.update(SAE).where(SAE.id.in_(sae_ids)).values(revision=SAE.revision + 1))


def add_label(session: Session, sae_id: int, index: int, text: str, author: str, *, method: str = PERSON) -> int:
    """Give a feature a label; its id."""
    row = Label(sae_id=sae_id, idx=index, text=_label_text(text), author=author, method=method)
    return _put(session, row)


def change_label(session: Session, sae_id: int, index: int, label_id: int, text: str, author: str) -> int:
    """Put another label in the place of one that holds; the new one's id. The same text changes nothing."""
    text, old = _label_text(text), _held(session, sae_id, index, label_id)
    if text == old.text:
        return old.id
    old.ended_at, old.ended_by = now(), author
    return _put(session, Label(sae_id=sae_id, idx=index, text=text, author=author, method=PERSON, follows_id=old.id))


def withdraw_label(session: Session, sae_id: int, index: int, label_id: int, author: str) -> None:
    """End a label; the history keeps it."""
    old = _held(session, sae_id, index, label_id)
    old.ended_at, old.ended_by = now(), author
    touch(session, [sae_id])


def add_note(session: Session, sae_id: int, index: int, text: str, author: str) -> int:
    """Write a note about a feature; its id."""
    row = Note(sae_id=sae_id, idx=index, text=many_lines(text, "note", LONGEST_TEXT, field="note"), author=author)
    return _put(session, row)


def delete_note(session: Session, sae_id: int, index: int, note_id: int, author: str) -> None:
    """Mark a note as deleted; its text is shown no more."""
    row = session.scalar(sa.select(Note).where(Note.id == note_id, Note.sae_id == sae_id, Note.idx == index))
    if row is None:
        raise NotFound(f"Feature {index} has no note {note_id}.", field="note")
    if row.deleted_at is None:
        row.deleted_at, row.deleted_by = now(), author
        touch(session, [sae_id])


def star(session: Session, sae_id: int, index: int, author: str, on: bool) -> bool:
    """Star a feature, or take the star away; doing it again changes nothing. Whether anything changed."""
    there = session.get(Star, (sae_id, index, author))
    if on and there is None:
        session.add(Star(sae_id=sae_id, idx=index, author=author))
    elif not on and there is not None:
        session.delete(there)
    return on == (there is None)


def _label_text(text: str) -> str:
    return one_line(text, "label", LONGEST_LABEL, field="label")


def _held(session: Session, sae_id: int, index: int, label_id: int) -> Label:
    """The label, locked; NotFound without one, Outdated when it holds no more."""
    row = session.scalar(
        sa.select(Label).where(Label.id == label_id, Label.sae_id == sae_id, Label.idx == index).with_for_update()
    )
    if row is None:
        raise NotFound(f"Feature {index} has no label {label_id}.", field="label")
    if row.ended_at is not None:
        raise Outdated(f"{row.ended_by} changed or withdrew this label meanwhile; nothing was done. The newest stands here.")
    return row


def _put(session: Session, row: Label | Note) -> int:
    session.add(row)
    session.flush()
    touch(session, [row.sae_id])
    return row.id
