"""What the pages share that put typed text to the engine: how long a request waits, places in the line, and what may be typed."""

import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from fastapi import Request

from sae_core.errors import Cancelled, NotFound, UsageError
from server.live import InLine
from server.pages.feature import engine
from server.store.prompts import LONGEST

WAIT = 2.0
"""Seconds that a request waits for the engine's answer before it says how many questions are before it."""


def new_ticket() -> str:
    """A name for a question that nobody can guess."""
    return secrets.token_urlsafe(18)


def look(request: Request, form: Mapping[str, str], kind: Literal["answer", "steered", "circuit"]) -> InLine:
    """Where the question of the form's ticket is, or its answer; NotFound where it is no question of that kind. With `do=cancel`
    it is taken out of the line, which Cancelled says."""
    ticket = form.get("ticket", "")
    if not re.fullmatch("[A-Za-z0-9_-]{16,64}", ticket):
        raise NotFound("That is no ticket of a question; ask again.", field="ticket")
    if form.get("do") == "cancel":
        with suppress(NotFound):  # it is gone either way
            engine(request).cancel(ticket)
        raise Cancelled("Cancelled. The text is still here.")
    found = engine(request).look(ticket, WAIT)
    if found.place is None and getattr(found, kind) is None:
        raise NotFound("That is the ticket of another kind of question; ask again.", field="ticket")
    return found


def check_text(*texts: str) -> None:
    """Raise UsageError where the first is empty, or one is too long."""
    if not texts[0].strip():
        raise UsageError("Type some text first.", field="text")
    for text in texts:
        if len(text) > LONGEST:
            raise UsageError(f"That is {len(text)} characters; at most {LONGEST} can be tried at once.", field="text")


def named_token(typed: str, by_id: str, by_text: str) -> dict[str, Any]:
    """A token of the vocabulary as a question names it: `#id` by its number, else by its text; nothing for nothing."""
    number = typed.removeprefix("#")
    if typed.startswith("#") and number.isascii() and number.isdigit() and len(number) < 10:
        return {by_id: int(number)}
    return {by_text: typed} if typed else {}
