"""Lists of features under `/api/v1`."""

from collections.abc import Callable
from typing import Annotated

from fastapi import Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from server.api.common import LONGEST_NAME, BriefRead, Id, Signed, api_router, replies, respond
from server.pages.writing import reading, writing
from server.store import lists as store
from server.store.features import check_index
from server.store.lists import ListPage, ListsPage
from server.store.people import LONGEST_TEXT, LONGEST_TITLE
from server.store.saes import find_sae

router = api_router("Lists")

ListId = Annotated[Id, Path(description="Id of the list.", examples=[1])]
EntryId = Annotated[Id, Path(description="Id of the entry.", examples=[1])]
WRITES = replies(403, 404, 413, 415)


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class ListTexts(_Body):
    """A list's name and description."""

    name: str = Field(min_length=1, max_length=LONGEST_TITLE, examples=["Induction, clean"])
    """A line."""
    description: str = Field("", max_length=LONGEST_TEXT)
    """What it is for."""


class NewEntry(_Body):
    """A feature to put into a list."""

    sae: str = Field(min_length=1, max_length=LONGEST_NAME, examples=["smollm2-l17"])
    """Name of the SAE."""
    index: int = Field(ge=0, examples=[3])
    """Index of the feature."""
    note: str = Field("", max_length=LONGEST_TEXT)
    """Why it is there."""


class EntryNote(_Body):
    """Why a feature is in a list."""

    note: str = Field(max_length=LONGEST_TEXT)
    """An empty one takes the note away."""


class Order(_Body):
    """The order of a list."""

    entries: list[Id] = Field(max_length=10_000, examples=[[2, 1]])
    """Ids of its entries, each once, first to last."""


@router.get("/lists", response_model=ListsPage, summary="Every list")
def list_lists(read: BriefRead) -> Response:
    """Lists that are not deleted, the last changed first."""
    return respond(store.lists_page(read))


@router.post("/lists", status_code=201, response_model=ListPage, responses=replies(403, 413, 415), summary="A new list")
def create_list(request: Request, body: ListTexts, author: Signed) -> Response:
    """The list, still empty. The header `Location` is its address."""
    with writing(request) as session:
        list_id = store.create(session, body.name, body.description, author)
    return _shown(request, list_id, 201)


@router.get("/lists/{list_id}", response_model=ListPage, responses=replies(404), summary="One list")
def read_list(list_id: ListId, read: BriefRead) -> Response:
    """A list with its features in order, each with its strongest examples; a deleted one too."""
    return respond(store.list_page(read, list_id))


@router.put("/lists/{list_id}", response_model=ListPage, responses=WRITES, summary="Name and describe a list")
def describe_list(request: Request, list_id: ListId, body: ListTexts, _: Signed) -> Response:
    """Give it another name and description."""
    return _changed(request, list_id, lambda session: store.describe(session, list_id, body.name, body.description))


@router.delete("/lists/{list_id}", response_model=ListPage, responses=WRITES, summary="Delete a list")
def delete_list(request: Request, list_id: ListId, author: Signed) -> Response:
    """Mark it as deleted; it can be brought back."""
    return _changed(request, list_id, lambda session: store.delete(session, list_id, author))


@router.post("/lists/{list_id}/restore", response_model=ListPage, responses=WRITES, summary="Bring a list back")
def restore_list(request: Request, list_id: ListId, _: Signed) -> Response:
    """Take the deletion back."""
    return _changed(request, list_id, lambda session: store.restore(session, list_id))


@router.post("/lists/{list_id}/entries", status_code=201, response_model=ListPage, responses=WRITES, summary="Add a feature")
def add_entry(request: Request, list_id: ListId, body: NewEntry, author: Signed) -> Response:
    """Put a feature at the end; one that is in the list stays where it is."""

    def act(session: Session) -> None:
        door = find_sae(session, body.sae)
        check_index(door, body.index)
        store.add(session, list_id, door.id, body.index, body.note, author)

    return _changed(request, list_id, act, 201)


@router.put("/lists/{list_id}/order", response_model=ListPage, responses=WRITES, summary="Order a list")
def order_list(request: Request, list_id: ListId, body: Order, _: Signed) -> Response:
    """Put its features in the order given; all of them must be named, each once."""
    return _changed(request, list_id, lambda session: store.order(session, list_id, body.entries))


@router.put(
    "/lists/{list_id}/entries/{entry_id}", response_model=ListPage, responses=WRITES, summary="Say why a feature is there"
)
def annotate_entry(request: Request, list_id: ListId, entry_id: EntryId, body: EntryNote, _: Signed) -> Response:
    """Replace the note of an entry."""
    return _changed(request, list_id, lambda session: store.annotate(session, list_id, entry_id, body.note))


@router.delete("/lists/{list_id}/entries/{entry_id}", response_model=ListPage, responses=WRITES, summary="Remove a feature")
def remove_entry(request: Request, list_id: ListId, entry_id: EntryId, author: Signed) -> Response:
    """Take a feature out; it can be put back."""
    return _changed(request, list_id, lambda session: store.remove(session, list_id, entry_id, author))


@router.post(
    "/lists/{list_id}/entries/{entry_id}/restore", response_model=ListPage, responses=WRITES, summary="Put a feature back"
)
def restore_entry(request: Request, list_id: ListId, entry_id: EntryId, _: Signed) -> Response:
    """Put a removed feature back."""
    return _changed(request, list_id, lambda session: store.put_back(session, list_id, entry_id))


def _changed(request: Request, list_id: int, act: Callable[[Session], object], status: int = 200) -> Response:
    """Do `act`, then the list as it is now."""
    with writing(request) as session:
        act(session)
    return _shown(request, list_id, status)


def _shown(request: Request, list_id: int, status: int) -> Response:
    headers = {"Location": f"/api/v1/lists/{list_id}"} if status == 201 else {}
    with reading(request) as session:
        return respond(store.list_page(session, list_id), status=status, headers=headers)
