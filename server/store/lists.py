"""Lists of features: named, ordered, with a note per entry; features of several SAEs in one."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.errors import NotFound, UsageError
from server.store.features import FeatureCard, feature_cards
from server.store.labels import shown_label, touch
from server.store.people import LONGEST_TITLE, many_lines, one_line
from server.store.viewers import Visibility, check_own, check_visibility, noted, own
from server.tables import SAE, Account, FeatureList, ListEntry, now

CARD_EXAMPLES = 3
"""Strongest examples that an entry shows."""


@dataclass(frozen=True)
class ListLine:
    """A list among others."""

    id: int
    name: str
    description: str
    """What it is for."""
    author: str
    created_at: datetime
    changed_at: datetime
    """When it or what is in it was last changed, in UTC."""
    deleted_at: datetime | None
    deleted_by: str | None
    entries: int
    """Features in it."""
    visibility: Visibility = "shared"
    """Who sees it, where there are accounts."""
    owner: str | None = None
    """Whose it is; None where it was made without accounts."""


@dataclass(frozen=True)
class ListsPage:
    """Every list, the last changed first."""

    lists: tuple[ListLine, ...]
    """The last changed first."""


@dataclass(frozen=True)
class Entry:
    """A feature in a list."""

    id: int
    sae: str
    """Name of the SAE."""
    index: int
    label: str | None
    """What people, or else a method, call the feature."""
    note: str
    """Why it is there."""
    author: str
    """Who put it there."""
    created_at: datetime
    removed_at: datetime | None
    """When it was taken out, in UTC; null while it is in."""
    removed_by: str | None
    """Who took it out."""
    card: FeatureCard | None
    """None while its SAE has no published harvest, and of a removed one."""


@dataclass(frozen=True)
class ListPage:
    """A list with its features."""

    list: ListLine
    """The list itself."""
    entries: tuple[Entry, ...]
    """Those that are in it, in its order."""
    removed: tuple[Entry, ...]
    """Those taken out, the last one first; they can be put back."""


# ---- reading ----

_COUNT = (
    sa.select(sa.func.count())
    .where(ListEntry.list_id == FeatureList.id, ListEntry.removed_at.is_(None))
    .scalar_subquery()
)  # fmt: skip
_OWNER = sa.select(Account.name).where(Account.id == FeatureList.owner_id).scalar_subquery()
_LINES = sa.select(FeatureList, _COUNT.label("entries"), _OWNER.label("owner"))


def lists_page(session: Session) -> ListsPage:
    """Every list that is not deleted."""
    rows = session.execute(
        _LINES.where(FeatureList.deleted_at.is_(None)).order_by(FeatureList.changed_at.desc(), FeatureList.id.desc())
    )
    return ListsPage(tuple(_line(*row) for row in rows))


def list_page(session: Session, list_id: int) -> ListPage:
    """The list of that id, a deleted one too: four queries."""
    found = session.execute(_LINES.where(FeatureList.id == list_id)).one_or_none()
    if found is None:
        raise _unknown(list_id)
    rows = session.execute(
        sa.select(ListEntry, SAE.name, SAE.harvest_id, shown_label(ListEntry.sae_id, ListEntry.idx))
        .join(SAE, SAE.id == ListEntry.sae_id)
        .where(ListEntry.list_id == list_id)
        .order_by(ListEntry.place, ListEntry.id)
    ).all()
    wanted = [(harvest_id, row.idx) for row, _, harvest_id, _ in rows if harvest_id is not None and row.removed_at is None]
    cards = feature_cards(session, wanted, CARD_EXAMPLES)
    entries = [
        Entry(
            row.id, sae, row.idx, label, row.note, row.author, row.created_at, row.removed_at, row.removed_by,
            None if harvest_id is None else cards.get((harvest_id, row.idx)),
        )
        for row, sae, harvest_id, label in rows
    ]  # fmt: skip
    return ListPage(
        list=_line(*found),
        entries=tuple(one for one in entries if one.removed_at is None),
        removed=tuple(
            sorted((one for one in entries if one.removed_at is not None), key=lambda one: one.removed_at or 0, reverse=True)
        ),
    )


def _line(row: FeatureList, n: int, owner: str | None) -> ListLine:
    return ListLine(
        row.id, row.name, row.description, row.author, row.created_at, row.changed_at, row.deleted_at, row.deleted_by, n,
        check_visibility(row.visibility), owner,
    )  # fmt: skip


def _unknown(list_id: int) -> NotFound:
    return NotFound(f"There is no list {list_id}; /lists shows those there are.", field="list")


@dataclass(frozen=True)
class Membership:
    """A feature's place in a list that is not deleted."""

    list: ListLine
    entry: int
    sae_id: int
    index: int
    note: str
    author: str
    created_at: datetime


def list_line(session: Session, list_id: int) -> ListLine:
    """The list of that id alone, a deleted one too."""
    found = session.execute(_LINES.where(FeatureList.id == list_id)).one_or_none()
    if found is None:
        raise _unknown(list_id)
    return _line(*found)


def members(session: Session, list_id: int) -> tuple[Membership, ...]:
    """The features of a list, in its order."""
    return _memberships(session, ListEntry.list_id == list_id)


def lists_with(session: Session, sae_id: int, index: int) -> tuple[Membership, ...]:
    """The lists that a feature is in."""
    return _memberships(session, ListEntry.sae_id == sae_id, ListEntry.idx == index)


def membership(session: Session, list_id: int, sae_id: int, index: int) -> Membership:
    """Where a feature stands in a list; NotFound when it is not in it."""
    found = _memberships(session, ListEntry.list_id == list_id, ListEntry.sae_id == sae_id, ListEntry.idx == index)
    if not found:
        raise NotFound(f"Feature {index} is not in list {list_id}.", field="index")
    return found[0]


def _memberships(session: Session, *conditions: sa.ColumnElement[bool]) -> tuple[Membership, ...]:
    found = sa.select(ListEntry).join(FeatureList, FeatureList.id == ListEntry.list_id)
    held = found.where(*conditions, ListEntry.removed_at.is_(None), FeatureList.deleted_at.is_(None))
    entries = session.scalars(held.order_by(FeatureList.id, ListEntry.place, ListEntry.id)).all()
    if not entries:  # as of most features
        return ()
    of = session.execute(_LINES.where(FeatureList.id.in_({entry.list_id for entry in entries})))
    lines = {line.id: line for line in (_line(*row) for row in of)}
    return tuple(
        Membership(
            lines[entry.list_id], entry.id, entry.sae_id, entry.idx, entry.note, entry.author, entry.created_at
        )
        for entry in entries
    )  # fmt: skip


# ---- writing ----


def create(session: Session, name: str, description: str, author: str) -> int:
    """A new list; its id."""
    row = FeatureList(name=_name(name), description=_description(description), author=author)
    own(session, row)
    session.add(row)
    session.flush()
    return row.id


def describe(session: Session, list_id: int, name: str, description: str) -> None:
    """Give a list another name and description."""
    row = _locked(session, list_id)
    row.name, row.description = _name(name), _description(description)


def delete(session: Session, list_id: int, author: str) -> None:
    """Mark a list as deleted; it can be brought back."""
    row = _locked(session, list_id)
    check_own(session, row, "delete this list")
    row.deleted_at, row.deleted_by = now(), author


def set_visibility(session: Session, list_id: int, visibility: str) -> None:
    """Say who sees a list."""
    row = _locked(session, list_id)
    check_own(session, row, "say who sees this list")
    row.visibility = check_visibility(visibility)
    noted(session, visibility=row.visibility)


def restore(session: Session, list_id: int) -> None:
    """Bring a deleted list back."""
    row = _locked(session, list_id)
    row.deleted_at = row.deleted_by = None


def add(session: Session, list_id: int, sae_id: int, index: int, note: str, author: str) -> None:
    """Put a feature at the end of a list; one that is in it stays where it is."""
    _locked(session, list_id)
    note = _note(note)
    mine = sa.select(ListEntry).where(ListEntry.list_id == list_id)
    row = session.scalar(mine.where(ListEntry.sae_id == sae_id, ListEntry.idx == index))
    if row is not None and row.removed_at is None:
        return
    touch(session, [sae_id])
    last = session.scalar(sa.select(sa.func.max(ListEntry.place)).where(ListEntry.list_id == list_id))
    place = 0 if last is None else last + 1
    if row is None:
        session.add(ListEntry(list_id=list_id, sae_id=sae_id, idx=index, place=place, note=note, author=author))
    else:
        row.place, row.author, row.removed_at, row.removed_by = place, author, None, None
        row.note = note or row.note


def annotate(session: Session, list_id: int, entry_id: int, note: str) -> None:
    """Say why the feature is in the list."""
    _entry(session, list_id, entry_id).note = _note(note)


def order(session: Session, list_id: int, entry_ids: Sequence[int]) -> None:
    """Put the features of a list in this order; UsageError unless each is named once."""
    _locked(session, list_id)
    rows = session.scalars(sa.select(ListEntry).where(ListEntry.list_id == list_id, ListEntry.removed_at.is_(None))).all()
    places = {entry_id: place for place, entry_id in enumerate(entry_ids)}
    if len(places) != len(entry_ids) or set(places) != {row.id for row in rows}:
        raise UsageError(f"Name each of the list's {len(rows)} entries once, by its id.", field="entries")
    for row in rows:
        row.place = places[row.id]


def remove(session: Session, list_id: int, entry_id: int, author: str) -> None:
    """Take a feature out of a list; it can be put back where it was."""
    row = _entry(session, list_id, entry_id)
    row.removed_at, row.removed_by = now(), author
    touch(session, [row.sae_id])


def put_back(session: Session, list_id: int, entry_id: int) -> None:
    """Put a feature back where it was."""
    row = _entry(session, list_id, entry_id)
    row.removed_at = row.removed_by = None
    touch(session, [row.sae_id])


def move(session: Session, list_id: int, entry_id: int, way: Literal["up", "down"]) -> None:
    """Change places with the entry above or below; the first stays first, the last stays last."""
    row = _entry(session, list_id, entry_id)
    rows = list(
        session.scalars(
            sa.select(ListEntry)
            .where(ListEntry.list_id == list_id, ListEntry.removed_at.is_(None))
            .order_by(ListEntry.place, ListEntry.id)
        )
    )
    at = rows.index(row)
    to = at + (1 if way == "down" else -1)
    if 0 <= to < len(rows):
        rows[at].place, rows[to].place = rows[to].place, rows[at].place


def _locked(session: Session, list_id: int) -> FeatureList:
    """The list, locked against others who change it meanwhile; it counts as changed."""
    row = session.get(FeatureList, list_id, with_for_update=True)
    if row is None:
        raise _unknown(list_id)
    row.changed_at = now()
    return row


def _entry(session: Session, list_id: int, entry_id: int) -> ListEntry:
    _locked(session, list_id)
    row = session.scalar(sa.select(ListEntry).where(ListEntry.list_id == list_id, ListEntry.id == entry_id))
    if row is None:
        raise NotFound(f"List {list_id} has no entry {entry_id}.", field="entry")
    return row


def _name(text: str) -> str:
    return one_line(text, "name", LONGEST_TITLE, field="name")


def _description(text: str) -> str:
    return many_lines(text, "description", field="description", empty=True)


def _note(text: str) -> str:
    return many_lines(text, "note", field="note", empty=True)
