"""The feature page in a real browser: what a pointer and a key find in its examples."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.web.conftest import SAE, at, listened, put
from tests.web.factory import Shape

pytestmark = pytest.mark.browser

FEATURE = f"{SAE}/features/3"
WORDS = (" the", " tide", "<0xE6>", "<0x97>", "<0xA5>", " \u200b", "\n", " came", "<0xF0><0x9F>", "<0x99>", "<0x82>")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The web process on a database of tokens that split characters."""
    yield from listened(put(at(tmp_path_factory.mktemp("bytes")), Shape(n_features=12, n_dead=1, vocabulary=WORDS)))


def test_a_source_is_split_by_head_below_its_example_and_let_go_again(quiet_page: Page, site: str) -> None:
    page = quiet_page
    page.goto(site + FEATURE)
    example = page.locator("#example-0-1")
    example.locator(".text > u").first.click()
    parts = example.locator(".parts")
    expect(parts.get_by_role("heading", name=re.compile("by head"))).to_be_visible()
    parts.locator("a.split").nth(1).click()
    expect(parts.locator("tr.chosen")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(parts).to_have_count(0)
    example.get_by_role("link", name="sources").click()
    link = parts.locator("a[href*='head=']").first
    head = link.inner_text()
    link.click()
    expect(page).to_have_url(re.compile(rf"head={head}#example-0-1$"))
    expect(page.get_by_text(f"Painted by head {head} alone")).to_be_visible()


def test_every_token_can_be_pointed_at_also_those_without_a_mark(quiet_page: Page, site: str) -> None:
    page = quiet_page
    page.goto(f"{site}{FEATURE}?context=full")
    page.evaluate("window.scrollTo(0, document.querySelector('#example-0-0').offsetTop - 200)")
    spots = page.evaluate("""() => {
      const found = [];
      const text = document.querySelector("#example-0-0 .text");
      for (const node of text.childNodes) {
        const range = document.createRange();
        if (node.nodeType === 3 && node.textContent.trim().length > 2) {
          const from = node.textContent.search(/\\S/);
          range.setStart(node, from);
          range.setEnd(node, from + 1);
          const box = range.getBoundingClientRect();
          const seen = document.elementFromPoint(box.x + 1, box.y + box.height / 2);
          if (seen === text) found.push([box.x + 1, box.y + box.height / 2, node.textContent.trim().split(" ")[0]]);
        }
      }
      return found;
    }""")
    assert len(spots) > 3
    for x, y, word in spots[:6]:
        page.mouse.move(x, y)
        shown = page.locator("#inspector [data-part=word]")
        expect(shown).to_have_text(re.compile(re.escape(word[:3])))
    assert "\ufffd" not in page.locator("#examples").inner_text()


def test_characters_that_tokens_split_are_joined_where_no_mark_stands_between(quiet_page: Page, site: str) -> None:
    page = quiet_page
    page.goto(f"{site}{FEATURE}?context=full&all=1")
    text = page.locator("#examples").inner_text()
    assert "\ufffd" not in text
    assert "<0xE6>" in text, "a part of a character is shown as its byte"


def test_the_bar_that_is_pointed_at_is_said(quiet_page: Page, site: str) -> None:
    page = quiet_page
    page.goto(site + FEATURE)
    figure = page.locator("figure.bars").first
    figure.locator("svg").hover()
    expect(figure.locator("figcaption b")).to_have_text(re.compile(r"\S+.*: \S+"))


def pages_of(page: Page) -> list[str]:
    """The feature pages that the browser asks for from now on, by their addresses."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if re.search(r"/features/\d+(\?|$)", request.url) else None)
    return asked


SENT = "performance.getEntriesByName(location.href).at(-1).transferSize"
"""Bytes of the page that really came: a few hundred where the server said that nothing has changed."""


def test_the_next_feature_is_asked_for_once_ahead_and_not_sent_again_when_it_is_gone_to(quiet_page: Page, site: str) -> None:
    page, asked = quiet_page, pages_of(quiet_page)
    with page.expect_response(re.compile(r"/features/4$")):
        page.goto(f"{site}{SAE}/features/3")
    page.wait_for_load_state("networkidle")
    assert asked == [f"{site}{SAE}/features/3", f"{site}{SAE}/features/4"]
    assert page.evaluate(SENT) > 3000
    with page.expect_response(re.compile(r"/features/5$")):
        page.keyboard.press("j")
    expect(page).to_have_url(f"{site}{SAE}/features/4")
    assert page.evaluate(SENT) < 1000
    assert asked[2:] == [f"{site}{SAE}/features/4", f"{site}{SAE}/features/5"]
    with page.expect_response(re.compile(r"/features/2$")):  # that is the way now
        page.keyboard.press("k")
    expect(page).to_have_url(f"{site}{SAE}/features/3")


def test_another_feature_comes_in_the_place_of_this_one_and_so_does_a_step_back(quiet_page: Page, site: str) -> None:
    page = quiet_page
    page.goto(f"{site}{FEATURE}?head=2")
    page.evaluate("window.mark = 1; scrollTo(0, 300)")
    page.keyboard.press("j")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Feature 4")
    expect(page).to_have_url(f"{site}{SAE}/features/4?head=2")
    expect(page).to_have_title(re.compile("^Feature 4 of "))
    expect(page.get_by_label("Where you are")).to_contain_text("feature 4")
    expect(page.get_by_role("link", name="this page as JSON")).to_have_attribute("href", f"{SAE}/features/4.json")
    expect(page.locator("#main")).to_be_focused()
    assert page.evaluate("[window.mark, scrollY]") == [1, 0]
    page.locator("#next").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Feature 5")
    expect(page.locator("#next")).to_be_focused()
    for back in (4, 3):
        page.go_back()
        expect(page.get_by_role("heading", level=1)).to_contain_text(f"Feature {back}")
        expect(page).to_have_url(f"{site}{SAE}/features/{back}?head=2")
        expect(page.get_by_label("Where you are")).to_contain_text(f"feature {back}")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    assert page.evaluate("window.mark") == 1
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Feature 3")


def test_the_browser_goes_where_a_page_cannot_come_in_place(page: Page, site: str) -> None:
    page.goto(site + FEATURE)
    page.wait_for_load_state("networkidle")
    page.evaluate("window.mark = 1")
    refused = {"hx-request", "hx-history-restore-request"}
    page.route(
        re.compile(r"/features/4$"), lambda route: route.abort() if refused & {*route.request.headers} else route.continue_()
    )
    page.keyboard.press("j")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Feature 4")
    assert page.evaluate("window.mark") is None
    page.keyboard.press("j")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Feature 5")
    page.evaluate("window.mark = 1")
    page.go_back()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Feature 4")
    expect(page).to_have_url(f"{site}{SAE}/features/4")
    assert page.evaluate("window.mark") is None


def test_nothing_is_asked_for_ahead_where_data_is_saved_or_the_page_is_hidden(quiet_page: Page, site: str) -> None:
    page = quiet_page
    for instead in ("Object.defineProperty(navigator, 'connection', {value: {saveData: true}})",
                    "Object.defineProperty(document, 'hidden', {value: true})"):  # fmt: skip
        other = page.context.new_page()
        asked = pages_of(other)
        other.add_init_script(instead)
        other.goto(f"{site}{SAE}/features/3")
        other.wait_for_load_state("networkidle")
        other.evaluate("new Promise((done) => requestIdleCallback(done))")
        assert asked == [f"{site}{SAE}/features/3"]
        other.close()
