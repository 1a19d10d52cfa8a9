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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import uvicorn
from playwright.sync_api import Browser, sync_playwright

from server.app import create_app
from server.pages.writing import COOKIE
from server.settings import Settings

SIZES = {"wide": (1440, 900), "narrow": (390, 844)}
SCHEMES = ("light", "dark")
HERE = Path(__file__).parent / "screenshots"
TOUR = (
    "home-wide-light", "sae-wide-light", "feature-wide-light", "feature-wide-dark", "head-wide-light", "search-wide-light",
    "list-wide-light", "compare-wide-light", "sweep-wide-light", "new-train-wide-light", "feature-narrow-light", "home-wide-dark",
)  # fmt: skip
"""What docs/tour.md shows."""


def addresses(client: httpx.Client, feature: int | None, query: str) -> Iterator[tuple[str, str]]:
    """A name and an address for a page of each kind, as far as there is something to show on it."""

    def known(address: str) -> Any:
        return client.get(address).raise_for_status().json()

    home = known("/index.json")
    first = {"home": "/", "lists": "/lists", "labels": "/labels", "studies": "/studies", "jobs": "/jobs", "status": "/status"}
    yield from first.items()
    yield from {"compare-nothing": "/compare", "archive": "/archive", "author": "/author", "unknown": "/nothing"}.items()
    for kind in ("train", "sweep", "harvest", "evaluate", "compare", "specificity", "induction", "heads"):
        yield f"new-{kind}", f"/jobs/new/{kind}"
    yield "search-everything", f"/search?q={quote(query)}"
    for card in [card for card in home["saes"] if card["sae"]["harvest"]][:1]:
        sae = f"/saes/{quote(card['sae']['name'])}"
        rows = known(f"{sae}.json?family=induction&limit=1")["table"]["rows"] or known(f"{sae}.json?limit=1")["table"]["rows"]
        index = feature if feature is not None else rows[0]["index"]
        page = known(f"{sae}/features/{index}.json")
        head = max(page["heads"], key=lambda one: one["norm_share"])["head"]
        near = page["neighbours"][0]["index"]
        yield "sae", sae
        yield "table", f"{sae}?head={head}&leads=true#features"
        yield "feature", f"{sae}/features/{index}"
        yield "components", f"{sae}/features/{index}/components?band=0&rank=0"
        yield "feature-labels", f"{sae}/features/{index}/labels"
        yield "embed", f"/embed{sae}/features/{index}"
        yield "head", f"{sae}/heads/{head}"
        yield "heads-of-model", f"/models/{quote(card['sae']['model'])}/heads"
        yield "search", f"{sae}/search?q={quote(query)}&kind=token"
        yield "compare", f"/compare?a={quote(card['sae']['name'])}:{index}&b={quote(card['sae']['name'])}:{near}"
        yield "compare-harvests", f"/compare?sae={quote(card['sae']['name'])}"
        yield "reviews", f"{sae}/reviews"
        yield "manage", f"{sae}/manage"
        yield "delete", f"{sae}/delete"
    yield from ((f"list-{n}" if n else "list", f"/lists/{one['id']}") for n, one in enumerate(known("/lists.json")["lists"][:2]))
    yield from ((f"sweep-{n}" if n else "sweep", f"/sweeps/{one['id']}") for n, one in enumerate(home["sweeps"][:1]))
    kinds: set[str] = set()
    for job in known("/jobs.json")["jobs"]:
        if job["kind"] not in kinds:
            yield f"job-{job['kind']}" if kinds else "job", f"/jobs/{job['id']}"
        kinds.add(job["kind"])
    seen: set[str] = set()
    for study in known("/studies.json")["studies"]:
        if study["kind"] not in seen:
            yield f"study-{study['kind']}", f"/studies/{study['id']}"
        seen.add(study["kind"])


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
                tab.wait_for_timeout(250)  # blocks that the page asks for when it is there
                tab.screenshot(path=into / f"{name}-{size}-{scheme}.png", full_page=whole)
                if tab.evaluate("document.documentElement.scrollWidth") > width:
                    complaints.append("is wider than the window")
                said = "".join(f"; {one}" for one in complaints if "404" not in one or name != "unknown")
                print(f"{name}-{size}-{scheme}{said}", flush=True)
                complaints.clear()
            context.close()


@contextmanager
def listening(settings: Settings) -> Iterator[str]:
    """The web process in a thread; gives its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning", timeout_graceful_shutdown=1))
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
            shutil.copyfile(into / f"{name}.png", HERE / f"{name}.png")


if __name__ == "__main__":
    main()
