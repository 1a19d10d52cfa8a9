"""`/interventions`: a typed text with features changed while the model reads; asked by POST, stored nowhere.

The form is the state, as on the prompt page: every step is one POST that a browser sends without a script, and comes back with
the form as it was sent.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from sqlalchemy.orm import Session

from sae_core.errors import HeadscopeError, NotFound, UsageError
from server.access import needs, viewer
from server.live import ActivationChange, FeatureChanged, InLine, LayerAblated, LiveSteered, NextChange, SteerQuestion
from server.pages.asking import WAIT, check_text, look, new_ticket
from server.pages.feature import engine
from server.pages.reply import Read, reply, wants_part
from server.pages.writing import Form
from server.rendering import level
from server.store import prompts as store
from server.store.features import FeatureRow, check_index
from server.store.prompts import ModelChoice
from server.store.saes import find_sae

router = APIRouter()

MOST = 8
"""Features, and layers, that the form takes."""
TOLD = 40
"""Changed features that are listed."""
HOWS = {
    "ablate": "ablate: zero",
    "mean": "ablate: its mean",
    "resample": "ablate: as in the second text",
    "set": "set to",
    "scale": "scale by",
    "steer": "steer: add",
}
VALUED = ("set", "scale", "steer")
LAYER_HOWS = {"zero": "zeros", "mean": "its mean", "resample": "z of the second text"}
TYPED = ("model", "text", "other", "look", "next", "less", "new", "temperature", "seed")
"""Fields of the form that are there once."""
LONGEST_SPAN = 4096
"""Positions that one edit may name."""


@dataclass(frozen=True)
class FeatureLine:
    """A feature to change, as typed."""

    sae: str = ""
    index: str = ""
    how: str = "ablate"
    value: str = ""
    at: str = ""


@dataclass(frozen=True)
class LayerLine:
    """A layer whose z is taken out, as typed."""

    layer: str = ""
    how: str = "zero"
    heads: str = ""
    at: str = ""


@dataclass(frozen=True)
class Asked:
    """The form as it was sent."""

    model: str = ""
    text: str = ""
    other: str = ""
    features: tuple[FeatureLine, ...] = (FeatureLine(),)
    layers: tuple[LayerLine, ...] = ()
    error: bool = True
    look: str = ""
    next: str = ""
    less: str = ""
    new: str = "24"
    temperature: str = "0"
    seed: str = "0"
    ticket: str = field(default="", compare=False)


@dataclass(frozen=True)
class Token:
    """A token of the text, painted by how its loss changed."""

    at: int
    text: str
    before: float | None
    """Its loss as the model is; None for the row start, which nothing predicts."""
    after: float | None
    level: int
    up: bool
    changed: bool
    """Whether something was changed at this position."""
    kl: float


@dataclass(frozen=True)
class Reached:
    """A feature that the change reached."""

    change: ActivationChange
    layer: int
    text: str
    row: FeatureRow | None


@dataclass(frozen=True)
class Result:
    """What the page shows of an answer."""

    answer: LiveSteered
    tokens: tuple[Token, ...]
    loss: tuple[float, float] | None
    """Mean over the text's tokens, plain and changed; None of a text of one token."""
    strongest: float
    """The largest change of a token's loss."""
    next: tuple[NextChange, ...]
    difference: tuple[float, float] | None
    """Logit of the first next token asked for less the second's, plain and changed."""
    reached: tuple[Reached, ...]
    same: tuple[int, int]
    """Characters that both written texts begin with, and tokens."""


@dataclass(frozen=True)
class InterventionsPage:
    """What text can be put to."""

    models: tuple[ModelChoice, ...]
    """Those with SAEs, each with its SAEs by layer."""


# ---- the pages ----


@router.get("/interventions", include_in_schema=False)
@router.get("/interventions.json", response_model=InterventionsPage)
def show_interventions(
    request: Request, read: Read, sae: str = "", feature: str = "", how: str = "ablate", value: str = ""
) -> Response:
    """The empty form; about one feature where the address names it."""
    page = InterventionsPage(store.choices(read))
    first = sae or next((one.name for model in page.models[:1] for one in model.saes if one.harvested), "")
    line = FeatureLine(first, feature[:10], how if how in HOWS else "ablate", value[:12])
    asked = Asked(model=_model_of(page.models, first), features=(line,))
    if viewer(request).may("reader") and any(first == one.name for model in page.models for one in model.saes):
        with suppress(HeadscopeError):  # if the engine is away, the question will say so
            engine(request).warm(first)
    return _shown(request, page, asked)


@router.post("/interventions", include_in_schema=False)
@needs("reader", live=True)
def ask_interventions(request: Request, read: Read, form: Form) -> Response:
    """The text with what the form changes; or the form with a line more or less. Nothing of it is stored."""
    page, asked = InterventionsPage(store.choices(read)), read_form(form)
    if form.get("do", "ask") != "ask":
        return _shown(request, page, _rearranged(asked, form["do"]))
    return _answered(request, read, page, asked, lambda question: engine(request).leave_steer(new_ticket(), question, WAIT))


@router.post("/interventions/look", include_in_schema=False)
@needs("reader")
def look_for_answer(request: Request, read: Read, form: Form) -> Response:
    """Where a question is that was asked before, or its answer; or take it out of the line."""
    page = InterventionsPage(store.choices(read))
    return _answered(request, read, page, read_form(form), lambda _: look(request, form, "steered"))


def _answered(
    request: Request, read: Session, page: InterventionsPage, asked: Asked, ask: Callable[[SteerQuestion], InLine]
) -> Response:
    """The answer that `ask` gives; or the question's place in the line; or a sentence, with the form as it was."""
    try:
        asked, wanted = question(read, page.models, asked)
        found = ask(wanted)
        if found.steered is None:
            return _shown(request, page, replace(asked, ticket=found.ticket), place=found.place or 0)
        result = made(read, page.models, found.steered, wanted)
    except HeadscopeError as error:
        return _shown(request, page, replace(asked, ticket=""), trouble=str(error))
    return _shown(request, page, replace(asked, ticket=""), result=result)


def _shown(
    request: Request,
    page: InterventionsPage,
    asked: Asked,
    *,
    result: Result | None = None,
    place: int | None = None,
    trouble: str = "",
) -> Response:
    view: dict[str, Any] = {"asked": asked, "result": result, "place": place, "trouble": trouble, "fields": fields(asked)}
    view |= {"may_ask": viewer(request).may("reader"), "hows": HOWS, "valued": VALUED, "layer_hows": LAYER_HOWS, "most": MOST}
    view["look_id"] = secrets.token_hex(4)  # another one each time: what is morphed into itself would not ask again
    status = 422 if trouble and not wants_part(request) else 200
    return reply(request, page, "interventions.html", block="_interventions.html", status=status, **view)


def _model_of(models: Sequence[ModelChoice], sae: str) -> str:
    """The model that an SAE is of; the first where there is no such SAE."""
    known = {one.name: model.name for model in models for one in model.saes}
    return known.get(sae) or next((model.name for model in models), "")


def _rearranged(asked: Asked, do: str) -> Asked:
    """The form with a line more or less; `pick` has moved what is looked at already."""
    kind, _, number = do.partition(":")
    n = int(number) if number.isascii() and number.isdigit() else -1
    if kind == "add-feature" and len(asked.features) < MOST:
        last = asked.features[-1] if asked.features else FeatureLine()
        return replace(asked, features=(*asked.features, FeatureLine(sae=last.sae)))
    if kind == "drop-feature":
        return replace(asked, features=tuple(one for i, one in enumerate(asked.features) if i != n))
    if kind == "add-layer" and len(asked.layers) < MOST:
        return replace(asked, layers=(*asked.layers, LayerLine()))
    if kind == "drop-layer":
        return replace(asked, layers=tuple(one for i, one in enumerate(asked.layers) if i != n))
    return asked


# ---- the form ----


def read_form(form: Mapping[str, str]) -> Asked:
    """What the form says, as it was typed."""

    def lines(kind: type[Any], prefix: str) -> tuple[Any, ...]:
        names = tuple(kind.__dataclass_fields__)
        return tuple(
            kind(**{name: form.get(f"{prefix}.{i}.{name}", getattr(kind(), name)).strip()[:200] for name in names})
            for i in range(MOST)
            if any(f"{prefix}.{i}.{name}" in form for name in names)
        )

    given = {name: form[name] for name in (*TYPED, "ticket") if name in form}
    for name in ("text", "other"):  # a browser ends lines in two characters, whatever was typed
        if name in given:
            given[name] = given[name].replace("\r\n", "\n")
    if form.get("pick", "").startswith("look:"):
        given["look"] = form["pick"].removeprefix("look:")
    error = "keep" in form.get("error", "keep" if "text" not in form else "")
    return Asked(features=lines(FeatureLine, "f"), layers=lines(LayerLine, "l"), error=error, **given)


def fields(asked: Asked) -> dict[str, str]:
    """The hidden fields that carry the form from one step to the next."""
    found = {name: str(getattr(asked, name)) for name in TYPED}
    for i, feature in enumerate(asked.features):
        found |= {f"f.{i}.{name}": typed for name, typed in asdict(feature).items()}
    for i, layer in enumerate(asked.layers):
        found |= {f"l.{i}.{name}": typed for name, typed in asdict(layer).items()}
    return found | ({"error": "keep"} if asked.error else {})


def question(read: Session, models: Sequence[ModelChoice], asked: Asked) -> tuple[Asked, SteerQuestion]:
    """What the engine is asked, and the form with its model. UsageError and NotFound where the form says nothing that can be."""
    check_text(asked.text, asked.other)
    features = [one for one in asked.features if one.index]
    layers = [one for one in asked.layers if one.layer]
    if not features and not layers:
        raise UsageError("Name a feature by its index, or a layer, that is to be changed.", field="features")
    for line in features:
        check_index(find_sae(read, line.sae), _number(line.index, "a feature's index"))
    model = _model_of(models, features[0].sae) if features else asked.model or _model_of(models, "")
    choice = next((one for one in models if one.name == model), None)
    if choice is None:
        raise NotFound(f"There are no SAEs of a model called '{model[:60]}'.", field="model")
    named = {line.sae for line in features}
    by_layer = {
        one.layer: one.name for one in sorted(choice.saes, key=lambda one: (one.name not in named, not one.harvested))[::-1]
    }
    following = [text for text in (asked.next, asked.less) if text]
    try:
        return replace(asked, model=model), SteerQuestion(
            features=[_feature(one) for one in features],
            ablations=[_layer(one) for one in layers],
            text=asked.text,
            other=asked.other if asked.other.strip() else None,
            look=_number(asked.look, "a position") if asked.look.strip() else None,
            next_texts=following,
            keep_error=asked.error,
            watch=[name for name in by_layer.values() if name not in named][:100],
            most=TOLD,
            new_tokens=_number(asked.new or "0", "a number of tokens"),
            temperature=_value(asked.temperature or "0", "a temperature"),
            seed=_number(asked.seed or "0", "a seed"),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][-1]) if first["loc"] else ""
        said = first["msg"].removeprefix("Value error, ")
        raise UsageError(
            f"{where.replace('_', ' ')}: {said}." if where else f"{said[:1].upper()}{said[1:]}.", field=where
        ) from None


def _feature(line: FeatureLine) -> FeatureChanged:
    value = 0.0
    if line.how in VALUED:
        if not line.value:
            raise UsageError(f"Say how much: '{HOWS[line.how]}' of feature {line.index} needs a number.", field="value")
        value = _value(line.value, "a strength")
    return FeatureChanged.model_validate(
        {"sae": line.sae, "index": int(line.index), "how": line.how, "value": value, "at": positions(line.at)}
    )


def _layer(line: LayerLine) -> LayerAblated:
    heads = positions(line.heads, "heads")
    return LayerAblated.model_validate(
        {"layer": _number(line.layer, "a layer"), "how": line.how, "heads": heads, "at": positions(line.at)}
    )


def positions(typed: str, what: str = "positions") -> list[int] | None:
    """`3, 5-7` as numbers; None, which is all, for nothing. UsageError for what cannot be read."""
    found: list[int] = []
    for part in typed.replace(",", " ").split():
        low, dash, high = part.partition("-")
        first = _number(low, what)
        last = _number(high, what) if dash else first
        if not first <= last < first + LONGEST_SPAN:
            raise UsageError(f"'{part}' names no {what}; write them as 3, 5-7.", field="at")
        found += range(first, last + 1)
    return sorted(set(found)) or None


def _number(typed: str, what: str) -> int:
    typed = typed.strip()
    if not (typed.isascii() and typed.isdigit() and len(typed) < 11):
        raise UsageError(f"'{typed[:20]}' is not {what}; write a whole number.", field=what)
    return int(typed)


def _value(typed: str, what: str) -> float:
    try:
        return float(typed.strip().replace("\u2212", "-"))
    except ValueError:
        raise UsageError(f"'{typed[:20]}' is not {what}; write a number.", field=what) from None


# ---- the answer, made ready ----


def made(read: Session, models: Sequence[ModelChoice], answer: LiveSteered, asked: SteerQuestion) -> Result:
    """The answer with what the database knows."""
    moved = [now - was for was, now in zip(answer.losses, answer.changed_losses, strict=True)]
    strongest = max(map(abs, moved), default=0.0)
    places = [set(range(1, len(answer.tokens)) if one.at is None else one.at) for one in asked.changes]
    for i, (one, was) in enumerate(zip(asked.features, answer.features, strict=True)):
        if one.how in ("ablate", "scale"):  # where it is silent nothing changes
            places[i] &= {at for at, value in enumerate(was.activations) if value}
    changed = set().union(*places)
    tokens = tuple(
        Token(
            at=at,
            text=text,
            before=answer.losses[at - 1] if at else None,
            after=answer.changed_losses[at - 1] if at else None,
            # A change that is rounding is no change.
            level=level(abs(moved[at - 1]), strongest) if at and abs(moved[at - 1]) > 1e-4 else 0,
            up=bool(at and moved[at - 1] > 0),
            changed=at in changed,
            kl=answer.kl[at],
        )
        for at, text in enumerate(answer.texts)
    )
    n = len(answer.losses)
    both = [(one.logit, one.changed_logit) for one in answer.asked]
    apart = (both[0][0] - both[1][0], both[0][1] - both[1][1]) if len(both) == 2 else None
    known = {one.id for one in answer.asked}
    plain, now = answer.plain, answer.changed
    return Result(
        answer=answer,
        tokens=tokens,
        loss=(sum(answer.losses) / n, sum(answer.changed_losses) / n) if n else None,
        strongest=strongest,
        next=(*answer.asked, *(one for one in answer.likely if one.id not in known)),
        difference=apart,
        reached=_reached(read, models, answer),
        same=(_alike(plain.text, now.text), _alike(plain.tokens, now.tokens)),
    )


def _reached(read: Session, models: Sequence[ModelChoice], answer: LiveSteered) -> tuple[Reached, ...]:
    layers = {one.name: one.layer for model in models for one in model.saes}
    wanted: dict[str, set[int]] = {}
    for one in answer.reached:
        wanted.setdefault(one.sae, set()).add(one.index)
    rows = {sae: store.told(read, find_sae(read, sae), indices) for sae, indices in wanted.items()}
    return tuple(
        Reached(one, layers.get(one.sae, 0), answer.texts[one.position], rows[one.sae].get(one.index)) for one in answer.reached
    )


def _alike(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
