"""Labels, notes and stars under `/api/v1`."""

from collections.abc import Callable
from typing import Annotated

from fastapi import Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from server.api.common import BriefRead, Id, Index, SaeName, Signed, api_router, replies, respond
from server.pages.writing import reading, writing
from server.store import labels as store
from server.store.features import check_index
from server.store.labels import FeatureLabels, LabelQuery, LabelsPage
from server.store.people import LONGEST_LABEL, LONGEST_TEXT
from server.store.saes import find_sae

router = api_router("Labels and notes")

OF = "/saes/{sae}/features/{index}"
WRITES = replies(403, 404, 409, 413, 415)
LabelId = Annotated[Id, Path(description="Id of the label.", examples=[1])]
NoteId = Annotated[Id, Path(description="Id of the note.", examples=[1])]


class LabelText(BaseModel):
    """What a feature is called."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    text: str = Field(min_length=1, max_length=LONGEST_LABEL, examples=["quotes after a date"])
    """A line."""


class NoteText(BaseModel):
    """What somebody noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    text: str = Field(min_length=1, max_length=LONGEST_TEXT, examples=["Fires on the second of two dates."])
    """As many lines as you like."""


@router.get("/labels", response_model=LabelsPage, summary="Labels of all SAEs")
def list_labels(query: Annotated[LabelQuery, Query()], read: BriefRead) -> Response:
    """Labels that hold, newest first, or features that were starred. `next` is `before` of the next page."""
    return respond(store.labels_page(read, query))


@router.get(f"{OF}/labels", response_model=FeatureLabels, responses=replies(404), summary="What people wrote about a feature")
def read_labels(sae: SaeName, index: Index, read: BriefRead) -> Response:
    """Its labels, those that ended with who ended them, notes, stars and lists."""
    door = find_sae(read, sae)
    check_index(door, index)
    return respond(store.feature_labels(read, door.sae, door.id, index))


@router.post(f"{OF}/labels", status_code=201, response_model=FeatureLabels, responses=WRITES, summary="Label a feature")
def add_label(request: Request, sae: SaeName, index: Index, body: LabelText, author: Signed) -> Response:
    """A new label beside those that hold."""
    return _changed(request, sae, index, lambda session, sae_id: store.add_label(session, sae_id, index, body.text, author), 201)


@router.put(f"{OF}/labels/{{label_id}}", response_model=FeatureLabels, responses=WRITES, summary="Change a label")
def change_label(request: Request, sae: SaeName, index: Index, label_id: LabelId, body: LabelText, author: Signed) -> Response:
    """Another label in the place of one that holds; the history keeps the old one. 409 when somebody was quicker."""
    return _changed(
        request, sae, index, lambda session, sae_id: store.change_label(session, sae_id, index, label_id, body.text, author)
    )


@router.delete(f"{OF}/labels/{{label_id}}", response_model=FeatureLabels, responses=WRITES, summary="Withdraw a label")
def withdraw_label(request: Request, sae: SaeName, index: Index, label_id: LabelId, author: Signed) -> Response:
    """End a label; the history keeps it."""
    return _changed(request, sae, index, lambda session, sae_id: store.withdraw_label(session, sae_id, index, label_id, author))


@router.post(f"{OF}/notes", status_code=201, response_model=FeatureLabels, responses=WRITES, summary="Write a note")
def add_note(request: Request, sae: SaeName, index: Index, body: NoteText, author: Signed) -> Response:
    """A new note about a feature."""
    return _changed(request, sae, index, lambda session, sae_id: store.add_note(session, sae_id, index, body.text, author), 201)


@router.delete(f"{OF}/notes/{{note_id}}", response_model=FeatureLabels, responses=WRITES, summary="Delete a note")
def delete_note(request: Request, sae: SaeName, index: Index, note_id: NoteId, author: Signed) -> Response:
    """Mark a note as deleted; its text is shown no more."""
    return _changed(request, sae, index, lambda session, sae_id: store.delete_note(session, sae_id, index, note_id, author))


@router.put(f"{OF}/star", response_model=FeatureLabels, responses=WRITES, summary="Star a feature")
def add_star(request: Request, sae: SaeName, index: Index, author: Signed) -> Response:
    """Star it; doing it again changes nothing."""
    return _changed(request, sae, index, lambda session, sae_id: store.star(session, sae_id, index, author, True))


@router.delete(f"{OF}/star", response_model=FeatureLabels, responses=WRITES, summary="Take a star away")
def remove_star(request: Request, sae: SaeName, index: Index, author: Signed) -> Response:
    """Take your star away."""
    return _changed(request, sae, index, lambda session, sae_id: store.star(session, sae_id, index, author, False))


def _changed(request: Request, sae: str, index: int, act: Callable[[Session, int], object], status: int = 200) -> Response:
    """Do `act(session, sae_id)`, then what people wrote about the feature now."""
    with writing(request) as session:
        door = find_sae(session, sae)
        check_index(door, index)
        act(session, door.id)
    with reading(request) as read:
        return respond(store.feature_labels(read, door.sae, door.id, index), status=status)
