"""`/studies` and `/studies/{id}`: questions put to features and heads, with plots of what was found."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Self

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from starlette.responses import RedirectResponse

from server.charts import Bar, Dot, Dots, HeadCell, Line, Point
from server.pages.reply import Read, etag, link, reply, unchanged, wants_json
from server.rendering import num
from server.store import studies
from server.store.studies import StudyLine, StudyRecord

router = APIRouter()

SHOWN = 6
"""Heads drawn at once: there are so many marks that one can tell apart."""
Z95 = 1.959964
DOES = 0.3
"""As `sae_core.studies.induction` has it."""
ROLE_MARKS = {"short-prefix": 0, "long-prefix": 3}
ELSEWHERE = (("previous", "the token before"), ("duplicate", "the earlier copy of the token itself"))
ROWS = 40
"""Heads in the table of a study of every head."""


class Score(NamedTuple):
    """A score that the map of heads can show."""

    key: str
    title: str
    says: str
    read: Callable[[Mapping[str, Any]], float | None]
    """Of a head of the result."""


def _scores(where: str, said: str, prefix: str = "") -> tuple[Score, ...]:
    """Scores of attention `where` in a head, which are means over `said`."""
    words = {
        "previous": ("token before", "to the token before"),
        "duplicate": ("duplicate", "to earlier copies of the token itself"),
        "induction": ("induction", "to what followed earlier copies of the token"),
        "start": ("row start", "to row starts, where attention rests"),
        "current": ("itself", "to the token itself"),
    }
    return tuple(
        Score(f"{prefix}{key}", f"{title}{', text' if prefix else ''}", f"Mean attention {to}, {said}.", _reader(where, key))
        for key, (title, to) in words.items()
    )


def _reader(where: str, key: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda head: head[where][key] if head[where] else None


ON_RANDOM = _scores("random", "on random tokens said twice")
IN_TEXT = _scores("text", "in real text, tokens compared without leading space and capitals", "text-")
BY_WEIGHTS = (
    Score(
        "copying",
        "copying",
        "By weights: the sum of the eigenvalues of the head's OV circuit over the sum of their sizes; 1 where it raises what it "
        "reads, -1 where it lowers it.",
        lambda head: head["copying"],
    ),
    Score(
        "own",
        "own logit",
        "By weights: the mean over tokens of what the head writes to the logit of the token it reads, in standard deviations of "
        "what it writes to all.",
        lambda head: head["own"],
    ),
    Score(
        "successor",
        "successor",
        "By weights: of tokens that are said in order (numbers, weekdays, letters, ...), the share whose successor the head "
        "raises most among their kind.",
        lambda head: head["successor"],
    ),
)
SCORES = {score.key: score for score in (*ON_RANDOM, *IN_TEXT, *BY_WEIGHTS)}


@dataclass(frozen=True)
class StudiesPage:
    """Studies, newest first."""

    query: "StudiesQuery"
    studies: tuple[StudyLine, ...]


class StudiesQuery(BaseModel):
    """Which studies are listed."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    sae: str | None = None
    """Only those of this SAE's features."""
    feature: int | None = Field(None, ge=0)
    """Only those of this feature of it."""

    @model_validator(mode="after")
    def _feature_of_an_sae(self) -> Self:
        if self.feature is not None and self.sae is None:
            raise ValueError("`feature` needs an SAE: add sae=<its name>")
        return self


@dataclass(frozen=True)
class StudyPage:
    """A study with all that it found."""

    study: StudyRecord


class StudyQuery(BaseModel):
    """Which heads a study of heads draws, and by which score. Its address is exactly this."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    heads: str = ""
    """Heads as `layer.head`, with commas between; none: the strongest of each role."""
    score: str = "induction"
    """Of a study of every head, the score that its map and its table go by."""

    @field_validator("score")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in SCORES:
            raise ValueError(f"'{value}' is no score; there are {', '.join(SCORES)}")
        return value

    @model_validator(mode="after")
    def _are_heads(self) -> Self:
        if not re.fullmatch(r"(\d{1,4}\.\d{1,4}(,\d{1,4}\.\d{1,4}){0,19})?", self.heads):
            raise ValueError(f"'{self.heads}' names no heads; write them as layer.head with commas between, such as 17.3,18.6")
        return self


@router.get("/studies", include_in_schema=False)
@router.get("/studies.json", response_model=StudiesPage)
def studies_page(request: Request, query: Annotated[StudiesQuery, Query()], read: Read) -> Response:
    """Every study, or those of a feature, which its page asks for as a block: they may come after its harvest."""
    page = StudiesPage(query, studies.studies(read, query.sae, query.feature))
    return reply(request, page, "studies.html", block="_studies_of.html")


@router.get("/studies/{study_id}", include_in_schema=False)
@router.get("/studies/{study_id}.json", response_model=StudyPage)
def study_page(request: Request, study_id: int, query: Annotated[StudyQuery, Query()], read: Read) -> Response:
    """One study; it never changes, so a browser that has it is told so."""
    record = studies.study(read, study_id)
    if record.kind == "compare" and not wants_json(request):
        return RedirectResponse(link("/compare", a=record.config["sae"], b=record.config["against"]), 303)
    tag = etag(request, record.id, record.created_at, query.heads, query.score)
    if found := unchanged(request, tag):
        return found
    views = {
        "specificity": _of_feature,
        "induction": _of_heads,
        "heads": _of_every_head,
        "ioi": _of_indirect_objects,
        "prefix": _of_prefixes,
    }
    return reply(request, StudyPage(record), "study.html", tag=tag, **views[record.kind](record, query))


# ------------------------------------------------------------------------------------------------------------ a feature


def _of_feature(record: StudyRecord, _: StudyQuery) -> dict[str, Any]:
    """Precision and recall by threshold, as lines."""
    by = record.result["by_threshold"]

    def line(name: str, mark: int) -> Line:
        values = zip(by["activation"], by[name], by[f"{name}_low"], by[f"{name}_high"], strict=True)
        return Line(name, mark, [Point(x, y, low, high) for x, y, low, high in values if y is not None])

    return {"agreement": [found for found in (line("precision", 0), line("recall", 1)) if found.points]}


# ------------------------------------------------------------------------------------------------------------- of heads


def _of_heads(record: StudyRecord, query: StudyQuery) -> dict[str, Any]:
    """The map of heads, and lines and bars of those that are drawn."""
    result, here = record.result, f"/studies/{record.id}"
    heads = {_name(head): head for head in result["heads"]}
    chosen = [name for name in query.heads.split(",") if name in heads][-SHOWN:] or _strongest(result["heads"])

    def toggled(name: str) -> str:
        return link(here, heads=_toggled(chosen, name))

    drawn = [heads[name] for name in chosen]
    return {
        "cells": [
            HeadCell(
                head["layer"],
                head["head"],
                head["best"],
                (num(head["best"]), head["role"]),
                toggled(name),
                ROLE_MARKS.get(head["role"]),
                name in chosen,
            )
            for name, head in heads.items()
        ],
        "name": _name,
        "toggled": toggled,
        "chosen": chosen,
        "drawn": drawn,
        "doing": [head for head in result["heads"] if head["role"] != "not induction" or _name(head) in chosen],
        "counts": {role: sum(head["role"] == role for head in result["heads"]) for role in ("short-prefix", "long-prefix")},
        "scores": _lines(drawn, result["prefixes"], "score", "score_error"),
        "logits": _lines(drawn, result["prefixes"], "logit", "logit_error"),
        "targets": _lines(drawn, None, "target", None),
        "bars": _prefix_bars,
        "elsewhere": [(words, found) for key, words in ELSEWHERE if (found := _foremost(result["heads"], key))],
    }


def _toggled(chosen: Sequence[str], name: str) -> str | None:
    """The heads chosen, with this one more or less, as an address says it."""
    others = [other for other in chosen if other != name]
    return ",".join(others if len(others) < len(chosen) else [*others, name][-SHOWN:]) or None


def _name(head: Mapping[str, Any]) -> str:
    return f"{head['layer']}.{head['head']}"


def _strongest(heads: Sequence[Mapping[str, Any]]) -> list[str]:
    """The strongest heads, as many of each role where there are so many; just the strongest where none does induction."""
    doing = [head for head in heads if head["role"] != "not induction"]
    first = [_name(head) for role in ROLE_MARKS for head in [h for h in doing if h["role"] == role][: SHOWN // 2]]
    rest = [name for name in map(_name, doing) if name not in first]
    return [*first, *rest][:SHOWN] or [_name(head) for head in heads[: SHOWN // 2]]


def _lines(heads: Sequence[Mapping[str, Any]], prefixes: Sequence[int] | None, key: str, error: str | None) -> list[Line]:
    """A line for each head over the length of the prefix; 95 % bands where there are standard errors."""
    made = []
    for mark, head in enumerate(heads):
        values = head[key]
        errors = head[error] if error and head[error] else [None] * len(values)
        points = [
            Point(x, y, *((y - Z95 * e, y + Z95 * e) if e is not None else (None, None)))
            for x, y, e in zip(prefixes or range(1, len(values) + 1), values, errors, strict=True)
            if y is not None
        ]
        if points:
            made.append(Line(_name(head), mark, points))
    return made


def _foremost(heads: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, float]]:
    """The heads that give the most attention there, if it is more than the study counts as attending."""
    known = sorted(((head[key], _name(head)) for head in heads), key=lambda one: -one[0])
    return [(name, value) for value, name in known[:SHOWN] if value >= DOES]


def _prefix_bars(head: Mapping[str, Any]) -> list[Bar]:
    """How often a head attends, by the prefix of what it attends to; 0 is no induction target, and left out."""
    last = len(head["attended"]) - 1
    return [Bar(f"{p}+" if p == last else str(p), n) for p, n in enumerate(head["attended"]) if p]


# ---------------------------------------------------------------------------------------------------------- every head


def _of_every_head(record: StudyRecord, query: StudyQuery) -> dict[str, Any]:
    """The map of one score, the table of the heads that have most of it, and lines over layers."""
    result, here, score = record.result, f"/studies/{record.id}", SCORES[query.score]
    heads = {_name(head): head for head in result["heads"]}
    chosen = [name for name in query.heads.split(",") if name in heads]
    known = [score.read(head) for head in heads.values()]
    thresholds = sorted(result["thresholds"].items())
    rules = [(role, least, 0 if least > 0 else 3) for role, (of, least) in thresholds if of == score.key]
    marks = {role: mark for role, _, mark in rules}

    def toggled(name: str) -> str:
        return link(here, score=query.score, heads=_toggled(chosen, name))

    def size(head: Mapping[str, Any]) -> float:
        return abs(score.read(head) or 0.0)

    ranked = sorted(heads.values(), key=lambda head: -size(head))[:ROWS]
    return {
        "score": score,
        "choices": [*ON_RANDOM, *(IN_TEXT if result["corpus"] else ()), *(BY_WEIGHTS if result["vocabulary"] else ())],
        "scored": lambda key: link(here, score=key, heads=query.heads or None),
        "cells": [
            HeadCell(
                head["layer"],
                head["head"],
                score.read(head) or 0.0,
                (num(score.read(head)), ", ".join(head["roles"]) or "–"),
                toggled(name),
                next((marks[role] for role in head["roles"] if role in marks), None),
                name in chosen,
            )
            for name, head in heads.items()
        ],
        "highest": max(1.0, *(abs(value or 0.0) for value in known)),
        "rules": rules,
        "kinds": ON_RANDOM,
        "weights": BY_WEIGHTS,
        "value": score.read,
        "name": _name,
        "toggled": toggled,
        "chosen": chosen,
        "rows": sorted(
            {_name(head): head for head in [*ranked, *(heads[name] for name in chosen)]}.values(), key=lambda h: -size(h)
        ),
        "by_layer": [line for i, one in enumerate(ON_RANDOM[:3]) if (line := _by_layer(result, one, i, max))],
        "by_weights": [
            line._replace(name=name)
            for i, (name, one, extreme) in enumerate(
                (("copying, most", BY_WEIGHTS[0], max), ("copying, least", BY_WEIGHTS[0], min), ("successor", BY_WEIGHTS[2], max))
            )
            if (line := _by_layer(result, one, (0, 3, 2)[i], extreme))
        ],
    }


def _by_layer(result: Mapping[str, Any], score: Score, mark: int, extreme: Callable[[list[float]], float]) -> Line | None:
    """The largest or smallest value of a score in each layer; None where nothing is known."""
    by: dict[int, list[float]] = {}
    for head in result["heads"]:
        if (value := score.read(head)) is not None:
            by.setdefault(head["layer"], []).append(value)
    return Line(score.title, mark, [Point(layer, extreme(values)) for layer, values in sorted(by.items())]) if by else None


# ---------------------------------------------------------------------------------------------------- indirect objects

TEMPLATES = ("ABBA", "BABA")
FEATURES_DRAWN = 16
"""Features in the plot of the indirect-object study."""


def _of_indirect_objects(record: StudyRecord, _: StudyQuery) -> dict[str, Any]:
    """What is left with z of each changed prompt, and the change by feature, by template."""
    found = record.result

    def left(template: str) -> list[Dot]:
        plain = found["difference"][template]["mean"]
        bounds = [(one, one["difference"][template]) for one in found["conditions"]]
        return [Dot(one["says"], one["left"][template], *_ordered(at, plain)) for one, at in bounds]

    def changes(template: str) -> list[Dot]:
        named = [("the SAE's error", found["error"]), ("all features", found["every"])]
        named += [(f"feature {one['index']}", one["change"]) for one in found["features"][:FEATURES_DRAWN]]
        return [Dot(name, *(change[template][key] for key in ("mean", "low", "high"))) for name, change in named]

    return {
        "left": [Dots(template, mark, left(template)) for template, mark in zip(TEMPLATES, (0, 3), strict=True)],
        "changes": [Dots(template, mark, changes(template)) for template, mark in zip(TEMPLATES, (0, 3), strict=True)],
        "templates": TEMPLATES,
    }


def _ordered(interval: Mapping[str, Any], plain: float) -> tuple[float | None, float | None]:
    """Bounds of a logit difference as shares of the plain one."""
    if interval["low"] is None or not plain:
        return None, None
    low, high = sorted((interval["low"] / plain, interval["high"] / plain))
    return low, high


# ------------------------------------------------------------------------------------------- induction features

DRAWN = 3
"""Features of each role whose activation is drawn."""


def _of_prefixes(record: StudyRecord, _: StudyQuery) -> dict[str, Any]:
    """Lines over the length of the prefix: activations of the strongest features, losses, and what ablations change."""
    found = record.result
    chosen = [
        one
        for role in ("short-prefix", "long-prefix")
        for one in [feature for feature in found["features"] if feature["role"] == role][:DRAWN]
    ]

    def rise(mark: int, one: Mapping[str, Any]) -> Line:
        values = zip(found["prefixes"], one["rise"], one["rise_error"], strict=True)
        return Line(f"{one['index']} {one['role']}", mark, [Point(p, y, y - Z95 * e, y + Z95 * e) for p, y, e in values])

    def loss(mark: int, one: Mapping[str, Any]) -> Line:
        values = zip(found["prefixes"], one["values"], strict=True)
        name = f"{one['name']} ({one['features']})" if one["features"] else one["name"]
        return Line(name, mark, [Point(p, at["mean"], at["low"], at["high"]) for p, at in values])

    return {
        "rises": [rise(mark, one) for mark, one in enumerate(chosen)],
        "losses": [loss(3 * mark, one) for mark, one in enumerate(found["losses"])],
        "changes": [loss(mark, one) for mark, one in enumerate(found["changes"])],
    }
