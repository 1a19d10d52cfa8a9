"""`/keys`: one's own keys for scripts, the browsers one is logged in with, and one's password."""

from collections.abc import Callable

from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session

from sae_core.errors import LoginNeeded, NotFound, UsageError
from server import access
from server.access import needs
from server.pages.reply import Read, reply
from server.pages.writing import Form, number, reading, see, writing
from server.store import accounts as store
from server.store.accounts import OwnPage
from server.store.viewers import Viewer

router = APIRouter()


@router.get("/keys", include_in_schema=False)
@router.get("/keys.json", response_model=OwnPage)
@needs("reader")
def keys_page(request: Request, read: Read) -> Response:
    """Keys and browsers."""
    return _shown(request, read)


def _shown(request: Request, read: Session, *, key: str = "", trouble: str = "", done: str = "") -> Response:
    page, status = store.own_page(read, _me(request)), 422 if trouble else 200
    headers = {"Cache-Control": "no-store"}
    return reply(
        request, page, "keys.html", status=status, headers=headers, key=key, trouble=trouble, done=done, scopes=store.SCOPES
    )  # fmt: skip


def _me(request: Request) -> Viewer:
    me = access.viewer(request)
    if me.account is None:
        raise NotFound("There are no accounts here; HEADSCOPE_ACCOUNTS=true makes Headscope ask people to log in.")
    return me


def _by_browser(request: Request) -> Viewer:
    """Who asks by a browser: a key makes no other keys, and changes no password."""
    me = _me(request)
    if me.way != "login":
        raise LoginNeeded("Keys, browsers and passwords are changed by somebody who has logged in, not by a key.")
    return me


@router.post("/keys", include_in_schema=False)
@needs("reader")
def add(request: Request, form: Form) -> Response:
    """A new key. It is shown now, and never again."""
    me = _by_browser(request)
    assert me.account is not None
    try:
        with writing(request) as session:
            key, _ = access.new_key(session, me.account, form.get("name", ""), form.get("scope", ""), form.get("days", ""))
    except UsageError as error:
        with reading(request) as read:
            return _shown(request, read, trouble=str(error))
    with reading(request) as read:
        return _shown(request, read, key=key)


def _change(request: Request, act: Callable[[Session, Viewer], object]) -> Response:
    me = _by_browser(request)
    with writing(request) as session:
        act(session, me)
    return see("/keys")


@router.post("/keys/revoke", include_in_schema=False)
@needs("reader")
def revoke(request: Request, form: Form) -> Response:
    """Shut a key out."""
    return _change(request, lambda session, me: store.revoke_key(session, number(form, "key"), me.account))


@router.post("/keys/logout", include_in_schema=False)
@needs("reader")
def end_login(request: Request, form: Form) -> Response:
    """Shut a browser out."""
    return _change(request, lambda session, me: store.end_login(session, me.account or 0, number(form, "login")))


@router.post("/keys/password", include_in_schema=False)
@needs("reader")
def set_password(request: Request, form: Form) -> Response:
    """Another password: every browser has to log in again, this one too."""
    me = _by_browser(request)
    answer = see("/login")
    try:
        access.check_password(request, me.name or "", form.get("old", ""))
        with writing(request) as session:
            access.set_password(session, me.name or "", form.get("new", ""))
    except (UsageError, LoginNeeded) as error:
        with reading(request) as read:
            return _shown(request, read, trouble=str(error))
    return answer
