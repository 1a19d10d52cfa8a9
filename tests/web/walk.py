"""The walk of a visitor: home, an SAE, sorted by a head's share, a feature, a token's numbers, the next feature."""

import re
from collections.abc import Iterator
from itertools import accumulate
from urllib.parse import urljoin

from playwright.sync_api import ConsoleMessage, Page, Request, expect

SAE = "smollm2-l17"
expect.set_options(timeout=20_000)  # of what must come in the end; nothing here is about speed


def listening(page: Page) -> Iterator[Page]:
    """The page; at the end, any complaint of the browser, of the CSP too, fails the test."""
    complaints: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    def failed(request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # which only says that the page was left
            complaints.append(f"{request.url}: {request.failure}")

    page.on("console", note)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", failed)
    page.set_default_timeout(10_000)
    yield page
    assert complaints == []


def walk(page: Page, site: str) -> None:
    """Go there as a visitor would, and check at every step that the page says what it should."""
    page.goto(site)
    page.get_by_role("heading", name=SAE).get_by_role("link").click()
    expect(page.get_by_role("heading", name=SAE, exact=True)).to_be_visible()

    # sort by a head's share: the table alone is swapped, and the address says so
    page.get_by_role("toolbar", name="Head").get_by_role("link", name="4", exact=True).click()
    expect(page.get_by_role("columnheader", name="head 4 weights")).to_have_attribute("aria-sort", "descending")
    expect(page).to_have_url(re.compile(rf"/saes/{SAE}\?head=4$"))
    rows = page.locator(".features tbody tr")
    index, follower = (rows.nth(place).get_by_role("link").first.inner_text() for place in (0, 1))
    rows.first.get_by_role("link").first.click()

    # the feature, painted by that head; the address keeps what the table selected
    expect(page).to_have_url(re.compile(rf"/features/{index}\?head=4&from=head%3D4$"))
    text = page.locator(".examples .text").first
    address = text.locator("xpath=..").get_by_role("link", name="sources").get_attribute("href")
    numbers = page.request.get(urljoin(page.url, f"{address}.json")).json()["example"]
    positions = list(accumulate(map(int, (text.get_attribute("data-at") or "").split())))
    given = {at: [entry["value"] for entry in numbers["dfa"] if entry["src"] == at] for at in positions}
    shown = next(at for at in positions if any(entry["src"] == at and entry["head"] == 4 for entry in numbers["dfa"]))
    token = text.locator("> u, > b").nth(positions.index(shown))
    token.hover()
    panel = page.locator("#inspector")
    expect(panel.get_by_text("head 4", exact=True)).to_be_visible()
    expect(panel.locator("[data-part=dfa]")).to_have_text(f"{sum(given[shown]):+.3g}".replace("-", "−"))
    token.click()
    expect(token).to_have_class(re.compile("held"))
    # below its example it is split by head; a head there would paint every example
    expect(text.locator("xpath=..").get_by_role("link", name="4", exact=True)).to_have_attribute("href", re.compile(r"\?head=4#"))

    # all heads again, without a new page
    page.get_by_role("toolbar", name="How the examples are painted").get_by_role("link", name="all heads").click()
    expect(page).to_have_url(re.compile(rf"/features/{index}\?from=head%3D4$"))
    expect(page.locator(".heads .chosen")).to_have_count(0)
    expect(token).not_to_have_class(re.compile("held"))

    # the next feature of the table, by the keyboard, and back
    page.keyboard.press("j")
    expect(page).to_have_url(re.compile(rf"/features/{follower}\?from=head%3D4$"))
    page.keyboard.press("k")
    expect(page).to_have_url(re.compile(rf"/features/{index}\?from=head%3D4$"))
