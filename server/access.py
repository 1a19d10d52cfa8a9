"""Who asks, decided once a request, and what a route needs of them. No torch.

Each route needs a role: to read nothing but what is public (`anonymous`), to change things `editor`, unless `needs` says
otherwise of it. Where there are no accounts, whoever comes in by the start token is the machine's owner and may do everything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastapi import Request, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from sae_core.errors import Forbidden, LoginNeeded, UsageError
from server.db import Database
from server.limits import Limit
from server.oidc import COOKIE, Oidc
from server.passwords import digest, hashed, is_right, is_weak, new_token, same
from server.settings import Settings
from server.store import accounts
from server.store.viewers import ANONYMOUS, LOCAL, Role, Viewer, seen_by

F = TypeVar("F", bound=Callable[..., Any])
LOGIN_COOKIE = "headscope_login"
KEY = "headscope"
"""What keys begin with, so that scanners of secrets know one."""
SAFE = ("GET", "HEAD", "OPTIONS")
FIRST_ADMIN = "admin"


class Limits:
    """How often people may ask, in this process or in all that share `folder`."""

    def __init__(self, settings: Settings, folder: Path | None = None) -> None:
        live, address, name = (folder and folder / f"{name}.db" for name in ("live", "address", "name"))
        self.live = Limit(settings.live_per_minute, 60.0, file=live)
        """Live questions of a person."""
        self.address = Limit(20, 60.0, file=address)
        """Tries to come in from one address."""
        self.name = Limit(10, 300.0, file=name)
        """Tries to come in under one name, wherever from: guessing from many addresses is slow too."""


def limits(request: Request) -> Limits:
    """The app's limits."""
    found: Limits = request.app.state.limits
    return found


@dataclass(frozen=True)
class Needs:
    """What a route needs of whoever asks."""

    role: Role | Literal["nobody"]
    """`nobody`: not even the start token."""
    live: bool = False
    """It asks the engine, which has one model and much to do."""
    metrics: bool = False
    """It is for a monitor, which a setting lets in without a role."""


def needs(role: Role | Literal["nobody"], *, live: bool = False, metrics: bool = False) -> Callable[[F], F]:
    """Say what a route needs; put it between the route's decorator and the function."""

    def mark(function: F) -> F:
        function.needs = Needs(role, live, metrics)  # type: ignore[attr-defined]
        return function

    return mark


async def guard(request: Request) -> None:
    """Find out who asks, and refuse what they may not do. Every route begins with it."""
    settings: Settings = request.app.state.settings
    wanted: Needs = getattr(request.scope["route"].endpoint, "needs", None) or Needs(
        "anonymous" if request.method in SAFE else "editor"
    )
    request.state.viewer = await _who(request, settings)
    if wanted.role == "nobody" or (wanted.metrics and settings.metrics_public):
        return
    require(request, wanted.role)
    if wanted.live:
        asks(request)


def asks(request: Request) -> None:
    """Count a question to the engine; TooOften where whoever asks has had as many of late as one may."""
    if request.app.state.settings.accounts:
        who = viewer(request)
        limits(request).live.take(str(who.account or who.address), "asking")


def require(request: Request, role: Role) -> None:
    """Raise LoginNeeded or Forbidden unless whoever asks may do what `role` may."""
    who: Viewer | None = request.state.viewer
    if who is None:
        raise LoginNeeded("This Headscope is somebody's own: open the address that `headscope up` printed, with its token.")
    if not who.may(role):
        if who.role == "anonymous":
            raise LoginNeeded("Log in first, at /login, or send a key in the header Authorization: Bearer.")
        raise Forbidden(f"You may not do this: it needs the role {role}, and this is {_said(who)}.")


def _said(viewer: Viewer) -> str:
    return f"a key to {viewer.role}s' things" if viewer.way.startswith("key ") else f"{viewer.name}, a {viewer.role}"


async def _who(request: Request, settings: Settings) -> Viewer | None:
    key = _key(request)
    if not settings.accounts:
        token = settings.token
        if token is None:
            return LOCAL
        given = key or request.cookies.get(start_cookie(settings), "")
        return LOCAL if given and same(given, token) else None
    if key is not None:
        found = await run_in_threadpool(_look, request, accounts.viewer_by_key, key)
        if found is None:
            raise LoginNeeded("That key is unknown, was revoked, or has run out.")
        return found
    if cookie := request.cookies.get(LOGIN_COOKIE):
        return await run_in_threadpool(_look, request, accounts.viewer_by_login, cookie) or _nobody(request)
    return _nobody(request)


def _look(request: Request, by: Callable[[Session, str, str], Viewer | None], token: str) -> Viewer | None:
    with _database(request).read() as session:
        return by(session, digest(token), address(request))


def _nobody(request: Request) -> Viewer:
    return Viewer(ANONYMOUS.role, address=address(request))


def _key(request: Request) -> str | None:
    """The key that a script sent."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return (key.strip() if scheme.lower() == "bearer" else "") or request.headers.get("x-api-key") or None


def address(request: Request) -> str:
    """Where a request is from; the server behind a proxy sets it from what the proxy says."""
    return request.client.host if request.client else ""


def viewer(request: Request) -> Viewer:
    """Who asks; nobody, where nothing has found out."""
    found: Viewer | None = getattr(request.state, "viewer", None)
    return found or ANONYMOUS


def shown(request: Request) -> Viewer | None:
    """Who asks, for a page to say; None where there are no accounts."""
    return viewer(request) if request.app.state.settings.accounts else None


def tag_of(request: Request) -> str:
    """What tells viewers apart in an ETag: each may see something else at one address."""
    if not request.app.state.settings.accounts:
        return ""
    who = viewer(request)
    return f"{who.role} {who.account}"


def seen(request: Request) -> Database:
    """The app's database as whoever asks sees it; what they change is kept in the audit log. Its schema is the one we know."""
    who = viewer(request)
    if not request.app.state.settings.accounts:
        return seen_by(_database(request), who)
    return seen_by(_database(request), who, partial(_record, request))


def _record(request: Request, session: Session) -> None:
    """Keep the change that a request makes, once."""
    if not session.info.get("recorded") and not getattr(request.state, "recorded", False):
        route = request.scope["route"]
        accounts.record(session, f"{request.method} {route.path_format}", request.url.path)
    request.state.recorded = True


def _database(request: Request) -> Database:
    state = request.app.state
    db: Database = state.db
    if not getattr(state, "schema_checked", False):
        db.check_version()
        state.schema_checked = True
    return db


# ---- the start token ----


def start_cookie(settings: Settings) -> str:
    """The name of the cookie that holds the start token. A browser sends cookies to every port, so the name tells them apart."""
    return f"headscope_start_{settings.port}"


def let_in(request: Request, response: Response, token: str) -> None:
    """Remember the start token in the browser; LoginNeeded for another one."""
    settings: Settings = request.app.state.settings
    limits(request).address.take(address(request), "trying")
    if settings.token is not None:
        if not same(token, settings.token):
            raise LoginNeeded("That is not the token of this Headscope: `headscope up` prints the address with it.")
        set_cookie(request, response, start_cookie(settings), token, int(timedelta(days=settings.login_days).total_seconds()))


# ---- logging in ----


def log_in(request: Request, response: Response, name: str, password: str) -> None:
    """Log a browser in; LoginNeeded for a wrong name or password, without telling which."""
    account, name, kept = check_password(request, name, password)
    if is_weak(kept):
        with _database(request).write() as session:
            accounts.strengthen(session, account, hashed(password))
    keep_login(request, response, account, name)


def check_password(request: Request, name: str, password: str) -> tuple[int, str, str]:
    """Id, name and kept password of the account; LoginNeeded for a wrong name or password, TooOften after many."""
    name = name.strip()[:120]
    limits(request).address.take(address(request), "trying")
    limits(request).name.take(name.casefold(), "trying")
    with _database(request).read() as session:
        found = accounts.password_of(session, name)
    kept = found[2] if found else None
    if not is_right(password, kept) or found is None or kept is None:
        raise LoginNeeded("That name and password do not belong together.")
    limits(request).name.forget(name.casefold())
    return found[0], found[1], kept


def keep_login(request: Request, response: Response, account: int, name: str) -> None:
    """Remember a browser as somebody's. Every login has a token of its own, so none can be planted beforehand."""
    settings: Settings = request.app.state.settings
    token, lasts = new_token(KEY), timedelta(days=settings.login_days)
    by = Viewer("reader", account, name, "login", address(request))
    with _database(request).write() as session:
        accounts.log_in(
            session, account, digest(token), datetime.now(UTC) + lasts, address(request), request.headers.get("user-agent", "")
        )
        accounts.record(session, "log in", name, viewer=by)
    set_cookie(request, response, LOGIN_COOKIE, token, int(lasts.total_seconds()))


def log_in_elsewhere(request: Request, service: Oidc, response: Response) -> str:
    """Log in whoever came back from the login service; the address they wanted to see."""
    limits(request).address.take(address(request), "trying")
    claims, back = service.end(request.query_params, request.cookies.get(COOKIE, ""))
    with _database(request).write() as session:
        found = service.account(session, claims)
    keep_login(request, response, found.id, found.name)
    return back


def log_out(request: Request, response: Response) -> None:
    """Forget a browser, here and there."""
    if token := request.cookies.get(LOGIN_COOKIE):
        with _database(request).write() as session:
            accounts.log_out(session, digest(token))
    response.delete_cookie(LOGIN_COOKIE)


def set_cookie(request: Request, response: Response, name: str, value: str, seconds: int) -> None:
    """Give a cookie that no script reads, that other sites' forms do not send, and that https keeps to itself."""
    secure = request.url.scheme == "https" or str(getattr(request.app.state.settings, "public_url", "")).startswith("https:")
    response.set_cookie(name, value, max_age=seconds, httponly=True, samesite="lax", secure=secure)


def new_key(session: Session, account: int, name: str, scope: str, days: str) -> tuple[str, accounts.KeyRecord]:
    """A key, which is shown once, and what is kept of it."""
    key = new_token(KEY)
    made = accounts.add_key(session, account, name, scope, digest(key), f"{key[: len(KEY) + 5]}…", _until(days))
    return key, made


def _until(days: str) -> datetime | None:
    if not days.strip():
        return None
    if not (days.isascii() and days.isdigit() and 0 < int(days) <= 3650):
        raise UsageError(f"'{days[:20]}' is no number of days; give 1 to 3650, or nothing.", field="days")
    return datetime.now(UTC) + timedelta(days=int(days))


def add_account(session: Session, name: str, role: str, password: str) -> accounts.AccountRecord:
    """Make an account."""
    return accounts.add(session, name, role, hashed(password))


def set_password(session: Session, name: str, password: str) -> None:
    """Give an account another password."""
    accounts.set_password(session, name, hashed(password))


def ensure_admin(settings: Settings, db: Database) -> None:
    """Make the first admin from the secret file. UsageError where there are accounts and nobody could let anybody in."""
    if not settings.accounts:
        return
    with db.write() as session:
        if accounts.has_admin(session):
            return
        if settings.admin_password_file is None:
            raise UsageError(
                "Nobody is an admin yet: set HEADSCOPE_ADMIN_PASSWORD_FILE to a file with a password, or make one with "
                "`headscope user add <name> --role admin`.",
                field="admin_password_file",
            )
        try:
            password = settings.admin_password_file.read_text().strip()
        except OSError as error:
            raise UsageError(
                f"HEADSCOPE_ADMIN_PASSWORD_FILE={settings.admin_password_file} cannot be read ({error.strerror}).",
                field="admin_password_file",
            ) from error
        accounts.add(session, FIRST_ADMIN, "admin", hashed(password))
