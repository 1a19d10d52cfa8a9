"""`/compare`: two SAEs of a site, two features, or two harvests of an SAE, side by side. Which, the address says."""

from contextlib import closing
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse

from sae_core.config import CompareJob
from sae_core.errors import UsageError
from server.jobs import Jobs
from server.pages.feature import View
from server.pages.reply import Read, known_schema, link, reply
from server.pages.writing import Form
from server.store.compare import (
    Chosen,
    FeatureComparison,
    HarvestComparison,
    SaeComparison,
    TooFew,
    choices,
    compare_features,
    compare_harvests,
    compare_saes,
)

router = APIRouter()


class CompareQuery(BaseModel):
    """What is compared; the address is exactly this."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    a: str = ""
    """An SAE's name, or `name:index` for a feature of it."""
    b: str = ""
    """The other."""
    sae: str = ""
    """An SAE whose harvests are compared, instead of `a` and `b`."""
    harvest: int | None = Field(None, ge=1)
    """One of its harvests; left out, the one before the newest."""
    other: int | None = Field(None, ge=1)
    """Another; left out, the newest."""
    n: int = Field(4, ge=1, le=20)
    """Examples of each feature."""

    @property
    def view(self) -> View:
        """How examples are painted."""
        return View()


@dataclass(frozen=True)
class ComparePage:
    """A comparison: one of the three, or none while nothing is chosen yet."""

    query: CompareQuery
    choices: tuple[Chosen, ...]
    saes: SaeComparison | None = None
    features: FeatureComparison | None = None
    harvests: HarvestComparison | None = None
    trouble: str | None = None
    """Why the harvests of the SAE that was chosen cannot be compared."""


@router.get("/compare", include_in_schema=False)
@router.get("/compare.json", response_model=ComparePage)
def compare_page(request: Request, query: Annotated[CompareQuery, Query()], read: Read) -> Response:
    """What the address asks for, or the form to choose it."""
    there = choices(read)
    if query.sae:
        page = _harvests(read, query, there)
    elif not (query.a and query.b):
        page = ComparePage(query, there)
    else:
        a, b = _side(query.a, "a"), _side(query.b, "b")
        if (a[1] is None) != (b[1] is None):
            raise UsageError("One side names a feature and the other an SAE; name two of a kind.", field="b")
        if a[1] is not None and b[1] is not None:
            page = ComparePage(query, there, features=compare_features(read, (a[0], a[1]), (b[0], b[1])))
        else:
            page = ComparePage(query, there, saes=compare_saes(read, a[0], b[0]))
    return reply(request, page, "compare.html", status=TooFew.status if page.trouble else 200)


def _harvests(read: Session, query: CompareQuery, there: tuple[Chosen, ...]) -> ComparePage:
    try:
        return ComparePage(query, there, harvests=compare_harvests(read, query.sae, query.harvest, query.other))
    except TooFew as error:
        return ComparePage(query, there, trouble=str(error))


@router.post("/compare", include_in_schema=False)
def match(request: Request, sent: Form) -> Response:
    """Queue the matching of two SAEs' features; then its job, or, where it was made already, the comparison."""
    try:
        cfg = CompareJob(sae=sent.get("a", ""), against=sent.get("b", ""))
    except ValidationError as error:
        raise UsageError(error.errors()[0]["msg"].removeprefix("Value error, ") + ".", field="b") from error
    with closing(Jobs(request.app.state.settings, known_schema(request))) as jobs:
        job = jobs.get(jobs.enqueue_compare(cfg))
    done = link("/compare", a=cfg.sae, b=cfg.against)
    return RedirectResponse(done if job.status == "done" else f"/jobs/{job.id}", 303)


def _side(text: str, field: str) -> tuple[str, int | None]:
    """`name` or `name:index`."""
    name, colon, index = text.rpartition(":")
    if not colon:
        return text, None
    if not (index.isascii() and index.isdigit()):
        raise UsageError(f"'{text}' names neither an SAE nor a feature; write an SAE's name, or name:index.", field=field)
    return name, int(index)
