"""Labels, notes and stars: `/saes/{sae}/features/{index}/labels` of one feature, `/labels` of all."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.orm import Session

from sae_core.errors import HeadscopeError, Outdated, UsageError
from server.pages.reply import Read, reply, sae_path, wants_part
from server.pages.writing import Author, Form, Signed, number, reading, see, writing
from server.store import labels as store
from server.store import lists
from server.store.features import check_index
from server.store.labels import FeatureLabels, LabelQuery, LabelsPage
from server.store.saes import find_sae

router = APIRouter()

OF = "/saes/{sae}/features/{index:int}"


@router.get("/labels", include_in_schema=False)
@router.get("/labels.json", response_model=LabelsPage)
def labels_page(request: Request, query: Annotated[LabelQuery, Query()], read: Read, author: Author) -> Response:
    """Labels of all SAEs, and what people starred."""
    return reply(request, store.labels_page(read, query), "labels.html", author=author)


@router.get(OF + "/labels", include_in_schema=False)
@router.get(OF + "/labels.json", response_model=FeatureLabels)
def labels_of(request: Request, sae: str, index: int, read: Read, author: Author) -> Response:
    """What people wrote about a feature; its page asks for it as a block."""
    return show(request, read, sae, index, author)


def show(
    request: Request, read: Session, sae: str, index: int, author: str | None, trouble: HeadscopeError | None = None,
    typed: dict[str, str] | None = None,
) -> Response:  # fmt: skip
    """The block or the page, after trouble with a sentence and what was typed."""
    door = find_sae(read, sae)
    check_index(door, index)
    feature = f"{sae_path(door.sae.name)}/features/{index}"
    return reply(
        request,
        store.feature_labels(read, door.sae, door.id, index),
        "feature_labels.html",
        block="_labels_of.html",
        status=trouble.status if trouble else 200,
        author=author,
        oob=wants_part(request),
        back=feature if wants_part(request) else f"{feature}/labels",
        trouble=str(trouble) if trouble else "",
        typed=typed or {},
        limits=store,
    )


def write(
    request: Request, sae: str, index: int, author: str, form: dict[str, str], act: Callable[[Session, int], object]
) -> Response:
    """Do `act(session, sae_id)`, then show what people wrote about the feature now."""
    trouble: HeadscopeError | None = None
    try:
        with writing(request) as session:
            door = find_sae(session, sae)
            check_index(door, index)
            act(session, door.id)
    except (UsageError, Outdated) as error:
        trouble = error
    if trouble is None and not wants_part(request):
        return see(f"{sae_path(sae)}/features/{index}/labels")
    with reading(request) as read:
        return show(request, read, sae, index, author, trouble, form if trouble else None)


@router.post(OF + "/labels", include_in_schema=False)
def add(request: Request, sae: str, index: int, form: Form, author: Signed) -> Response:
    """A new label, or another in the place of the one that `follows` names."""
    text = form.get("label", "")

    def act(session: Session, sae_id: int) -> None:
        if "follows" in form:
            store.change_label(session, sae_id, index, number(form, "follows"), text, author)
        else:
            store.add_label(session, sae_id, index, text, author)

    return write(request, sae, index, author, form, act)


@router.post(OF + "/labels/{label_id:int}/withdraw", include_in_schema=False)
def withdraw(request: Request, sae: str, index: int, label_id: int, form: Form, author: Signed) -> Response:
    """End a label."""
    return write(request, sae, index, author, form, lambda s, sae_id: store.withdraw_label(s, sae_id, index, label_id, author))


@router.post(OF + "/notes", include_in_schema=False)
def add_note(request: Request, sae: str, index: int, form: Form, author: Signed) -> Response:
    """A new note."""
    text = form.get("note", "")
    return write(request, sae, index, author, form, lambda s, sae_id: store.add_note(s, sae_id, index, text, author))


@router.post(OF + "/notes/{note_id:int}/delete", include_in_schema=False)
def delete_note(request: Request, sae: str, index: int, note_id: int, form: Form, author: Signed) -> Response:
    """Mark a note as deleted."""
    return write(request, sae, index, author, form, lambda s, sae_id: store.delete_note(s, sae_id, index, note_id, author))


@router.post(OF + "/star", include_in_schema=False)
def star(request: Request, sae: str, index: int, form: Form, author: Signed) -> Response:
    """Star the feature, or take the star away."""
    on = form.get("on") == "1"
    return write(request, sae, index, author, form, lambda s, sae_id: store.star(s, sae_id, index, author, on))


@router.post(OF + "/lists", include_in_schema=False)
def add_to_list(request: Request, sae: str, index: int, form: Form, author: Signed) -> Response:
    """Put the feature into a list, or into a new one of a given name."""

    def act(session: Session, sae_id: int) -> None:
        new = form.get("name", "").strip()
        if not new and not form.get("list"):
            raise UsageError("Choose a list, or type a name for a new one.", field="list")
        list_id = lists.create(session, new, "", author) if new else number(form, "list")
        lists.add(session, list_id, sae_id, index, "", author)

    return write(request, sae, index, author, form, act)
