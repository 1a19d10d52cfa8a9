"""The graph of a circuit in a real browser: by keyboard, by pointer, without a script, on a phone, in both schemes."""

from collections import Counter
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from server.circuits.asked import CircuitQuestion
from server.live import InLine, Live
from tests.web.circuit_answers import ROOT, UPPER, circuit_of
from tests.web.conftest import at, listened, put
from tests.web.factory import Shape
from tests.web.test_accessibility import Scheme, violations, visited

pytestmark = pytest.mark.browser
HERE = "/saes/smollm2-l17/features/3/circuit"
BUSY = (0.001, 0.02, 0.05)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Pages with an engine that answers by `circuit_of`; asked for BUSY shares it is busy until it was looked at twice."""
    waiting: dict[str, CircuitQuestion] = {}
    answered: list[CircuitQuestion] = []
    looks: Counter[str] = Counter()

    def leave(_: Live, ticket: str, question: CircuitQuestion, __: float) -> InLine:
        if question.share in BUSY and question not in answered:
            waiting[ticket] = question
            return InLine(ticket=ticket, place=1, answer=None)
        return InLine(ticket=ticket, place=None, answer=None, circuit=circuit_of(question))

    def look(_: Live, ticket: str, __: float = 0.0) -> InLine:
        looks[ticket] += 1
        if looks[ticket] < 2:
            return InLine(ticket=ticket, place=0, answer=None)
        answered.append(waiting[ticket])  # an engine keeps what it has answered
        return InLine(ticket=ticket, place=None, answer=None, circuit=circuit_of(waiting[ticket]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Live, "leave_circuit", leave)
        patch.setattr(Live, "look", look)
        patch.setattr(Live, "warm", lambda *_: None)
        yield from listened(put(at(tmp_path_factory.mktemp("circuit")), Shape(n_features=24, n_dead=2)))


def test_a_graph_is_walked_by_keyboard_and_its_address_keeps_what_is_seen(quiet_page: Page, site: str) -> None:
    page = quiet_page
    page.goto(f"{site}{HERE}")
    node = page.locator("figure.circuit a.node")
    expect(node).to_have_count(7)
    page.locator(f'figure.circuit [data-node="{ROOT}"]').focus()
    for key, reached in (("ArrowDown", UPPER), ("ArrowDown", "x@1"), ("ArrowUp", UPPER), ("ArrowUp", ROOT), ("ArrowDown", UPPER)):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.node") == reached, key
    page.keyboard.press("Enter")
    expect(page.locator("#picked-title")).to_contain_text("11.5")
    assert "pick=f11.5" in page.url
    page.get_by_role("link", name="pin", exact=True).click()
    expect(page.get_by_role("heading", name="Pins and groups")).to_be_visible()
    page.get_by_role("link", name="hide its sources").click()
    expect(node).to_have_count(4)
    page.reload()
    expect(node).to_have_count(4)
    expect(page.get_by_role("heading", name="Pins and groups")).to_be_visible()
    page.locator("summary", has_text="group").click()
    page.get_by_label("name").fill("tides")
    page.get_by_role("button", name="Put it there").click()
    expect(page.get_by_role("link", name="Look at group tides of 1 nodes")).to_be_visible()
    page.go_back()
    expect(page.get_by_role("link", name="Look at group tides of 1 nodes")).to_have_count(0)


def test_a_node_of_the_drawing_is_picked_by_a_click_and_an_edge_opened(quiet_page: Page, site: str) -> None:
    page = quiet_page
    page.goto(f"{site}{HERE}")
    page.locator(f'figure.circuit [data-node="{UPPER}"] .mark').click()
    expect(page.locator("#picked-title")).to_contain_text("11.5")
    page.go_back()
    page.get_by_role("link", name="Take the edge from feature 5 of layer 11").click()
    expect(page.get_by_role("heading", name="Why head 17.0 looked from")).to_be_visible()
    page.get_by_role("link", name="its lead over the mean").click()
    page.wait_for_url("**lead=1")


def test_typed_text_is_traced_from_the_prompt_page_s_form_and_shared(quiet_page: Page, site: str) -> None:
    page = quiet_page
    page.goto(f"{site}/prompt")
    page.evaluate(
        """() => {
          const form = document.createElement("form");
          Object.assign(form, {method: "post", action: "/circuit"});
          form.innerHTML = '<input name="text" value="The tide came back"><input name="saes" value="sae:smollm2-l17">'
            + '<input name="root" value="3@3@smollm2-l17"><button id="go">go</button>';
          document.body.append(form);
        }"""
    )
    page.locator("#go").click()
    page.locator(f'figure.circuit [data-node="{UPPER}"] .mark').click()
    expect(page.locator("#picked-title")).to_contain_text("11.5")
    assert page.url.endswith("/circuit"), "a text is in no address"
    page.locator("summary", has_text="give it an address").click()
    page.get_by_role("button", name="Store the text").click()
    page.wait_for_url(f"{site}/prompts/*/circuit?**")
    expect(page.locator("#picked-title")).to_contain_text("11.5")


def test_a_busy_engine_is_looked_at_until_it_answers_and_the_address_has_no_part_in_it(quiet_page: Page, site: str) -> None:
    page, looks = quiet_page, []
    page.on("request", lambda request: looks.append(request) if request.url.endswith("/circuit/look") else None)
    page.goto(f"{site}{HERE}?share=0.02&pins={UPPER}")
    expect(page.locator("figure.circuit a.node")).to_have_count(7)
    assert len(looks) == 2
    assert page.url == f"{site}{HERE}?share=0.02&pins={UPPER}"
    page.get_by_label("from a share of").select_option("0.001")
    page.get_by_role("button", name="Trace again").click()
    expect(page.get_by_text("question before yours")).to_be_visible()
    expect(page.locator("figure.circuit a.node")).to_have_count(7)
    assert len(looks) == 4
    assert parse_qs(urlsplit(page.url).query) == {"band": ["0"], "rank": ["0"], "share": ["0.001"], "pins": [UPPER]}


def test_it_works_without_a_script_and_waits_for_a_busy_engine(browser: Browser, site: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{site}{HERE}?share=0.05")
    expect(page.get_by_text("question before yours")).to_be_visible()
    for _ in range(2):
        page.get_by_role("button", name="Look again").click()
    page.locator(f'figure.circuit [data-node="{UPPER}"] .hit').click()
    expect(page.locator("#picked-title")).to_contain_text("11.5")
    assert HERE in page.url, "the answer stands at its address"
    assert "ticket" not in page.url
    page.get_by_label("from a share of").select_option("0.01")
    page.get_by_role("button", name="Trace again").click()
    page.locator("summary", has_text="group").click()
    page.get_by_label("name").fill("tides")
    page.get_by_role("button", name="Put it there").click()
    expect(page.get_by_role("link", name="Look at group tides of 1 nodes")).to_be_visible()
    assert "groups=tides" in page.url
    context.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 1440), ("light", 390), ("dark", 390)])
def test_axe_finds_no_violation_and_nothing_is_wider_than_the_window(
    browser: Browser, site: str, scheme: Scheme, width: int
) -> None:
    with visited(browser, width) as page:
        page.emulate_media(color_scheme=scheme)
        page.goto(f"{site}{HERE}?pick={ROOT}&edge={UPPER}&pins={UPPER}&groups=tides:m2@2")
        expect(page.get_by_role("heading", name="Why head 17.0 looked from")).to_be_visible()
        for details in page.locator("#circuit details").all():
            details.locator("summary").first.click()
        assert "\n".join(violations(page, scheme)) == ""
        assert page.evaluate("document.documentElement.scrollWidth") <= width
