"""How quickly a browser shows the pages: Chromium without a window, asked what it measured itself."""

import shutil
import statistics
import sys
from collections.abc import Sequence

from playwright.sync_api import Page, sync_playwright

PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
NEXT = """() => new Promise((done) => {
  const began = performance.timeOrigin + performance.now();
  sessionStorage.setItem("began", String(began));
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "j", bubbles: true }));
  done(began);
})"""


def shown(address: str, paths: Sequence[str]) -> tuple[list[float], list[float]]:
    """Milliseconds from asking for each page to its first paint, and from the key for the next feature to that one's."""
    chromium = shutil.which("chromium") or sys.exit("There is no chromium on this machine; install it, or leave the browser out.")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(address + paths[0])  # style sheet and scripts are kept from here on, as they are for a visitor
        first = [_painted(page, address + path) for path in paths]
        following = [_after_key(page) for _ in paths]
        browser.close()
    return first, following


def _painted(page: Page, address: str) -> float:
    page.goto(address)
    return float(page.wait_for_function(PAINTED).json_value())


def _after_key(page: Page) -> float:
    began = page.url
    page.evaluate(NEXT)
    page.wait_for_url(lambda url: url != began)
    page.wait_for_function(PAINTED)
    return float(page.evaluate(f"performance.timeOrigin + {PAINTED} - Number(sessionStorage.getItem('began'))"))


def median(times: Sequence[float], target: str) -> dict[str, object]:
    """A figure of them."""
    return {"value": round(statistics.median(times), 1), "unit": "ms", "target": target}
