"""What people send by forms: the fields, who they say they are, and a session to write it with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated
from urllib.parse import parse_qs, quote, unquote

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse

from sae_core.errors import LoginNeeded, NotFound, UsageError
from server.access import needs, shown
from server.pages.reply import known_schema, link, reply
from server.store.people import author_name

router = APIRouter()

COOKIE = "headscope_author"
A_YEAR = 365 * 24 * 3600


async def form(request: Request) -> dict[str, str]:
    """The fields of a posted form; htmx and browsers send it urlencoded."""
    body = (await request.body()).decode("utf-8", errors="replace")
    return {name: values[-1] for name, values in parse_qs(body, keep_blank_values=True).items()}


Form = Annotated[dict[str, str], Depends(form)]


def author(request: Request) -> str | None:
    """The account's name; without accounts the name that the visitor once typed, which may be any, and None before."""
    who = shown(request)
    if who is not None:
        return who.name
    try:
        return author_name(unquote(request.cookies.get(COOKIE, "")))
    except UsageError:
        return None


def signed(request: Request) -> str:
    """The visitor's name; UsageError before there is one."""
    name = author(request)
    if name is None:
        if shown(request) is not None:
            raise LoginNeeded("Log in first, at /login: what you write is signed with your name.")
        raise UsageError("Say who you are first, at /author: what you write is signed with your name.", field="author")
    return name


Author = Annotated[str | None, Depends(author)]
Signed = Annotated[str, Depends(signed)]


@contextmanager
def writing(request: Request) -> Iterator[Session]:
    """A transaction, committed at the end."""
    with known_schema(request).write() as session:
        yield session


@contextmanager
def reading(request: Request) -> Iterator[Session]:
    """A session that sees what was just written."""
    with known_schema(request).read() as session:
        yield session


def number(form: dict[str, str], field: str) -> int:
    """A whole number that a form's control sends; NotFound when somebody sent something else."""
    text = form.get(field, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise NotFound(f"'{text[:40]}' is no {field}.", field=field)
    return int(text)


def see(address: str) -> Response:
    """On to the page that shows what was done."""
    return RedirectResponse(address, 303, {"Cache-Control": "no-store"})


@router.get("/author", include_in_schema=False)
def author_page(request: Request, name: Author, back: str = "/") -> Response:
    """Where one says who one is; with accounts, by logging in."""
    if shown(request) is not None:
        return see(link("/login", back=local(back)))
    return reply(request, None, "author.html", author=name, back=local(back), trouble="", typed=name or "")


@router.post("/author", include_in_schema=False)
@needs("anonymous")
def remember(request: Request, form: Form) -> Response:
    """Remember the name in a cookie, and go back to where it was asked for."""
    back, typed = local(form.get("back", "/")), form.get("author", "")
    try:
        name = author_name(typed)
    except UsageError as error:
        known = author(request)
        return reply(request, None, "author.html", status=422, author=known, back=back, trouble=str(error), typed=typed)
    response = see(back)
    response.set_cookie(COOKIE, quote(name, safe=""), max_age=A_YEAR, httponly=True, samesite="lax")
    return response


def local(address: str) -> str:
    """The address if it is one of this site, else the first page's: nobody is led away by a link that somebody made."""
    inside = address.startswith("/") and not address.startswith(("//", "/\\")) and address.isprintable() and " " not in address
    return address if inside else "/"
