"""`/prompt`: a typed text through the features of an SAE, or of all SAEs of a model; asked by POST, stored only when shared.

The form is the state: what is looked at (a token, a feature, a next token) travels with the text in hidden fields, so that every
step is one POST that a browser sends without a script.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session

from sae_core.errors import HeadscopeError, NotFound, UsageError
from server.access import needs, viewer
from server.live import FeatureAt, InLine, PromptQuestion
from server.pages.asking import WAIT, check_text, look, named_token, new_ticket
from server.pages.feature import engine
from server.pages.prompt_grid import PAGE, Result, made
from server.pages.reply import Read, reply, wants_json, wants_part
from server.pages.writing import Form, see, writing
from server.store import prompts as store
from server.store.prompts import ModelChoice, SharedLine, SharedPrompt
from server.store.saes import Door

router = APIRouter()

EVERY = 1000
"""Features a token that two texts are compared by: all of them, in all but the densest SAEs."""


@dataclass(frozen=True)
class Looked:
    """What is looked at in a prompt."""

    at: int | None = None
    """A token of the text."""
    against_at: int | None = None
    """A token of the second text."""
    feature: FeatureAt | None = None
    """A feature at a token of the text."""


@dataclass(frozen=True)
class Asked:
    """A prompt as the form sends it."""

    text: str = ""
    against: str = ""
    saes: str = ""
    """`sae:` and the name of one, or `model:` and the name of a model, for all of its SAEs."""
    looked: Looked = Looked()
    next: str = ""
    """The next token whose logit is asked about, as typed; empty takes the one that follows."""
    ticket: str = ""
    begin: int | None = None
    """The line that the grid begins with, of a text that is too long for one; None is where the token looked at is."""


@dataclass(frozen=True)
class PromptPage:
    """Where one begins: what text can be put to, and what one has shared."""

    models: tuple[ModelChoice, ...]
    """Those with SAEs, each with its SAEs by layer."""
    shared: tuple[SharedLine, ...]
    """What whoever asks has shared, the newest first."""


# ---- the pages ----


@router.get("/prompt", include_in_schema=False)
@router.get("/prompt.json", response_model=PromptPage)
def show_prompt(request: Request, read: Read, sae: str = "", text: str = "") -> Response:
    """The empty box. Whoever opens it is about to ask, so the engine is told to load the model."""
    page = _page(request, read)
    asked = Asked(text=text[: store.LONGEST], saes=f"sae:{sae}" if sae else _first(page.models))
    _prepare(request, page, asked)
    return _shown(request, page, asked)


@router.post("/prompt", include_in_schema=False)
@needs("reader", live=True)
def ask_prompt(request: Request, read: Read, form: Form) -> Response:
    """The text through the SAEs. Nothing of it is stored."""
    return _answered(request, read, form, lambda asked, doors: _leave(request, asked, doors))


@router.post("/prompt/look", include_in_schema=False)
@needs("reader")
def look_for_answer(request: Request, read: Read, form: Form) -> Response:
    """Where a question is that was asked before, or its answer; or take it out of the line."""
    return _answered(request, read, form, lambda *_: look(request, form, "answer"))


def _answered(request: Request, read: Session, form: Form, ask: Callable[[Asked, Sequence[Door]], InLine]) -> Response:
    """The answer that `ask` gives; or the question's place in the line; or a sentence beside the box, which keeps the text."""
    page = _page(request, read)
    asked = Asked(text=form.get("text", ""), against=form.get("against", ""), saes=form.get("saes", ""))
    try:
        asked = read_form(form)
        doors = asked_doors(read, page.models, asked.saes)
        found = ask(asked, doors)
        if found.answer is None:
            return _shown(request, page, replace(asked, ticket=found.ticket), place=found.place)
        result = made(read, doors, found.answer, asked.looked.at, asked.looked.against_at, asked.begin)
    except HeadscopeError as error:
        return _shown(request, page, replace(asked, ticket=""), trouble=str(error))
    return _shown(request, page, replace(asked, ticket=""), result=result)


@router.post("/prompt/share", include_in_schema=False)
def share_prompt(request: Request, read: Read, form: Form) -> Response:
    """Store the text, and on to its address."""
    try:
        asked = read_form(form)
        doors = asked_doors(read, store.choices(read), asked.saes)
        days = days_of(form.get("days", ""))
        with writing(request) as session:
            made_ = share(session, asked, doors, form.get("visibility", "shared"), days)
    except UsageError as error:
        typed = Asked(text=form.get("text", ""), against=form.get("against", ""), saes=form.get("saes", ""))
        return _shown(request, _page(request, read), typed, trouble=str(error))
    return see(f"/prompts/{made_}")


@router.get("/prompts/{prompt_id}", include_in_schema=False)
@router.get("/prompts/{prompt_id}.json", response_model=SharedPrompt)
def show_shared(request: Request, prompt_id: str, read: Read) -> Response:
    """A shared text, in the box. The page then asks by itself where a script may; without one, the button does."""
    found = store.shared(read, prompt_id)
    page = _page(request, read)
    asked = of_shared(found)
    if wants_json(request):
        return _shown(request, found, asked)
    _prepare(request, page, asked)
    return _shown(request, page, asked, shared=found.line)


@router.post("/prompts/{prompt_id}/delete", include_in_schema=False)
def delete_shared(request: Request, prompt_id: str) -> Response:
    """Delete a shared text."""
    with writing(request) as session:
        store.unshare(session, prompt_id)
    return see("/prompt")


def _shown(
    request: Request,
    page: PromptPage | SharedPrompt,
    asked: Asked,
    *,
    result: Result | None = None,
    place: int | None = None,
    trouble: str = "",
    shared: SharedLine | None = None,
) -> Response:
    status = 200 if not trouble or wants_part(request) else 422
    view: dict[str, Any] = {"asked": asked, "result": result, "place": place, "trouble": trouble, "shared": shared}
    view |= {"may_ask": viewer(request).may("reader"), "fields": fields(asked), "picked": picked, "pages": PAGE}
    return reply(request, page, "prompt.html", block="_prompt.html", status=status, **view)


def _page(request: Request, read: Session) -> PromptPage:
    who = viewer(request)
    return PromptPage(store.choices(read), store.shared_lines(read, who.account) if who.may("editor") else ())


def _first(models: Sequence[ModelChoice]) -> str:
    """What is chosen at first: all SAEs of the model that has most; of one that has one, that."""
    most = max(models, key=lambda model: len(model.saes), default=None)
    if most is None:
        return ""
    return f"model:{most.name}" if len(most.saes) > 1 else f"sae:{most.saes[0].name}"


def _prepare(request: Request, page: PromptPage, asked: Asked) -> None:
    """Tell the engine which model will be asked; if it is away, the question will say so."""
    if not viewer(request).may("reader"):
        return
    kind, _, name = asked.saes.partition(":")
    known = {model.name: model.saes[0].name for model in page.models}
    names = {sae.name for model in page.models for sae in model.saes}
    first = known.get(name) if kind == "model" else name if name in names else None
    if first is not None:
        with suppress(HeadscopeError):
            engine(request).warm(first)


def _leave(request: Request, asked: Asked, doors: Sequence[Door]) -> InLine:
    return engine(request).leave(new_ticket(), question(asked, doors), WAIT)


# ---- the form ----


def read_form(form: Mapping[str, str]) -> Asked:
    """What the form says. `pick` is the button that was pressed: what is looked at from now on."""
    looked = Looked(_position(form.get("at", "")), _position(form.get("against_at", "")), _feature(form.get("feature", "")))
    following, picks = form.get("next", ""), form.get("pick", "")
    kind, _, rest = picks.partition(":")
    if kind == "token":
        at, _, against_at = rest.partition(":")
        looked = Looked(_position(at), _position(against_at))
    elif kind == "feature":
        feature = _feature(rest)
        looked, following = replace(looked, at=feature.dest if feature else looked.at, feature=feature), ""
    elif kind == "next":
        following = rest
    begin = _position(rest if kind == "from" else form.get("begin", ""))
    text = form.get("text", "")
    check_text(text, form.get("against", ""))
    if form.get("do") == "ask":  # another text, perhaps: what was looked at may not be there
        looked, following, begin = Looked(), "", None
    return Asked(
        # A browser ends lines in two characters, whatever was typed.
        text.replace("\r\n", "\n"),
        form.get("against", "").replace("\r\n", "\n"),
        form.get("saes", ""),
        looked,
        following,
        form.get("ticket", ""),
        begin,
    )


def fields(asked: Asked) -> dict[str, str]:
    """The hidden fields that carry a prompt from one step to the next."""
    looked = asked.looked
    feature = looked.feature
    return {
        "text": asked.text,
        "against": asked.against,
        "saes": asked.saes,
        "at": "" if looked.at is None else str(looked.at),
        "against_at": "" if looked.against_at is None else str(looked.against_at),
        "feature": "" if feature is None else f"{feature.index}@{feature.dest}@{feature.sae}",
        "begin": "" if asked.begin is None else str(asked.begin),
    }


def picked(kind: str, *what: object) -> str:
    """The value of a button that changes what is looked at."""
    if kind == "feature":
        return "feature:" + "@".join(map(str, what))
    return f"{kind}:" + ":".join("" if one is None else str(one) for one in what)


def _position(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 7):
        raise UsageError(f"'{text[:20]}' is no token position.", field="at")
    return int(text)


def _feature(text: str) -> FeatureAt | None:
    if not text:
        return None
    index, _, rest = text.partition("@")
    dest, _, sae = rest.partition("@")
    number, position = _position(index), _position(dest)
    if number is None or position is None or not sae:
        raise UsageError(f"'{text[:60]}' is no feature at a token.", field="feature")
    return FeatureAt(sae=sae, index=number, dest=position)


def asked_doors(read: Session, models: Sequence[ModelChoice], saes: str) -> list[Door]:
    """The SAEs that `saes` names: one, or all of a model."""
    kind, _, name = saes.partition(":")
    if kind == "model":
        known = next((model for model in models if model.name == name), None)
        if known is None:
            there_are = ", ".join(model.name for model in models) or "none yet"
            raise NotFound(f"There are no SAEs of a model called '{name[:60]}'; there are SAEs of: {there_are}.", field="saes")
        return store.asked_doors(read, [sae.name for sae in known.saes[:100]])
    return store.asked_doors(read, [name if kind == "sae" else saes])


def question(asked: Asked, doors: Sequence[Door]) -> PromptQuestion:
    """What the engine is asked."""
    looked, names = asked.looked, [door.sae.name for door in doors]
    feature = looked.feature
    if feature is not None and feature.sae not in names:
        feature = None  # of an SAE that is not asked any more
    if feature is not None and asked.next:
        feature = feature.model_copy(update=named_token(asked.next[:200], "next", "next_text"))
    compares = bool(asked.against.strip())
    return PromptQuestion(
        saes=names,
        text=asked.text,
        against=asked.against if compares else None,
        top=EVERY if compares else 8,
        at=looked.at,
        against_at=looked.against_at if compares else None,
        feature=feature,
    )


# ---- sharing ----


def days_of(typed: str) -> int | None:
    """For how many days a text is kept, as typed; None for good."""
    if typed and not (typed.isascii() and typed.isdigit() and len(typed) < 6):
        raise UsageError(f"'{typed[:20]}' is no number of days; give 1 to {store.LONGEST_DAYS}, or nothing.", field="days")
    return int(typed) if typed else None


def share(session: Session, asked: Asked, doors: Sequence[Door], visibility: str, days: int | None) -> str:
    """Store a prompt; its id."""
    kind, _, model = asked.saes.partition(":")
    looked = asked.looked
    feature = looked.feature if looked.feature and looked.feature.sae in {door.sae.name for door in doors} else None
    view: dict[str, Any] = {
        "at": looked.at,
        "against_at": looked.against_at,
        "feature": feature and {"sae": feature.sae, "index": feature.index, "dest": feature.dest},
    }
    return store.share(
        session,
        asked.text,
        asked.against if asked.against.strip() else None,
        model=model if kind == "model" else None,
        doors=doors,
        view=view,
        visibility=visibility,
        days=days,
    )


def of_shared(found: SharedPrompt) -> Asked:
    """The shared prompt as its form would send it."""
    saes = f"model:{found.model}" if found.model is not None else f"sae:{found.saes[0]}" if found.saes else ""
    at = found.view.get("feature")
    feature = None if at is None else FeatureAt(sae=at["sae"], index=at["index"], dest=at["dest"])
    return Asked(found.text, found.against or "", saes, Looked(found.view.get("at"), found.view.get("against_at"), feature))
