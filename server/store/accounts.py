"""People who may log in, their browsers and keys, and what they changed. Of passwords and tokens only hashes come here."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.orm import Session

from sae_core.errors import NotFound, UsageError
from server.store.people import LONGEST_AUTHOR, author_name, one_line
from server.store.viewers import Role, Viewer, viewer_of
from server.tables import Account, ApiKey, Audit, Login, now

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
AllowedRole = Literal["reader", "editor", "admin"]
GIVEN: tuple[AllowedRole, ...] = get_args(AllowedRole)
"""Roles that an account can have."""
_MOST_ROLE: dict[Scope, Role] = {"read": "reader", "write": "editor", "admin": "admin"}


@dataclass(frozen=True)
class AccountRecord:
    """A person who may log in."""

    id: int
    name: str
    role: AllowedRole
    created_at: datetime
    disabled_at: datetime | None
    elsewhere: bool
    """Whether another service says who it is."""


@dataclass(frozen=True)
class LoginRecord:
    """A browser that is logged in."""

    id: int
    account: str
    created_at: datetime
    expires_at: datetime
    address: str
    browser: str


@dataclass(frozen=True)
class KeyRecord:
    """A key for scripts, without the key: that is shown once."""

    id: int
    account: str
    name: str
    scope: Scope
    hint: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True)
class Change:
    """A change that somebody made."""

    id: int
    at: datetime
    who: str
    way: str
    address: str
    action: str
    target: str
    detail: dict[str, Any]


@dataclass(frozen=True)
class PeoplePage:
    """Everybody who may log in, and their keys."""

    people: tuple[AccountRecord, ...]
    keys: tuple[KeyRecord, ...]


@dataclass(frozen=True)
class OwnPage:
    """What one has of one's own: keys and browsers."""

    name: str
    role: str
    keys: tuple[KeyRecord, ...]
    logins: tuple[LoginRecord, ...]


@dataclass(frozen=True)
class AuditPage:
    """Changes, newest first."""

    who: str
    changes: tuple[Change, ...]
    next: int | None
    """`before` of the next page; None on the last."""


# ---- people ----


def add(session: Session, name: str, role: str, password: str | None, *, subject: str | None = None) -> AccountRecord:
    """Make an account; UsageError where the name is taken, or looks like one that is."""
    name = author_name(name)
    if session.scalar(sa.select(Account.id).where(Account.folded == _folded(name))) is not None:
        raise UsageError(f"There is an account called {name} already.", field="name")
    row = Account(name=name, folded=_folded(name), role=check_role(role), password=password, subject=subject)
    session.add(row)
    session.flush()
    record(session, f"add a {role}", name)
    return _account(row)


def _folded(name: str) -> str:
    return name.casefold()


def check_role(asked: str) -> AllowedRole:
    """`asked` as a role; UsageError when it is none."""
    for known in GIVEN:
        if asked == known:
            return known
    raise UsageError(f"'{asked[:20]}' is no role; there are {', '.join(GIVEN)}.", field="role")


def check_scope(asked: str) -> Scope:
    """`asked` as a scope; UsageError when it is none."""
    for known in SCOPES:
        if asked == known:
            return known
    raise UsageError(f"'{asked[:20]}' is no scope; there are {', '.join(SCOPES)}.", field="scope")


def password_of(session: Session, name: str) -> tuple[int, str, str | None] | None:
    """Id, name and kept password of an account that may come in; None without one."""
    found = sa.select(Account.id, Account.name, Account.password)
    row = session.execute(found.where(Account.folded == _folded(name), Account.disabled_at.is_(None))).one_or_none()
    return None if row is None else (row.id, row.name, row.password)


def of_subject(session: Session, subject: str) -> AccountRecord | None:
    """The account of somebody that another service knows."""
    row = session.scalar(sa.select(Account).where(Account.subject == subject))
    return None if row is None else _account(row)


def link(session: Session, name: str, subject: str) -> AccountRecord | None:
    """The account of that name, from now on known to another service as `subject`; None without one, or where it is somebody
    else's there."""
    row = session.scalar(sa.select(Account).where(Account.folded == _folded(name), Account.subject.is_(None)).with_for_update())
    if row is None:
        return None
    row.subject = subject
    record(session, "known to the login service", row.name)
    return _account(row)


def add_elsewhere(session: Session, name: str, role: str, subject: str) -> AccountRecord:
    """Make an account for somebody that another service knows; where the name is taken, a number tells the two apart."""
    taken = set(session.scalars(sa.select(Account.folded)))
    free = next(one for one in (name, *(f"{name} {n}" for n in range(2, len(taken) + 3))) if _folded(one) not in taken)
    return add(session, free, role, None, subject=subject)


def has_admin(session: Session) -> bool:
    """Whether anybody may let others in."""
    there = sa.exists().where(Account.role == "admin", Account.disabled_at.is_(None))
    return bool(session.scalar(sa.select(there)))


def people(session: Session) -> tuple[AccountRecord, ...]:
    """Every account, by name."""
    return tuple(_account(row) for row in session.scalars(sa.select(Account).order_by(Account.folded)))


def people_page(session: Session) -> PeoplePage:
    """Everybody, with everybody's keys."""
    return PeoplePage(people(session), keys(session))


def set_role(session: Session, name: str, role: str) -> None:
    """Let somebody do more, or less. The last admin stays one."""
    row = _named(session, name)
    if row.role == "admin" and check_role(role) != "admin":
        _check_not_last(session, row)
    row.role = check_role(role)
    record(session, f"make a {role}", row.name)


def set_password(session: Session, name: str, password: str) -> None:
    """Give an account another password: every browser has to log in again."""
    row = _named(session, name)
    row.password = password
    session.execute(sa.delete(Login).where(Login.account_id == row.id))
    record(session, "set a password", row.name)


def strengthen(session: Session, account_id: int, password: str) -> None:
    """Keep the same password with today's parameters."""
    session.get_one(Account, account_id).password = password


def disable(session: Session, name: str, on: bool) -> None:
    """Keep somebody out, or let them in again. What they wrote stays, and stays theirs; their browsers and keys are shut out."""
    row = _named(session, name)
    if on:
        _check_not_last(session, row)
        session.execute(sa.delete(Login).where(Login.account_id == row.id))
    row.disabled_at = now() if on else None
    record(session, "keep out" if on else "let in again", row.name)


def remove(session: Session, name: str) -> None:
    """Take an account away with its browsers and keys. What it wrote stays under its name; what it owned is the admins'."""
    row = _named(session, name)
    _check_not_last(session, row)
    record(session, "remove an account", row.name)
    session.flush()
    session.delete(row)


def account_id(session: Session, name: str) -> int:
    """The id of an account; NotFound without one."""
    return _named(session, name).id


def _named(session: Session, name: str) -> Account:
    row = session.scalar(sa.select(Account).where(Account.folded == _folded(name.strip())).with_for_update())
    if row is None:
        raise NotFound(f"There is no account called '{name[:LONGEST_AUTHOR]}'.", field="name")
    return row


def _check_not_last(session: Session, row: Account) -> None:
    others = sa.exists().where(Account.role == "admin", Account.disabled_at.is_(None), Account.id != row.id)
    if row.role == "admin" and row.disabled_at is None and not session.scalar(sa.select(others)):
        raise UsageError(f"{row.name} is the only admin; make somebody else one first.", field="role")


def _account(row: Account) -> AccountRecord:
    return AccountRecord(row.id, row.name, check_role(row.role), row.created_at, row.disabled_at, row.subject is not None)


# ---- who comes in ----


def viewer_by_login(session: Session, digest: str, address: str) -> Viewer | None:
    """Whose browser it is, from what is kept of its cookie: one query."""
    mine = sa.select(Account.id, Account.name, Account.role).join(Login, Login.account_id == Account.id)
    row = session.execute(
        mine.where(Login.digest == digest, Login.expires_at > now(), Account.disabled_at.is_(None))
    ).one_or_none()
    return None if row is None else Viewer(check_role(row.role), row.id, row.name, "login", address)


def viewer_by_key(session: Session, digest: str, address: str) -> Viewer | None:
    """Whose key it is, with no more than its scope allows: one query."""
    mine = sa.select(Account.id, Account.name, Account.role, ApiKey.name.label("key"), ApiKey.scope)
    row = session.execute(
        mine.join(ApiKey, ApiKey.account_id == Account.id).where(
            ApiKey.digest == digest,
            ApiKey.revoked_at.is_(None),
            sa.or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now()),
            Account.disabled_at.is_(None),
        )
    ).one_or_none()
    if row is None:
        return None
    own, most = Viewer(check_role(row.role)), _MOST_ROLE[check_scope(row.scope)]
    return Viewer(most if own.may(most) else own.role, row.id, row.name, f"key {row.key}"[:60], address)


# ---- browsers ----


def log_in(session: Session, account: int, digest: str, expires_at: datetime, address: str, browser: str) -> None:
    """Keep that a browser is logged in; what has run out is forgotten."""
    session.execute(sa.delete(Login).where(Login.expires_at <= now()))
    session.add(
        Login(account_id=account, digest=digest, expires_at=expires_at, address=address[:60], browser=browser[:200])
    )  # fmt: skip


def log_out(session: Session, digest: str) -> None:
    """Forget a browser."""
    session.execute(sa.delete(Login).where(Login.digest == digest))


def end_login(session: Session, account: int, login_id: int) -> None:
    """Shut one of one's own browsers out."""
    if not session.scalar(sa.select(Login.id).where(Login.id == login_id, Login.account_id == account)):
        raise NotFound(f"You have no browser {login_id} logged in.", field="login")
    session.execute(sa.delete(Login).where(Login.id == login_id))
    record(session, "log out", f"browser {login_id}")


def logins(session: Session, account: int) -> tuple[LoginRecord, ...]:
    """Where somebody is logged in, newest first."""
    mine = sa.select(Login, Account.name).join(Account, Account.id == Login.account_id)
    rows = session.execute(mine.where(Login.account_id == account, Login.expires_at > now()).order_by(Login.id.desc()))
    return tuple(LoginRecord(row.id, name, row.created_at, row.expires_at, row.address, row.browser) for row, name in rows)


# ---- keys ----


def add_key(
    session: Session, account: int, name: str, scope: str, digest: str, hint: str, expires_at: datetime | None
) -> KeyRecord:
    """Keep a key's hash."""
    name = one_line(name, "name", LONGEST_AUTHOR - len("key "), field="name")
    row = ApiKey(account_id=account, name=name, scope=check_scope(scope), digest=digest, hint=hint, expires_at=expires_at)
    session.add(row)
    session.flush()
    record(session, f"make a key to {scope}", name)
    return next(key for key in keys(session, account) if key.id == row.id)


def keys(session: Session, account: int | None = None) -> tuple[KeyRecord, ...]:
    """Somebody's keys, or everybody's; newest first, revoked ones too."""
    mine = sa.select(ApiKey, Account.name).join(Account, Account.id == ApiKey.account_id).order_by(ApiKey.id.desc())
    rows = session.execute(mine if account is None else mine.where(ApiKey.account_id == account))
    return tuple(
        KeyRecord(row.id, name, row.name, check_scope(row.scope), row.hint, row.created_at, row.expires_at, row.revoked_at)
        for row, name in rows
    )


def revoke_key(session: Session, key_id: int, account: int | None = None) -> None:
    """Shut a key out; of `account`'s keys alone, where that is given."""
    row = session.get(ApiKey, key_id, with_for_update=True)
    if row is None or account not in (None, row.account_id):
        raise NotFound(f"There is no key {key_id}.", field="key")
    row.revoked_at = row.revoked_at or now()
    record(session, "revoke a key", row.name)


def own_page(session: Session, viewer: Viewer) -> OwnPage:
    """One's own keys and browsers."""
    assert viewer.account is not None
    return OwnPage(viewer.name or "", viewer.role, keys(session, viewer.account), logins(session, viewer.account))


# ---- what was changed ----


def record(session: Session, action: str, target: str, *, viewer: Viewer | None = None, **detail: Any) -> None:
    """Keep a change with who made it: the session's own viewer, or the command line's."""
    by = viewer or viewer_of(session)
    session.info["recorded"] = True
    session.add(
        Audit(
            account_id=by.account, who=by.name or "nobody", way=by.way or "command line", address=by.address,
            action=action[:200], target=target[:300], detail={**session.info.get("noted", {}), **detail},
        )
    )  # fmt: skip


def audit_page(session: Session, *, who: str = "", before: int | None = None, limit: int = 200) -> AuditPage:
    """Changes, newest first; somebody's alone, where `who` is given."""
    listed = sa.select(Audit).order_by(Audit.id.desc()).limit(limit + 1)
    if who:
        listed = listed.where(Audit.who == who)
    if before is not None:
        listed = listed.where(Audit.id < before)
    found = session.scalars(listed).all()
    changes = tuple(
        Change(row.id, row.at, row.who, row.way, row.address, row.action, row.target, row.detail) for row in found[:limit]
    )
    return AuditPage(who, changes, changes[-1].id if len(found) > limit else None)
