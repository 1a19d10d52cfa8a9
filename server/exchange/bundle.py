"""A list of features as a folder of pages that open from disk: no server, no script, every address relative."""

import re
import shutil
from pathlib import Path

from sqlalchemy.orm import Session

from sae_core.errors import HeadscopeError
from server.pages.reply import render
from server.rendering import Paint
from server.resources import resource_path
from server.store.features import FeaturePage, feature_page
from server.store.lists import ListPage
from server.store.saes import find_sae

ASSETS = ("app.css", "icon.svg")


def write(session: Session, listed: ListPage, folder: Path) -> int:
    """Write `index.html`, a page for each feature of the list and what they look like; how many features.

    A feature whose SAE has no published harvest stands in the index alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ASSETS:
        shutil.copyfile(resource_path("static") / name, folder / name)
    made: dict[int, str] = {}
    pages: dict[int, FeaturePage] = {}
    for entry in listed.entries:
        try:
            pages[entry.id] = feature_page(session, find_sae(session, entry.sae), entry.index, every=True)
        except HeadscopeError:  # its harvest was deleted, or is of other features
            continue
        made[entry.id] = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', entry.sae)}-{entry.index}.html"
    written = [entry for entry in listed.entries if entry.id in made]
    for at, entry in enumerate(written):
        page = pages.pop(entry.id)
        beside = {"before": written[at - 1] if at else None, "after": written[at + 1] if at + 1 < len(written) else None}
        paint = Paint(page.max_act, None, None)
        text = render("bundle_feature.html", page=page, entry=entry, list=listed.list, paint=paint, made=made, **beside)
        (folder / made[entry.id]).write_text(text)
    (folder / "index.html").write_text(render("bundle.html", page=listed, made=made))
    return len(made)
