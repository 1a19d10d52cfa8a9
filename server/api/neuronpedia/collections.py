"""Lists and bookmarks: `/api/list/...`, `/api/bookmark/...`, `/api/user/bookmarks`."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from pydantic import BeforeValidator, Field
from sqlalchemy.orm import Session

from sae_core.errors import NotFound
from server.access import needs
from server.api.neuronpedia.features import batch
from server.api.neuronpedia.shapes import NeuronRow
from server.api.neuronpedia.wire import Addresses, At, Shape, answer, utc
from server.pages.reply import Read, origin
from server.pages.writing import Author, writing
from server.store import lists as store
from server.store.features import check_index
from server.store.labels import LabelQuery, labels_page, star
from server.store.sources import SourceRef, every_ref, find_source

router = Addresses()

CLIENT = "Neuronpedia client"
"""Who writes where nobody has said who they are; there are no accounts yet, so a key names nobody."""
AT_ONCE = 100
"""Features that may be added at once."""
CARDS = 3
"""Examples of each feature of a list."""


def signed(author: Author) -> str:
    """Who signs what is written."""
    return author or CLIENT


Signed = Annotated[str, Depends(signed)]


def _list_number(given: object) -> object:
    return int(given) if isinstance(given, str) and given.isascii() and given.isdigit() and len(given) < 10 else given


ListId = Annotated[int, BeforeValidator(_list_number), Field(ge=0, lt=10**9, strict=True)]
"""A list's number, as text or as a number."""
Text = Annotated[str, Field(max_length=10_000)]


# ---- shapes ----


class ListRow(Shape):
    """A list. `defaultTestText` is always null: what lists have here is examples."""

    id: str
    name: str
    description: str
    default_test_text: None = None
    user_id: str
    created_at: datetime
    updated_at: datetime


class NewListRow(ListRow):
    """A list that was just made."""

    url: str
    user: dict[str, str]


class EntryRow(Shape):
    """A feature in a list."""

    model_id: str
    layer: str
    index: str
    list_id: str
    description: str
    added_at: datetime
    user_id: str


class EntryWithNeuron(EntryRow):
    """A feature in a list, as `/api/list/get` gives it."""

    neuron: NeuronRow | None
    """None while its SAE has no published harvest."""


class ListWithNeurons(ListRow):
    """A list as `/api/list/get` gives it."""

    user: dict[str, str]
    neurons: list[EntryWithNeuron]
    activations: list[str] = []
    comments: list[str] = []


class BookmarkRow(Shape):
    """A feature that somebody starred."""

    id: str
    model_id: str
    layer: str
    index: str
    user_id: str
    created_at: datetime


def list_fields(line: store.ListLine) -> dict[str, Any]:
    """The fields of a `ListRow`."""
    return {
        "id": str(line.id), "name": line.name, "description": line.description, "user_id": line.author,
        "created_at": utc(line.created_at), "updated_at": utc(line.changed_at),
    }  # fmt: skip


def _entry_row(ref: SourceRef, index: int, found: store.Membership) -> EntryRow:
    return EntryRow(
        model_id=ref.model_id, layer=ref.id, index=str(index), list_id=str(found.list.id), description=found.note,
        added_at=utc(found.created_at), user_id=found.author,
    )  # fmt: skip


# ---- lists ----


class Entry(At):
    """A feature that is to be in a list."""

    description: Text | None = None


class NewList(Shape):
    """A list that is to be."""

    name: Text
    description: Text | None = None
    features: Annotated[list[Entry], Field(max_length=AT_ONCE)] | None = None


class OfList(Shape):
    """Which list."""

    list_id: ListId


class ToAdd(OfList):
    """Features for a list."""

    features_to_add: Annotated[list[Entry], Field(max_length=AT_ONCE)]


class OfEntry(OfList, At):
    """Which feature of which list."""


class Changed(OfEntry):
    """Why the feature is in the list."""

    description: Text


class Renamed(OfList):
    """A list's name and description."""

    name: Text
    description: Text | None = None


@router.post_at("/list/new")
@router.post_at("/list/new-with-features")
def new_list(request: Request, wanted: NewList, author: Signed) -> Response:
    """Make a list; with features, it is made with all of them or not at all."""
    with writing(request) as session:
        list_id = store.create(session, wanted.name, wanted.description or "", author)
        for entry in wanted.features or ():
            _put(session, list_id, entry, author)
        line = store.list_line(session, list_id)
    url = f"{origin(request)}/lists/{list_id}"
    return answer(NewListRow(**list_fields(line), url=url, user={"name": author}))


def _put(session: Session, list_id: int, entry: Entry, author: str) -> tuple[SourceRef, int]:
    """Put a feature at the end of a list; which SAE it is of."""
    source = find_source(session, entry.model_id, entry.layer)
    check_index(source.door, entry.index)
    store.add(session, list_id, source.door.id, entry.index, entry.description or "", author)
    return source.ref, source.door.id


@router.post_at("/list/add-features")
def add_features(request: Request, wanted: ToAdd, author: Signed) -> Response:
    """Put features at the end of a list; those that are in it stay where they are."""
    rows = []
    with writing(request) as session:
        _held(session, wanted.list_id)
        for entry in wanted.features_to_add:
            ref, sae_id = _put(session, wanted.list_id, entry, author)
            rows.append(_entry_row(ref, entry.index, store.membership(session, wanted.list_id, sae_id, entry.index)))
    return answer(rows)


@router.post_at("/list/get")
@needs("anonymous")
def get_list(of: OfList, read: Read) -> Response:
    """A list with its features, each with its strongest examples."""
    line = _held(read, of.list_id)
    members = store.members(read, of.list_id)
    refs = {ref.sae_id: ref for ref in every_ref(read)}
    found = batch(read, [(refs[one.sae_id], one.index) for one in members], CARDS)
    rows = [
        EntryWithNeuron(**_entry_row(refs[one.sae_id], one.index, one).model_dump(), neuron=found.get((one.sae_id, one.index)))
        for one in members
    ]
    return answer(ListWithNeurons(**list_fields(line), user={"name": line.author}, neurons=rows))


@router.post_at("/list/list")
@needs("anonymous")
def lists(read: Read) -> Response:
    """Every list, the oldest first: without accounts, all belong to whoever asks."""
    lines = sorted(store.lists_page(read).lists, key=lambda line: line.id)
    return answer([ListRow(**list_fields(line)) for line in lines])


@router.post_at("/list/update")
def update(request: Request, wanted: Renamed) -> Response:
    """Give a list another name and description."""
    with writing(request) as session:
        _held(session, wanted.list_id)
        store.describe(session, wanted.list_id, wanted.name, wanted.description or "")
        line = store.list_line(session, wanted.list_id)
    return answer(ListRow(**list_fields(line)))


@router.post_at("/list/edit-feature")
def edit_feature(request: Request, wanted: Changed) -> Response:
    """Say why a feature is in a list."""
    with writing(request) as session:
        ref, found = _member(session, wanted)
        store.annotate(session, wanted.list_id, found.entry, wanted.description)
        _, found = _member(session, wanted)
    return answer(_entry_row(ref, wanted.index, found))


@router.post_at("/list/remove")
def remove(request: Request, wanted: OfEntry, author: Signed) -> Response:
    """Take a feature out of a list; on its page it can be put back."""
    with writing(request) as session:
        ref, found = _member(session, wanted)
        store.remove(session, wanted.list_id, found.entry, author)
    return answer(_entry_row(ref, wanted.index, found))


@router.post_at("/list/delete")
def delete(request: Request, of: OfList, author: Signed) -> Response:
    """Delete a list; on its page it can be brought back."""
    with writing(request) as session:
        _held(session, of.list_id)
        store.delete(session, of.list_id, author)
    return answer(True)


def _held(session: Session, list_id: int) -> store.ListLine:
    """The list, if it is not deleted."""
    line = store.list_line(session, list_id)
    if line.deleted_at is not None:
        raise NotFound(f"List {list_id} was deleted by {line.deleted_by}; it can be brought back on its page.", field="listId")
    return line


def _member(session: Session, wanted: OfEntry) -> tuple[SourceRef, store.Membership]:
    _held(session, wanted.list_id)
    source = find_source(session, wanted.model_id, wanted.layer)
    return source.ref, store.membership(session, wanted.list_id, source.door.id, wanted.index)


# ---- bookmarks: what people starred ----


@router.post_at("/bookmark/add")
def bookmark(request: Request, wanted: At, author: Signed) -> Response:
    """Star a feature."""
    with writing(request) as session:
        source = find_source(session, wanted.model_id, wanted.layer)
        check_index(source.door, wanted.index)
        star(session, source.door.id, wanted.index, author, True)
    return answer(_bookmark(source.ref, wanted.index, author, utc(None)))


@router.post_at("/bookmark/delete")
def unbookmark(request: Request, wanted: At, author: Signed) -> Response:
    """Take one's star away; says how many there were."""
    with writing(request) as session:
        source = find_source(session, wanted.model_id, wanted.layer)
        there = star(session, source.door.id, wanted.index, author, False)
    return answer({"count": int(there)})


@router.post_at("/user/bookmarks")
@needs("reader")
def bookmarks(read: Read, author: Signed) -> Response:
    """What one starred, newest first."""
    refs = {ref.name: ref for ref in every_ref(read)}
    lines = labels_page(read, LabelQuery(starred=True, author=author, limit=1000)).lines
    return answer([_bookmark(refs[line.sae], line.index, line.author, utc(line.created_at)) for line in lines])


def _bookmark(ref: SourceRef, index: int, author: str, at: datetime) -> BookmarkRow:
    return BookmarkRow(
        id=f"{ref.sae_id}-{index}-{author}", model_id=ref.model_id, layer=ref.id, index=str(index), user_id=author, created_at=at
    )  # fmt: skip
