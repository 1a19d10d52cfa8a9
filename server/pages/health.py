"""`/healthz`: does this server answer, and does its database?"""

from dataclasses import dataclass

import sqlalchemy as sa
from fastapi import APIRouter

from server.access import needs
from server.pages.reply import VERSION, Read

router = APIRouter()


@dataclass(frozen=True)
class Health:
    """What a monitor wants to know."""

    status: str
    version: str
    database: str


@router.get("/healthz")
@needs("nobody")
def healthz(read: Read) -> Health:
    """200 when pages can be served; otherwise the error says why not."""
    read.execute(sa.text("select 1"))
    return Health("ok", VERSION, read.get_bind().dialect.name)
