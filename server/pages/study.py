"""`/studies` and `/studies/{id}`: questions put to features and heads, with plots of what was found."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import RedirectResponse

from server.charts import Bar, HeadCell, Line, Point
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
    """Which heads a study of heads draws. Its address is exactly this."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    heads: str = ""
    """Heads as `layer.head`, with commas between; none: the strongest of each role."""

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
    tag = etag(request, record.id, record.created_at, query.heads)
    if found := unchanged(request, tag):
        return found
    view = _of_heads(record, query) if record.kind == "induction" else _of_feature(record)
    return reply(request, StudyPage(record), "study.html", tag=tag, **view)


# ------------------------------------------------------------------------------------------------------------ a feature


def _of_feature(record: StudyRecord) -> dict[str, Any]:
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
        others = [other for other in chosen if other != name]
        return link(here, heads=",".join(others if len(others) < len(chosen) else [*others, name][-SHOWN:]) or None)

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
