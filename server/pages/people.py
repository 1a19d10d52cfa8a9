"""`/people` and `/audit`: who may come in, and what they changed. Of admins."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from sae_core.errors import NotFound, UsageError
from server import access
from server.access import needs
from server.pages.reply import Read, reply
from server.pages.writing import Form, number, reading, see, writing
from server.store import accounts as store
from server.store.accounts import AuditPage, PeoplePage

router = APIRouter()


@router.get("/people", include_in_schema=False)
@router.get("/people.json", response_model=PeoplePage)
@needs("admin")
def people_page(request: Request, read: Read) -> Response:
    """Everybody who may log in."""
    return _shown(request, read)


def _shown(request: Request, read: Session, trouble: str = "", typed: Form | None = None) -> Response:
    if access.shown(request) is None:
        raise NotFound("There are no accounts here; HEADSCOPE_ACCOUNTS=true makes Headscope ask people to log in.")
    page, status = store.people_page(read), 422 if trouble else 200
    return reply(request, page, "people.html", status=status, trouble=trouble, typed=typed or {}, roles=store.GIVEN)


def _change(request: Request, form: Form, act: Callable[[Session, str], object]) -> Response:
    try:
        with writing(request) as session:
            act(session, form.get("name", ""))
    except UsageError as error:
        with reading(request) as read:
            return _shown(request, read, str(error), form)
    return see("/people")


@router.post("/people", include_in_schema=False)
@needs("admin")
def add(request: Request, form: Form) -> Response:
    """A new account."""
    role, password = form.get("role", ""), form.get("password", "")
    return _change(request, form, lambda session, name: access.add_account(session, name, role, password))


@router.post("/people/role", include_in_schema=False)
@needs("admin")
def set_role(request: Request, form: Form) -> Response:
    """Let somebody do more, or less."""
    return _change(request, form, lambda session, name: store.set_role(session, name, form.get("role", "")))


@router.post("/people/password", include_in_schema=False)
@needs("admin")
def set_password(request: Request, form: Form) -> Response:
    """Another password, for somebody who forgot theirs."""
    return _change(request, form, lambda session, name: access.set_password(session, name, form.get("password", "")))


@router.post("/people/out", include_in_schema=False)
@needs("admin")
def keep_out(request: Request, form: Form) -> Response:
    """Keep somebody out, or let them in again."""
    return _change(request, form, lambda session, name: store.disable(session, name, form.get("on") == "1"))


@router.post("/people/revoke", include_in_schema=False)
@needs("admin")
def revoke(request: Request, form: Form) -> Response:
    """Shut anybody's key out."""
    return _change(request, form, lambda session, _: store.revoke_key(session, number(form, "key")))


class AuditQuery(BaseModel):
    """Which changes are listed. The address of the page is exactly this."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    who: str = Field("", max_length=60)
    """Only this person's."""
    before: int | None = Field(None, ge=0, le=2**62)
    """Only changes before the one of this id: the next page."""


@router.get("/audit", include_in_schema=False)
@router.get("/audit.json", response_model=AuditPage)
@needs("admin")
def audit_page(request: Request, query: Annotated[AuditQuery, Query()], read: Read) -> Response:
    """What was changed, by whom, from where."""
    return reply(request, store.audit_page(read, who=query.who, before=query.before), "audit.html")
