"""`/`: models as maps, SAEs as cards, jobs as they run."""

import hashlib

from fastapi import APIRouter, Request, Response

from server.charts import HeadCell
from server.pages.reply import Read, link, reply, sae_path, wants_part
from server.rendering import count
from server.store.home import HomePage, ModelMap, home_page

router = APIRouter()


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
    """The model's heads, each with the way to the features that it leads."""
    return [
        HeadCell(
            cell.layer,
            cell.head,
            cell.features,
            (f"leads {count(cell.features)} features",),
            link(sae_path(cell.sae), head=cell.head, leads="true"),
        )
        for cell in model.cells
    ]
