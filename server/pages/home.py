"""`/`: models as maps, SAEs as cards, jobs as they run."""

from fastapi import APIRouter, Request, Response

from server.pages.reply import Read, reply
from server.store.home import HomePage, home_page

router = APIRouter()


@router.get("/", include_in_schema=False)
@router.get("/index.json", response_model=HomePage)
def home(request: Request, read: Read) -> Response:
    """The first page."""
    return reply(request, home_page(read), "home.html", block="_open_jobs.html")
