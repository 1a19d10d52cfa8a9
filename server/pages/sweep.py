"""`/sweeps/{job_id}`: the runs of a sweep side by side, and what more active features buy, by architecture."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, get_args

from fastapi import APIRouter, Query, Request, Response

from sae_core.config import Arch
from server.charts import Series, Spot
from server.pages.reply import Read, reply, sae_path
from server.store.sweeps import SweepQuery, SweepRecord, SweepRun, chosen, sweep

router = APIRouter()

WORDS = {
    "prose": "held-out text",
    "repeated": "random tokens said twice",
    "ce": "cross-entropy",
    "kl": "KL divergence",
    "zero": "z = 0",
    "mean": "z = its mean",
}


@dataclass(frozen=True)
class SweepPage:
    """A sweep, and its runs as the address wants them."""

    sweep: SweepRecord
    query: SweepQuery
    rows: tuple[SweepRun, ...]


@router.get("/sweeps/{job_id}", include_in_schema=False)
@router.get("/sweeps/{job_id}.json", response_model=SweepPage)
def sweep_page(request: Request, job_id: str, query: Annotated[SweepQuery, Query()], read: Read) -> Response:
    """The sweep as it stands; while it runs the page asks for itself again."""
    record = sweep(read, job_id)
    page = SweepPage(record, query, chosen(record, query))
    return reply(request, page, "sweep.html", block="_sweep.html", words=WORDS, fits=fits(page), shares=shares(page))


def fits(page: SweepPage) -> list[Series]:
    """Unexplained variance over L0."""
    return _series(page, lambda run: (run.fvu, None, None))


def shares(page: SweepPage) -> list[Series]:
    """What is kept of what an ablation costs, over L0."""
    query = page.query

    def kept(run: SweepRun) -> tuple[float | None, float | None, float | None]:
        found = run.kept.get(f"{query.text} {query.measure} {query.against}")
        return (found.value, found.low, found.high) if found else (None, None, None)

    return _series(page, kept)


def _series(page: SweepPage, value: Callable[[SweepRun], tuple[float | None, float | None, float | None]]) -> list[Series]:
    """One series per architecture, always with the same mark; only runs that are evaluated, since batches are no measure."""
    made: list[Series] = []
    for mark, arch in enumerate(get_args(Arch)):
        runs = [run for run in page.rows if run.arch == arch and run.state == "evaluated"]
        spots = [_spot(run, *value(run)) for run in runs]
        if found := [spot for spot in spots if spot]:
            made.append(Series(arch, mark, sorted(found)))
    return made


def _spot(run: SweepRun, y: float | None, low: float | None, high: float | None) -> Spot | None:
    if y is None or run.l0 is None:
        return None
    return Spot(run.l0, y, run.label or run.sae, sae_path(run.sae), low, high, run.layer)
