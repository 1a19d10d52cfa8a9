"""Hostile tokens, labels and texts in a real browser: nothing runs, nothing turns or hides what stands around it, nothing breaks
the page, and a person can still read what is there."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from server.db import Database
from server.store import labels, lists
from server.store.saes import find_sae
from tests.web.conftest import SAE, at, listened, put
from tests.web.factory import Shape
from tests.web.walk import listening

pytestmark = pytest.mark.browser

RAN = "<img src=x onerror=\"document.title='ran'\">"
HOSTILE = (
    "<script>document.title='ran'</script>", RAN,
    "\" onmouseover=\"document.title='ran'\" x=\"", "'--><svg onload=document.title='ran'>",
    "</b></u></p></li></ol></main>", "<!--", "<plaintext>", "<style>*{display:none}</style>", "javascript:document.title='ran'",
    "&lt;b&gt;", "{{ 7 * 7 }}", "\u202eevil", "\u2066\u2067", "\u200b", "\u200d", "\ufeff", "\u00ad", "\x00", "\x1b[31m",
    "\x7f",
    "\ud83d", "\ude42", "🙂", "👩‍👩‍👧", "\ufffd", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>",
    "<0xE6><0x97>", " مرحبا", " שלום", "日本",
    "e" + "\u0301" * 60, "\n", "\r\n", "\t", "\u2028", " ", "", "x" * 10_000, " the", " tide",
)  # fmt: skip
HIDDEN = "\u202e\u2066\u2067\u200b\ufeff\u00ad\x00\x1b\x7f\u2028"
PAGES = (
    SAE, f"{SAE}?head=4&leads=true", f"{SAE}/features/0?context=full&all=1", f"{SAE}/features/3", f"{SAE}/features/3?context=5",
    f"{SAE}/features/7", f"{SAE}/heads/4", "/models/smollm2-135m/heads", "/compare?a=smollm2-l17:3&b=smollm2-l17:5",
    f"/embed{SAE}/features/3?panels=family,heads,tokens,activation,distance,examples", "/lists/1", "/labels",
    f"{SAE}/search?q=tide&kind=text", f"{SAE}/search?q=%3Cscript%3E&kind=token", "/search?q=%3Cimg+src%3Dx%3E",
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The web process on a database in which every text that is not ours is hostile."""
    settings = put(at(tmp_path_factory.mktemp("hostile")), Shape(n_features=40, n_dead=4, vocabulary=HOSTILE))
    database = Database(settings.url)
    with database.write() as session:
        door = find_sae(session, SAE.rpartition("/")[2])
        labels.add_label(session, door.id, 3, f"{RAN} \u202eevil", "Ma\u200bren <b>")
        labels.add_note(session, door.id, 3, "</textarea>" + "w" * 3000, "Maren")
        mine = lists.create(session, "</title>" + "L" * 60, "\u202e" + RAN, "Maren")
        lists.add(session, mine, door.id, 3, "n" * 1500, "Maren")
    database.close()
    yield from listened(settings)


@pytest.fixture
def quiet_page(browser: Browser, site: str) -> Iterator[Page]:
    """A page of somebody who may write, on which any complaint of the browser, a refusal of the policy too, fails the test."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    context.add_cookies([{"name": "headscope_author", "value": "Maren", "url": site}])
    yield from listening(context.new_page())
    context.close()


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("path", PAGES)
def test_hostile_text_runs_nothing_and_breaks_no_page(quiet_page: Page, site: str, path: str, width: int) -> None:
    page = quiet_page
    page.set_viewport_size({"width": width, "height": 844})
    answer = page.goto(site + path)
    assert answer is not None
    assert answer.status == 200
    page.wait_for_load_state("networkidle")
    assert "ran" not in page.title().split()
    assert page.locator("img, main script, main style, plaintext").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not set(HIDDEN) & set(page.locator("main").inner_text())
    expect(page.locator("main + footer, body.embed > main")).to_have_count(1)  # no token closed what it stands in


def test_a_hostile_token_is_told_in_the_panel_as_text(quiet_page: Page, site: str) -> None:
    page = quiet_page
    page.set_viewport_size({"width": 1440, "height": 900})
    seen = set()
    for index in (0, 1, 2):
        page.goto(f"{site}{SAE}/features/{index}?context=full")
        shown = page.locator("#inspector [data-part=word] .chip")
        for token in page.locator(".text > u, .text > b").all()[:25]:
            said = token.text_content() or ""
            token.dispatch_event("pointerover")
            expect(shown).to_have_text(said.replace(" ", "·"))
            assert not set(HIDDEN) & set(said)
            seen.add(said)
    assert any("<" in one for one in seen), "no markup was pointed at: nothing is tested"
    assert any("⟨" in one for one in seen), "nothing invisible was pointed at"
    assert "ran" not in page.title().split()


def test_data_of_hostile_texts_can_be_fetched(quiet_page: Page, site: str) -> None:
    for address in (f"{SAE}.json", f"{SAE}/features.csv", f"{SAE}/features/3.json", "/lists/1.json", f"/api/v1{SAE}/features/3"):
        assert quiet_page.request.get(site + address).ok, address
