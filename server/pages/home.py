"""`/`: models as maps, SAEs as cards, jobs as they run."""

from fastapi import APIRouter, Request, Response

from server.pages.reply import Read, link, reply, sae_path
from server.rendering import Cell
from server.store.home import HomePage, ModelMap, home_page

router = APIRouter()


@router.get("/", include_in_schema=False)
@router.get("/index.json", response_model=HomePage)
def home(request: Request, read: Read) -> Response:
    """The first page."""
    return reply(request, home_page(read), "home.html", block="_open_jobs.html", map_cells=map_cells)


def map_cells(model: ModelMap) -> list[Cell]:
    """The model's heads, each with the way to the features that it leads."""
    return [
        Cell(cell.layer, cell.head, cell.features, link(f"{sae_path(cell.sae)}", head=cell.head, leads="true"))
        for cell in model.cells
    ]
