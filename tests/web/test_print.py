"""Pages on paper: what is read is there, what is pressed is not, and nothing is cut off."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from server.db import Database
from server.store import labels, lists
from server.store.saes import find_sae
from tests.web.conftest import SAE, at, listened, put
from tests.web.factory import Shape

pytestmark = pytest.mark.browser

A4 = 718
"""Pixels between the margins of a sheet of A4."""
PAGES = (
    "/",
    SAE,
    f"{SAE}/features/3",
    f"{SAE}/heads/4",
    "/models/smollm2-135m/heads",
    "/lists/1",
    "/labels",
    "/jobs",
    "/compare?a=smollm2-l17:3&b=smollm2-l17:5",
)
PRESSED = "nav, form, button, input, select, textarea, .button, header.bar, footer"
CUT = """() => [...document.querySelectorAll("main *")].filter(one =>
  one.checkVisibility() && !one.matches(".sr, .sr *, svg, svg *") && getComputedStyle(one).overflowX !== "visible"
  && one.scrollWidth > one.clientWidth + 1).map(one => one.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = put(at(tmp_path_factory.mktemp("print")), Shape(n_features=24, n_dead=3))
    database = Database(settings.url)
    with database.write() as session:
        door = find_sae(session, SAE.rpartition("/")[2])
        labels.add_label(session, door.id, 3, "dates " * 20, "Maren")
        mine = lists.create(session, "Induction, clean cases", "For the talk.", "Maren")
        for index in (3, 4, 5):
            lists.add(session, mine, door.id, index, "a note " * 30, "Maren")
    database.close()
    yield from listened(settings)


@pytest.fixture(scope="module")
def sheet(browser: Browser) -> Iterator[Page]:
    """A page of somebody who reads in the dark and may change what is there."""
    context = browser.new_context(viewport={"width": A4, "height": 1000}, color_scheme="dark")
    page = context.new_page()
    yield page
    context.close()


@pytest.mark.parametrize("path", PAGES)
def test_nothing_to_press_is_printed_and_nothing_is_cut_off(sheet: Page, site: str, path: str) -> None:
    sheet.context.add_cookies([{"name": "headscope_author", "value": "Maren", "url": site}])
    sheet.emulate_media(media="screen")
    sheet.goto(site + path)
    assert sheet.locator(PRESSED).locator("visible=true").count() > 0
    sheet.emulate_media(media="print", color_scheme="dark")
    assert sheet.locator(PRESSED).locator("visible=true").all_inner_texts() == []
    assert sheet.evaluate("document.documentElement.scrollWidth") <= A4
    assert sheet.evaluate(CUT) == []
    assert sheet.locator("h1").first.is_visible()
    assert sheet.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(251, 250, 248)"
