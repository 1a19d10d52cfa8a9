"""The prompt page in Chromium: by keyboard, light and dark, wide and narrow, and without a script."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from server.live import InLine, Live, PromptQuestion
from tests.web.conftest import at, listened, put
from tests.web.factory import Shape
from tests.web.test_accessibility import Scheme, violations, visited
from tests.web.test_prompt import answer_to

pytestmark = pytest.mark.browser
TEXT = "The tide came back"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The web process, really listening, with an engine that is busy at first and then answers by `answer_to`."""
    waiting: dict[str, PromptQuestion] = {}

    def leave(_: Live, ticket: str, question: PromptQuestion, __: float) -> InLine:
        if question.text == "wait":
            waiting[ticket] = question
            return InLine(ticket=ticket, place=1, answer=None)
        return InLine(ticket=ticket, place=None, answer=answer_to(question))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Live, "leave", leave)
        patch.setattr(
            Live, "look", lambda _, ticket, __=0.0: InLine(ticket=ticket, place=None, answer=answer_to(waiting[ticket]))
        )
        patch.setattr(Live, "warm", lambda *_: None)
        yield from listened(put(at(tmp_path_factory.mktemp("prompt")), Shape(n_features=24, n_dead=2)))


def test_a_prompt_is_walked_by_keyboard(quiet_page: Page, site: str) -> None:
    page = quiet_page
    page.goto(f"{site}/prompt")
    page.get_by_label("Text", exact=True).fill(TEXT)
    page.keyboard.press("Control+Enter")
    expect(page.locator(".grid tbody tr")).to_have_count(5)
    assert page.url == f"{site}/prompt", "a text is in no address"
    page.locator(".grid button.tok").nth(2).focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator(".grid button.tok").nth(3)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".fires tbody tr")).to_have_count(2)
    page.get_by_role("button", name="Take feature 3 of layer 17 apart").press("Enter")
    expect(page.get_by_role("heading", name="Who gave what")).to_be_visible()
    expect(page.locator(".dfa tfoot")).to_contain_text("pre-activation")
    page.locator("details.share summary").click()
    page.get_by_role("button", name="Store it and give an address").click()
    page.wait_for_url(f"{site}/prompts/*")
    expect(page.locator(".dfa tfoot")).to_contain_text("pre-activation")


def test_a_busy_engine_is_waited_for_by_itself(quiet_page: Page, site: str) -> None:
    page = quiet_page
    page.goto(f"{site}/prompt")
    page.get_by_label("Text", exact=True).fill("wait")
    page.get_by_role("button", name="See what fires").click()
    expect(page.get_by_text("question before yours")).to_be_visible()
    expect(page.locator(".grid tbody tr")).to_have_count(5)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 1440), ("light", 390), ("dark", 390)])
def test_axe_finds_no_violation_and_nothing_is_wider_than_the_window(
    browser: Browser, site: str, scheme: Scheme, width: int
) -> None:
    with visited(browser, width) as page:
        page.emulate_media(color_scheme=scheme)
        page.goto(f"{site}/prompt")
        for against in ("", "The tide came in"):
            page.get_by_label("Text", exact=True).fill(TEXT)
            if against:
                page.get_by_text("compare with a second text").click()
                page.get_by_label("Second text").fill(against)
            page.get_by_role("button", name="See what fires").click()
            page.locator(".grid button.tok").nth(3).click()
            page.get_by_role("button", name="Take feature 3 of layer 17 apart").click()
            expect(page.locator(".dfa tfoot")).to_contain_text("pre-activation")
            assert "\n".join(violations(page, scheme)) == ""
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_it_works_without_a_script(browser: Browser, site: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{site}/prompt")
    page.get_by_label("Text", exact=True).fill("wait")
    page.get_by_role("button", name="See what fires").click()
    page.get_by_role("button", name="Look again").click()
    page.locator(".grid button.tok").nth(3).click()
    page.get_by_role("button", name="Look again").click()
    page.get_by_role("button", name="Take feature 3 of layer 17 apart").click()
    page.get_by_role("button", name="Look again").click()
    expect(page.locator(".dfa tfoot")).to_contain_text("pre-activation")
    context.close()
