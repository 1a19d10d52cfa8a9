"""`/lists` and `/lists/{id}`: features that people put together."""

from collections.abc import Callable

from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session

from sae_core.errors import HeadscopeError, UsageError
from server.pages.reply import Read, reply, wants_part
from server.pages.writing import Author, Form, Signed, reading, see, writing
from server.rendering import Paint
from server.store import lists as store
from server.store.lists import ListPage, ListsPage

router = APIRouter()

CARD_CONTEXT = 10
"""Tokens on each side of the destination in a card."""
TOP_HEADS = 3


@router.get("/lists", include_in_schema=False)
@router.get("/lists.json", response_model=ListsPage)
def lists_page(request: Request, read: Read, author: Author) -> Response:
    """Every list, and a form for a new one."""
    return show_all(request, read, author)


def show_all(request: Request, read: Session, author: str | None, trouble: str = "", typed: Form | None = None) -> Response:
    """The page, after trouble with a sentence and what was typed."""
    status = 422 if trouble else 200
    page = store.lists_page(read)
    return reply(request, page, "lists.html", status=status, author=author, trouble=trouble, typed=typed or {}, back="/lists")


@router.post("/lists", include_in_schema=False)
def create(request: Request, form: Form, author: Signed) -> Response:
    """A new list."""
    try:
        with writing(request) as session:
            list_id = store.create(session, form.get("name", ""), form.get("description", ""), author)
    except UsageError as error:
        with reading(request) as read:
            return show_all(request, read, author, str(error), form)
    return see(f"/lists/{list_id}")


@router.get("/lists/{list_id:int}", include_in_schema=False)
@router.get("/lists/{list_id:int}.json", response_model=ListPage)
def list_page(request: Request, list_id: int, read: Read, author: Author) -> Response:
    """One list."""
    return show(request, read, list_id, author)


def show(
    request: Request, read: Session, list_id: int, author: str | None, trouble: HeadscopeError | None = None,
    typed: Form | None = None,
) -> Response:  # fmt: skip
    """The page or its block, after trouble with a sentence and what was typed."""
    return reply(
        request,
        store.list_page(read, list_id),
        "list.html",
        block="_list.html",
        status=trouble.status if trouble else 200,
        author=author,
        back=f"/lists/{list_id}",
        trouble=str(trouble) if trouble else "",
        typed=typed or {},
        paint=lambda card: Paint(card.max_act, None, CARD_CONTEXT),
        top_heads=TOP_HEADS,
    )


def change(request: Request, list_id: int, author: str, form: Form, act: Callable[[Session], object]) -> Response:
    """Do `act`, then show the list as it is now."""
    trouble: UsageError | None = None
    try:
        with writing(request) as session:
            act(session)
    except UsageError as error:
        trouble = error
    if trouble is None and not wants_part(request):
        return see(f"/lists/{list_id}")
    with reading(request) as read:
        return show(request, read, list_id, author, trouble, form if trouble else None)


@router.post("/lists/{list_id:int}", include_in_schema=False)
def describe(request: Request, list_id: int, form: Form, author: Signed) -> Response:
    """Another name and description."""
    name, description = form.get("name", ""), form.get("description", "")
    return change(request, list_id, author, form, lambda s: store.describe(s, list_id, name, description))


@router.post("/lists/{list_id:int}/visibility", include_in_schema=False)
def set_visibility(request: Request, list_id: int, form: Form, author: Signed) -> Response:
    """Say who sees the list."""
    return change(request, list_id, author, form, lambda s: store.set_visibility(s, list_id, form.get("visibility", "")))


@router.post("/lists/{list_id:int}/delete", include_in_schema=False)
def delete(request: Request, list_id: int, form: Form, author: Signed) -> Response:
    """Mark the list as deleted; its page offers to bring it back."""
    return change(request, list_id, author, form, lambda s: store.delete(s, list_id, author))


@router.post("/lists/{list_id:int}/restore", include_in_schema=False)
def restore(request: Request, list_id: int, form: Form, author: Signed) -> Response:
    """Bring the list back."""
    return change(request, list_id, author, form, lambda s: store.restore(s, list_id))


ENTRY = "/lists/{list_id:int}/entries/{entry_id:int}"


@router.post(ENTRY + "/note", include_in_schema=False)
def annotate(request: Request, list_id: int, entry_id: int, form: Form, author: Signed) -> Response:
    """Say why the feature is in the list."""
    return change(request, list_id, author, form, lambda s: store.annotate(s, list_id, entry_id, form.get("note", "")))


@router.post(ENTRY + "/move", include_in_schema=False)
def move(request: Request, list_id: int, entry_id: int, form: Form, author: Signed) -> Response:
    """One place up or down."""
    down = form.get("way") == "down"
    return change(request, list_id, author, form, lambda s: store.move(s, list_id, entry_id, "down" if down else "up"))


@router.post(ENTRY + "/remove", include_in_schema=False)
def remove(request: Request, list_id: int, entry_id: int, form: Form, author: Signed) -> Response:
    """Take the feature out; it stands below the list to be put back."""
    return change(request, list_id, author, form, lambda s: store.remove(s, list_id, entry_id, author))


@router.post(ENTRY + "/restore", include_in_schema=False)
def put_back(request: Request, list_id: int, entry_id: int, form: Form, author: Signed) -> Response:
    """Put the feature back."""
    return change(request, list_id, author, form, lambda s: store.put_back(s, list_id, entry_id))
