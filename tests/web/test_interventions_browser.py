"""The interventions page in Chromium: waited for by itself, without a script, light and dark, wide and narrow."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from server.live import InLine, Live, SteerQuestion
from tests.web.conftest import at, listened, put
from tests.web.factory import Shape
from tests.web.test_accessibility import Scheme, violations, visited
from tests.web.test_interventions import SAE, steered

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The web process, really listening, with an engine that says twice that it is busy and then answers by `steered`."""
    waiting: dict[str, SteerQuestion] = {}
    looks: list[str] = []

    def leave(_: Live, ticket: str, question: SteerQuestion, __: float) -> InLine:
        waiting[ticket] = question
        return InLine(ticket=ticket, place=1, answer=None)

    def look(_: Live, ticket: str, __: float = 0.0) -> InLine:
        looks.append(ticket)
        if looks.count(ticket) == 1:
            return InLine(ticket=ticket, place=0, answer=None)
        return InLine(ticket=ticket, place=None, answer=None, steered=steered(waiting[ticket]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Live, "leave_steer", leave)
        patch.setattr(Live, "look", look)
        patch.setattr(Live, "warm", lambda *_: None)
        yield from listened(put(at(tmp_path_factory.mktemp("interventions")), Shape(n_features=24, n_dead=2)))


def ask(page: Page, site: str) -> None:
    page.goto(f"{site}/interventions?sae={SAE}&feature=3")
    page.get_by_label("Text", exact=True).fill("The tide came back")
    page.get_by_role("button", name="another feature").click()
    page.locator('[name="f.1.index"]').fill("5")
    page.locator("button.main").click()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 390)])
def test_a_busy_engine_is_waited_for_and_axe_finds_no_violation(browser: Browser, site: str, scheme: Scheme, width: int) -> None:
    with visited(browser, width) as page:
        page.emulate_media(color_scheme=scheme)
        ask(page, site)
        expect(page.locator("#outcome")).to_be_visible()  # looked for twice, by itself
        expect(page.locator(".edit")).to_have_count(2)
        assert page.url.startswith(f"{site}/interventions")
        assert "tide" not in page.url, "a text is in no address"
        assert "\n".join(violations(page, scheme)) == ""
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.locator("button.loss").nth(2).click()
        expect(page.locator("button.loss[aria-current]")).to_contain_text("tide")


def test_it_works_without_a_script(browser: Browser, site: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    ask(page, site)
    for _ in range(2):
        page.get_by_role("button", name="Look again").click()
    expect(page.locator("#outcome")).to_contain_text("What was changed")
    context.close()
