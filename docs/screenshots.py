"""Pictures of every page of a data folder, light and dark, wide and narrow: `make screenshots DATA=<folder>`.

All of them go to docs/screenshots/all, to be looked at; those that the tour shows are put beside it and are kept with the
code. The folder is only read: pages are taken as a visitor called Maren sees them, who writes nothing.
"""

import argparse
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import uvicorn
from fastapi import FastAPI
from PIL import Image
from playwright.sync_api import Browser, Page, TimeoutError, sync_playwright

from server.app import create_app
from server.db import Database
from server.engine import create_engine
from server.pages.writing import COOKIE
from server.settings import Settings

SIZES = {"wide": (1440, 900), "narrow": (390, 844)}
SCHEMES = ("light", "dark")
HERE = Path(__file__).parent / "screenshots"
TOUR = (
    "home-wide-light", "sae-wide-light", "table-wide-light", "feature-wide-light", "feature-wide-dark", "head-wide-light",
    "search-wide-light", "list-wide-light", "compare-wide-light", "sweep-wide-light", "new-train-wide-light",
    "feature-narrow-light", "home-wide-dark", "prompt-wide-light", "circuit-wide-light", "interventions-wide-light",
    "study-ioi-wide-light",
)  # fmt: skip
"""What docs/tour.md and README.md show."""


def addresses(client: httpx.Client, feature: int | None, query: str) -> Iterator[tuple[str, str]]:
    """A name and an address for a page of each kind, as far as there is something to show on it."""

    def known(address: str) -> Any:
        return client.get(address).raise_for_status().json()

    home = known("/index.json")
    yield from {
        "home": "/",
        "lists": "/lists",
        "labels": "/labels",
        "studies": "/studies",
        "jobs": "/jobs",
        "status": "/status",
        "api": "/api",
    }.items()
    yield from {"compare-nothing": "/compare", "archive": "/archive", "author": "/author", "unknown": "/nothing"}.items()
    for kind in ("train", "sweep", "harvest", "evaluate", "compare", "specificity", "induction", "heads", "ioi", "prefix"):
        yield f"new-{kind}", f"/jobs/new/{kind}"
    yield "search-everything", f"/search?q={quote(query)}"
    for card in [card for card in home["saes"] if card["sae"]["harvest"]][:1]:
        name = quote(card["sae"]["name"])
        sae = f"/saes/{name}"
        rows = known(f"{sae}.json?family=induction&limit=1")["table"]["rows"] or known(f"{sae}.json?limit=1")["table"]["rows"]
        index = feature if feature is not None else rows[0]["index"]
        page = known(f"{sae}/features/{index}.json")
        head = max(page["heads"], key=lambda one: one["norm_share"])["head"]
        yield from {"prompt": "/prompt", "interventions": f"/interventions?sae={name}&feature={index}&how=steer&value=8"}.items()
        yield from {
            "sae": sae, "table": f"{sae}?family=induction&sort=-head_share#features",
            "nothing-like-that": f"{sae}?min_density=1#features",
            "feature": f"{sae}/features/{index}", "by-head": f"{sae}/features/{index}?head={head}#examples",
            "example": f"{sae}/features/{index}/examples/0/0",
            "components": f"{sae}/features/{index}/components?band=0&rank=0", "circuit": f"{sae}/features/{index}/circuit",
            "feature-labels": f"{sae}/features/{index}/labels",
            "embed": f"/embed{sae}/features/{index}", "head": f"{sae}/heads/{head}",
            "search": f"{sae}/search?q={quote(query)}&kind=token",
            "search-text": f"{sae}/search?q={quote(query)}&kind=text",
            "heads-of-model": f"/models/{quote(card['sae']['model'])}/heads",
            "compare": f"/compare?a={name}:{index}&b={name}:{page['neighbours'][0]['index']}",
            "compare-harvests": f"/compare?sae={name}", "reviews": f"{sae}/reviews", "manage": f"{sae}/manage",
            "delete": f"{sae}/delete",
        }.items()  # fmt: skip
        yield from ((f"review-{one['id']}", f"/reviews/{one['id']}") for one in known(f"{sae}/reviews.json")["reviews"][:1])
    yield from ((f"list-{n}" if n else "list", f"/lists/{one['id']}") for n, one in enumerate(known("/lists.json")["lists"][:2]))
    yield from ((f"sweep-{n}" if n else "sweep", f"/sweeps/{one['id']}") for n, one in enumerate(home["sweeps"][:1]))
    first: dict[str, str] = {}
    for job in known("/jobs.json")["jobs"]:
        first.setdefault(f"job-{job['kind']}" if first else "job", f"/jobs/{job['id']}")
    for study in known("/studies.json")["studies"]:
        first.setdefault(f"study-{study['kind']}", f"/studies/{study['id']}")
    yield from first.items()


TEXT = "Then, when Mary and John went to the store, John gave a bottle of milk to Mary, and the sons of Gershon to the sons"


def ask_prompt(tab: Page) -> None:
    """The prompt page with a feature of the last token taken apart."""
    tab.get_by_label("Text", exact=True).fill(TEXT)
    tab.get_by_role("button", name="See what fires").click()
    tab.locator(".grid button.tok").last.click(timeout=PATIENCE)
    tab.locator(".fires button").first.click(timeout=PATIENCE)
    tab.locator(".dfa tfoot").wait_for(timeout=PATIENCE)
    tab.evaluate("scrollTo(0, 0)")


def ask_interventions(tab: Page) -> None:
    """The interventions page with its answer."""
    tab.get_by_label("Text", exact=True).fill(TEXT)
    tab.locator("[name=new]").fill("16")
    tab.locator("button.main").click()
    tab.locator("#outcome").wait_for(timeout=PATIENCE)


def wait_for_circuit(tab: Page) -> None:
    """The graph of a circuit, with what the root was given."""
    tab.locator("figure.circuit svg").wait_for(timeout=PATIENCE)
    tab.evaluate("scrollTo(0, 0)")


PATIENCE = 180_000
"""Milliseconds: the first question loads the model."""
ASKED: Mapping[str, Callable[[Page], None]] = {
    "prompt": ask_prompt, "interventions": ask_interventions, "circuit": wait_for_circuit,
}  # fmt: skip
"""Pages that show something once the engine has answered."""


def take(browser: Browser, site: str, pages: Mapping[str, str], into: Path, only: str, *, whole: bool) -> None:
    """A picture of every page in each scheme and size; what the browser complains of, and what does not fit, is said."""
    for scheme in SCHEMES:
        for size, (width, height) in SIZES.items():
            context = browser.new_context(
                color_scheme=scheme, viewport={"width": width, "height": height}, reduced_motion="reduce"
            )
            context.add_cookies([{"name": COOKIE, "value": "Maren", "url": site}])
            tab = context.new_page()
            complaints: list[str] = []
            tab.on("console", lambda said, complaints=complaints: complaints.append(said.text))
            tab.on("pageerror", lambda error, complaints=complaints: complaints.append(str(error)))
            for name, address in pages.items():
                if only and only not in f"{name}-{size}-{scheme}":
                    continue
                tab.goto(site + address)
                with suppress(TimeoutError):  # blocks that the page asks for when it is there; a page with events is never idle
                    tab.wait_for_load_state("networkidle", timeout=5000)
                if name in ASKED:
                    ASKED[name](tab)
                tab.screenshot(path=into / f"{name}-{size}-{scheme}.png", full_page=whole)
                if tab.evaluate("document.documentElement.scrollWidth") > width:
                    complaints.append("is wider than the window")
                said = "".join(
                    f"; {one}" for one in complaints if "404" not in one or name not in ("unknown", "compare-harvests")
                )
                print(f"{name}-{size}-{scheme}{said}", flush=True)
                complaints.clear()
            context.close()


@contextmanager
def listening(settings: Settings) -> Iterator[str]:
    """The web process in a thread, with an engine in another one; gives its address."""
    database = Database(settings.url)
    with ExitStack() as stack:
        engine = stack.enter_context(serving(create_engine(settings, database)))
        settings = settings.model_copy(update={"engine_port": int(engine.rpartition(":")[2])})
        yield stack.enter_context(serving(create_app(settings)))
    database.close()


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """An app in a thread; gives its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(5)


def main() -> None:
    """Take them all; put those of the tour where it shows them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Settings().data, help="the data folder (HEADSCOPE_DATA)")
    parser.add_argument("--feature", type=int, help="the feature to show; else the induction feature that fires most strongly")
    parser.add_argument("--query", default="the", help="what is searched")
    parser.add_argument("--only", default="", help="pictures with this in their names")
    parser.add_argument("--whole", action="store_true", help="pages down to their ends, to look at; not for the tour")
    given = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("Chromium is missing: `apt-get install chromium`.")
    into = HERE / "all"
    into.mkdir(parents=True, exist_ok=True)
    with listening(Settings(data=given.data).prepare()) as site, sync_playwright() as playwright:
        with httpx.Client(base_url=site, timeout=60) as client:
            pages = dict(addresses(client, given.feature, given.query))
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        take(browser, site, pages, into, given.only, whole=given.whole)
        browser.close()
    for name in TOUR if not given.whole else ():
        if (into / f"{name}.png").exists():
            # Flat colours in all but a few pixels of letters' edges: a palette of them is a third of the size and looks the same.
            Image.open(into / f"{name}.png").convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
                HERE / f"{name}.png", optimize=True
            )


if __name__ == "__main__":
    main()
