"""`/healthz`, `/readyz` and `/metrics`: what a monitor asks."""

from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response

from server.access import needs
from server.pages.reply import VERSION
from server.watch import FORMAT

router = APIRouter()


@dataclass(frozen=True)
class Health:
    """This process lives."""

    status: Literal["ok"]
    version: str


@dataclass(frozen=True)
class Readiness:
    """Pages can be served."""

    status: Literal["ready"]
    version: str
    database: str
    """Which one it is: `sqlite` or `postgresql`."""


@router.get("/healthz")
@needs("nobody")
def healthz() -> Health:
    """200 as long as this process answers, whatever its database does: restarting it would not bring that back."""
    return Health("ok", VERSION)


@router.get("/readyz")
@needs("nobody")
def readyz(request: Request) -> Readiness:
    """200 when the database answers and its schema is ours; else 503, which says what is wrong and when to ask again."""
    db = request.app.state.db
    db.check_version()
    with db.read() as session:
        session.execute(sa.text("select 1"))
    return Readiness("ready", VERSION, db.url.get_backend_name())


@router.get("/metrics", include_in_schema=False)
@needs("reader", metrics=True)
def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(request.app.state.watch.page(), headers={"Cache-Control": "no-store"}, media_type=FORMAT)
