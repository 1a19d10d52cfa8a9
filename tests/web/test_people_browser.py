"""Labels, lists and reviews in a real browser: by keyboard and pointer, without a page of its own for each step."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from server.settings import Settings
from tests.web.conftest import SAE, at, listened, put
from tests.web.walk import listening

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The web process on a filled database."""
    settings: Settings = put(at(tmp_path_factory.mktemp("people")))
    yield from listened(settings)


@pytest.fixture
def maren(page: Page, site: str) -> Iterator[Page]:
    """A page whose visitor said who she is; any complaint of the browser fails the test."""
    for quiet in listening(page):
        quiet.goto(f"{site}/author")
        quiet.get_by_label("Your name").fill("Maren")
        quiet.keyboard.press("Enter")
        expect(quiet).to_have_url(f"{site}/")
        yield quiet


def test_a_label_appears_in_the_title_without_a_new_page(maren: Page, site: str) -> None:
    page = maren
    page.goto(f"{site}{SAE}/features/3")
    page.evaluate("window.here = true")
    page.get_by_label("A label").fill("<b>dates</b> שלום")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Feature 3 <b>dates</b> שלום")
    page.get_by_role("button", name="star").click()
    expect(page.get_by_role("button", name="star")).to_have_attribute("aria-pressed", "true")
    page.get_by_text("change", exact=True).click()
    page.get_by_label("Label", exact=True).fill("years")
    page.get_by_role("button", name="Put in its place").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Feature 3 years")
    expect(page.get_by_text("history: 1 earlier")).to_be_visible()
    assert page.evaluate("window.here"), "the page was never left"


def test_a_list_is_made_from_features_and_ordered_by_keyboard(maren: Page, site: str) -> None:
    page = maren
    for index in (4, 8):
        page.goto(f"{site}{SAE}/features/{index}")
        if index == 4:
            page.get_by_label("Name of a new list").fill("For the talk")
        else:
            page.get_by_label("List", exact=True).select_option("For the talk")
        page.get_by_role("button", name="Put in").click()
        expect(page.get_by_role("link", name="For the talk")).to_be_visible()
    page.get_by_role("link", name="For the talk").click()
    entries = page.locator(".entry h2 a")
    expect(entries).to_have_text(["4", "8"])
    page.get_by_role("button", name="Move feature 8 up").focus()
    page.keyboard.press("Enter")
    expect(entries).to_have_text(["8", "4"])
    page.get_by_role("button", name="Take feature 4 out of the list").click()
    expect(entries).to_have_text(["8"])
    page.get_by_text("taken out: 1").click()
    page.get_by_role("button", name="Put feature 4 back").click()
    expect(entries).to_have_text(["8", "4"])
    page.emulate_media(media="print")
    expect(page.get_by_role("button", name="Move feature 8 down")).to_be_hidden()
    expect(page.locator(".entry .text").first).to_be_visible()


def test_features_are_rated_by_three_keys_until_the_result_stands_there(maren: Page, site: str) -> None:
    page = maren
    page.goto(f"{site}{SAE}/reviews")
    page.get_by_label("features").fill("3")
    page.get_by_role("button", name="Draw them").click()
    page.get_by_role("link", name="Begin to rate").click()
    for place, key in ((1, "y"), (2, "m"), (3, "n")):
        expect(page).to_have_url(re.compile(rf"place={place}$"))
        page.get_by_label("What is it?").fill("many yes")  # its letters answer nothing
        page.keyboard.press("Escape")
        page.keyboard.press(key)
    expect(page.get_by_text("1 of 3, 95 %: 6.1 % to 79 %")).to_be_visible()
    assert sorted(page.locator("b.answer").all_inner_texts()) == ["maybe", "no", "yes"]


@pytest.mark.parametrize("width", [390, 1440])
def test_no_page_of_these_scrolls_sideways_and_every_control_has_a_name(maren: Page, site: str, width: int) -> None:
    page = maren
    page.set_viewport_size({"width": width, "height": 844})
    long = "x" * 150 + " " + "long words " * 4
    page.goto(f"{site}{SAE}/features/9/labels")
    page.get_by_label(re.compile("label$")).fill(long)
    page.keyboard.press("Enter")
    expect(page.locator(".labels b").first).to_have_text(long.strip())
    for path in (
        "/lists",
        "/labels",
        f"{SAE}/features/9/labels",
        f"{SAE}/features/9",
        f"{SAE}/reviews",
        f"{SAE}/manage",
        f"{SAE}/delete",
    ):
        page.goto(site + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        for control in page.locator("main").locator("input:visible, select:visible, textarea:visible, button:visible").all():
            assert control.evaluate("e => (e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim())"), path
