"""`/saes/{sae}/manage` and `/archive`: SAEs and harvests described, renamed, archived, deleted."""

from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session

from sae_core.errors import HeadscopeError, JobError, UsageError
from server.pages.reply import Read, known_schema, reply, sae_path
from server.pages.writing import Form, reading, see, writing
from server.store import manage as store
from server.store import stored_harvests
from server.store.manage import ArchivePage, ManagePage
from server.store.saes import find_sae

router = APIRouter()


@router.get("/archive", include_in_schema=False)
@router.get("/archive.json", response_model=ArchivePage)
def archive_page(request: Request, read: Read) -> Response:
    """What the first page leaves out."""
    return reply(request, store.archive_page(read), "archive.html")


@router.get("/saes/{sae}/manage", include_in_schema=False)
@router.get("/saes/{sae}/manage.json", response_model=ManagePage)
def manage_page(request: Request, sae: str, read: Read) -> Response:
    """The SAE's name, description and harvests."""
    return show(request, read, sae)


def show(
    request: Request, read: Session, sae: str, trouble: HeadscopeError | None = None, typed: Form | None = None,
    about: int | None = None,
) -> Response:  # fmt: skip
    """The page, after trouble with a sentence and what was typed; `about` a harvest or else the SAE."""
    page, status = store.manage_page(read, find_sae(read, sae)), trouble.status if trouble else 200
    said = str(trouble) if trouble else ""
    return reply(request, page, "manage.html", status=status, trouble=said, typed=typed or {}, about=about)


@router.post("/saes/{sae}/manage", include_in_schema=False)
def describe(request: Request, sae: str, form: Form) -> Response:
    """Another name and description."""
    try:
        with writing(request) as session:
            door = find_sae(session, sae)
            name = store.describe(session, door, form.get("name", door.sae.name), form.get("description", ""))
    except (UsageError, JobError) as error:
        with reading(request) as read:
            return show(request, read, sae, error, form)
    return see(f"{sae_path(name)}/manage")


@router.post("/saes/{sae}/visibility", include_in_schema=False)
def set_visibility(request: Request, sae: str, form: Form) -> Response:
    """Say who sees it."""
    with writing(request) as session:
        store.set_visibility(session, find_sae(session, sae), form.get("visibility", ""))
    return see(f"{sae_path(sae)}/manage")


@router.post("/saes/{sae}/archive", include_in_schema=False)
def archive(request: Request, sae: str, form: Form) -> Response:
    """Leave it out of the first page, or bring it back."""
    with writing(request) as session:
        store.archive(session, find_sae(session, sae), form.get("on") == "1")
    return see(f"{sae_path(sae)}/manage")


@router.get("/saes/{sae}/delete", include_in_schema=False)
def ask_to_delete(request: Request, sae: str, read: Read) -> Response:
    """What would go with it."""
    return confirm(request, read, sae)


def confirm(request: Request, read: Session, sae: str, trouble: HeadscopeError | None = None) -> Response:
    """The question, after trouble with a sentence."""
    page, status = store.manage_page(read, find_sae(read, sae)), trouble.status if trouble else 200
    return reply(request, page, "delete_sae.html", status=status, trouble=str(trouble) if trouble else "")


@router.post("/saes/{sae}/delete", include_in_schema=False)
def delete(request: Request, sae: str, form: Form) -> Response:
    """Delete it, once its name was typed."""
    with reading(request) as read:
        door = find_sae(read, sae)
    try:
        if form.get("name", "").strip() != door.sae.name:
            raise UsageError(f"Type {door.sae.name} to delete it.", field="name")
        store.delete_sae(known_schema(request), door, request.app.state.settings.data)
    except (UsageError, JobError) as error:
        with reading(request) as read:
            return confirm(request, read, sae, error)
    return see("/")


@router.post("/harvests/{harvest_id:int}", include_in_schema=False)
def describe_harvest(request: Request, harvest_id: int, form: Form) -> Response:
    """A name and a description."""
    try:
        with writing(request) as session:
            sae = store.harvest_line(session, harvest_id).sae
            store.describe_harvest(session, harvest_id, form.get("name", ""), form.get("description", ""))
    except UsageError as error:
        with reading(request) as read:
            return show(request, read, store.harvest_line(read, harvest_id).sae, error, form, harvest_id)
    return see(f"{sae_path(sae)}/manage")


@router.post("/harvests/{harvest_id:int}/archive", include_in_schema=False)
def archive_harvest(request: Request, harvest_id: int, form: Form) -> Response:
    """To the end of the list, or back."""
    with writing(request) as session:
        store.archive_harvest(session, harvest_id, form.get("on") == "1")
        sae = store.harvest_line(session, harvest_id).sae
    return see(f"{sae_path(sae)}/manage")


@router.get("/harvests/{harvest_id:int}/delete", include_in_schema=False)
def ask_to_delete_harvest(request: Request, harvest_id: int, read: Read) -> Response:
    """What would go with it."""
    return reply(request, store.harvest_line(read, harvest_id), "delete_harvest.html", trouble="")


@router.post("/harvests/{harvest_id:int}/delete", include_in_schema=False)
def delete_harvest(request: Request, harvest_id: int) -> Response:
    """Delete it, the published one too: the question said so."""
    with reading(request) as read:
        line = store.harvest_line(read, harvest_id)
    try:
        stored_harvests.delete(known_schema(request), harvest_id, force=True)
    except JobError as error:
        return reply(request, line, "delete_harvest.html", status=error.status, trouble=str(error))
    return see(f"{sae_path(line.sae)}/manage")
