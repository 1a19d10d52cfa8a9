"""The walk of a visitor in a real browser, where the CSP is enforced and the scripts run."""

import re
import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, Route, expect

from server.db import Database
from server.settings import Settings
from server.store import jobs as store
from tests.web.conftest import at, listened, put
from tests.web.walk import walk

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a filled database that the walk may change; where its engine would be, nothing listens."""
    settings = at(tmp_path_factory.mktemp("served"))
    return put(settings)


@pytest.fixture(scope="module")
def site(served: Settings) -> Iterator[str]:
    """The web process, really listening; gives its address."""
    yield from listened(served)


def test_the_walk_from_home_to_a_tokens_numbers(quiet_page: Page, site: str) -> None:
    walk(quiet_page, site)


def test_going_back_brings_the_whole_page(quiet_page: Page, site: str) -> None:
    page = quiet_page
    page.goto(f"{site}/saes/smollm2-l17")
    page.get_by_role("link", name="mean", exact=True).click()
    expect(page).to_have_url(re.compile("sort=-mean"))
    page.go_back()
    expect(page).to_have_url(re.compile("smollm2-l17$"))
    expect(page.get_by_role("columnheader", name="strongest ↓")).to_be_visible()
    expect(page.get_by_role("heading", name="How good it is")).to_be_visible()


def test_a_filter_narrows_the_table_and_a_bad_one_keeps_what_was_typed(page: Page, site: str) -> None:
    page.goto(f"{site}/saes/smollm2-l17")
    page.get_by_label("family").select_option("induction")
    expect(page.locator(".features tbody tr")).to_have_count(11)
    expect(page).to_have_url(re.compile("family=induction"))
    page.get_by_label("Lowest density, as a share").fill("often")
    page.get_by_label("Lowest density, as a share").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("min_density")
    expect(page.get_by_label("Lowest density, as a share")).to_have_value("often")
    expect(page.get_by_label("family")).to_have_value("induction")


def test_the_keyboard_reaches_everything(quiet_page: Page, site: str) -> None:
    page = quiet_page
    page.goto(f"{site}/saes/smollm2-l17/features/3")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_hidden()
    page.keyboard.press("5")
    expect(page).to_have_url(re.compile("head=5"))
    expect(page.locator(".heads .chosen")).to_have_text(re.compile(r"^\s*5"))
    page.keyboard.press("a")
    expect(page).to_have_url(re.compile("features/3$"))
    page.locator(".text").first.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".text > b.held")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#inspector [data-part=offset]")).to_contain_text("back")
    page.keyboard.press("Escape")
    expect(page.locator(".held")).to_have_count(0)
    page.keyboard.press("/")
    page.keyboard.type("12")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("features/12$"))


def test_a_key_pressed_as_the_dialog_closes_is_for_the_page(quiet_page: Page, site: str) -> None:
    page = quiet_page
    page.goto(f"{site}/saes/smollm2-l17/features/3")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    page.evaluate("""() => {
      const inside = document.activeElement;
      document.getElementById("help").close();
      if (inside !== document.activeElement) throw new Error("the focus had left the dialog at once: nothing is tested");
      inside.dispatchEvent(new KeyboardEvent("keydown", { key: "5", bubbles: true }));
    }""")
    expect(page).to_have_url(re.compile("head=5"))


def test_typed_text_without_an_engine_gets_a_sentence_beside_the_box(quiet_page: Page, site: str) -> None:
    page = quiet_page
    page.goto(f"{site}/saes/smollm2-l17/features/3")
    page.get_by_role("textbox", name="Text").fill("the cat sat")
    page.get_by_role("button", name="Take it apart").click()
    expect(page.get_by_role("alert")).to_contain_text("The engine does not answer")
    expect(page.get_by_role("textbox", name="Text")).to_have_value("the cat sat")


PAGES = (
    "/", "/saes/smollm2-l17", "/saes/smollm2-l17/features/3", "/saes/smollm2-l17/heads/3", "/saes/smollm2-l17/manage",
    "/saes/smollm2-l17/reviews", "/models/smollm2-135m/heads", "/search?q=the", "/compare", "/lists", "/labels", "/archive",
    "/jobs", "/jobs/train-running-1", "/jobs/new/train",
)  # fmt: skip


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("path", PAGES)
def test_no_page_scrolls_sideways(page: Page, site: str, path: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    page.goto(site + path)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_pages_read_without_javascript(browser: object, site: str) -> None:
    context = browser.new_context(java_script_enabled=False)  # type: ignore[attr-defined]
    page = context.new_page()
    page.goto(f"{site}/saes/smollm2-l17")
    page.get_by_role("toolbar", name="Head").get_by_role("link", name="4", exact=True).click()
    expect(page.get_by_role("columnheader", name="head 4 weights")).to_be_visible()
    page.locator(".features tbody tr").first.get_by_role("link").first.click()
    expect(page.get_by_role("heading", name="Strongest 6 examples")).to_be_visible()
    page.get_by_role("link", name="full", exact=True).click()
    expect(page).to_have_url(re.compile("context=full"))
    context.close()


def test_a_page_follows_its_events_however_late_the_extension_comes(quiet_page: Page, site: str) -> None:
    def late(route: Route) -> None:
        time.sleep(0.5)
        route.continue_()

    page = quiet_page
    page.route("**/hx-sse-*", late)
    with page.expect_request("**/jobs/train-running-1/events"):
        page.goto(f"{site}/jobs/train-running-1")


def test_a_job_is_followed_live_until_it_ends(quiet_page: Page, site: str, served: Settings) -> None:
    page = quiet_page
    page.goto(f"{site}/jobs/train-running-1")
    expect(page.get_by_text("running", exact=True)).to_be_visible()
    database = Database(served.url)
    with database.write() as session:
        store.add_points(session, "train-running-1", 1, [(500, {"loss": 0.123, "l0": 40.0})])
    expect(page.get_by_text("now 0.123")).to_be_visible()
    with database.write() as session:
        store.finish(session, "train-running-1", 1)
    database.close()
    expect(page.get_by_text("done", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
