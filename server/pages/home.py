"""`/`: models as maps, SAEs as cards, jobs as they run."""

import hashlib

from fastapi import APIRouter, Request, Response

from server import panels
from server.charts import HeadCell
from server.pages.reply import Read, head_path, reply, wants_part
from server.rendering import count
from server.store.home import HeadCell as HomeCell
from server.store.home import HomePage, ModelMap, home_page
from server.store.saes import Count

router = APIRouter()

LEAST_OF_A_FAMILY = 3
"""Features of one family that a head must lead before its cell carries the family's mark ..."""
SHARE_OF_A_FAMILY = 0.1
"""... and the share of the features it leads that they must be: most features are of no family."""


@router.get("/", include_in_schema=False)
@router.get("/index.json", response_model=HomePage)
def home(request: Request, read: Read, seen: str = "") -> Response:
    """The first page. Its jobs ask for themselves again, with what was `seen`: when an SAE is new, the page is too."""
    page = home_page(read)
    headers = {"HX-Refresh": "true"} if wants_part(request) and seen != published(page) else None
    return reply(request, page, "home.html", block="_open_jobs.html", headers=headers, map_cells=map_cells, seen=published)


def published(page: HomePage) -> str:
    """Changes when an SAE or a harvest is published, and when a sweep begins or ends."""
    there = [(card.sae.name, card.sae.harvest and card.sae.harvest.id) for card in page.saes]
    known = [(sweep.id, sweep.status) for sweep in page.sweeps]
    return hashlib.sha256(repr((there, known)).encode()).hexdigest()[:12]


def map_cells(model: ModelMap) -> list[HeadCell]:
    """The model's heads, each with the way to its page."""
    return [
        HeadCell(
            cell.layer,
            cell.head,
            cell.features,
            (f"leads {count(cell.features)} features", family_said(cell.family)),
            head_path(cell.sae, cell.head),
            panels.family_mark(cell.family.key) if cell.family and plain(cell) else None,
        )
        for cell in model.cells
    ]


def plain(cell: HomeCell) -> bool:
    """Whether so many of a head's features are of one family that its mark says something of the head."""
    return cell.family is not None and cell.family.features >= max(LEAST_OF_A_FAMILY, cell.features * SHARE_OF_A_FAMILY)


def family_said(family: Count | None) -> str:
    """A main family in words."""
    return f"{count(family.features)} {family.key}" if family else "no family stands out"
