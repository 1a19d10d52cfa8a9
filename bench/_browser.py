"""How quickly a browser shows the pages: Chromium without a window, asked what it measured itself."""

import shutil
import statistics
import sys
from collections.abc import Sequence

from playwright.sync_api import Page, sync_playwright

PAINTED = """() => new Promise((done) => new PerformanceObserver((found) => {
  for (const one of found.getEntriesByName("first-contentful-paint")) done(one.startTime);
}).observe({ type: "paint", buffered: true }))"""
"""Milliseconds from the navigation's start to the first paint of what the page holds."""
NEXT = """async () => {
  const began = performance.now();
  const heading = document.querySelector("main h1");
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "j", bubbles: true }));
  await new Promise((done) => new MutationObserver((_, seen) => {
    if (!heading.isConnected) { seen.disconnect(); done(); }
  }).observe(document.body, { childList: true, subtree: true }));
  await new Promise((done) => requestAnimationFrame(() => {
    const after = new MessageChannel();
    after.port1.onmessage = done;
    after.port2.postMessage(null);
  }));
  return performance.now() - began;
}"""
"""Milliseconds from the press of the key until the frame with the next feature is painted: the first task after it."""


def shown(address: str, paths: Sequence[str]) -> tuple[list[float], list[float]]:
    """Milliseconds from asking for each page to its first paint, and from the key for the next feature to the paint of that."""
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
    return float(page.evaluate(PAINTED))


def _after_key(page: Page) -> float:
    page.wait_for_load_state("networkidle")  # a reader looks at a feature before going on
    return float(page.evaluate(NEXT))


def median(times: Sequence[float], target: str) -> dict[str, object]:
    """A figure of them."""
    return {"value": round(statistics.median(times), 1), "unit": "ms", "target": target}
