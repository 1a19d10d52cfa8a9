"""Ways through the pages that people take, by pointer, key and form, in a real browser."""

import re
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from playwright.sync_api import Browser, Page, expect

from server import jobs
from server.db import Database
from server.store import search
from server.tables import SAE as SaeRow
from tests.web.conftest import SAE, at, listened
from tests.web.everything import A, B, furnish
from tests.web.walk import listening

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The web process on a database with one of everything, searchable, and with a job queue that no worker reads."""
    settings = furnish(at(tmp_path_factory.mktemp("paths")))
    database = Database(settings.url)
    jobs.upgrade(settings, database)
    with database.read() as session:
        harvest = session.scalars(sa.select(SaeRow.harvest_id).where(SaeRow.name == A)).one()
    assert harvest is not None
    search.write(database, harvest, search.unfenced)
    database.close()
    yield from listened(settings)


@pytest.fixture
def maren(browser: Browser, site: str) -> Iterator[Page]:
    """A page of somebody called Maren; any complaint of the browser fails the test."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    context.add_cookies([{"name": "headscope_author", "value": "Maren", "url": site}])
    yield from listening(context.new_page())
    context.close()


def test_a_cell_of_the_map_says_what_its_head_does_and_leads_to_its_features(maren: Page, site: str) -> None:
    page = maren
    page.goto(site)
    cell = page.locator("figure.map svg a[href$='/heads/4']")
    assert re.search(r"17\.4.*\d+.*induction", cell.locator("title").text_content() or "", re.DOTALL)
    cell.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Head 17.4")
    page.get_by_role("region", name="Its features by data").locator("tbody a").first.click()
    expect(page.get_by_text("Painted by head 4 alone")).to_be_visible()


def test_a_word_leads_to_the_features_that_fire_on_it(maren: Page, site: str) -> None:
    page = maren
    page.goto(f"{site}{SAE}/features/3")
    page.get_by_role("link", name="Search").click()
    page.get_by_label("Search everything").fill("tide")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Features that fire on")).to_be_visible()
    page.get_by_role("link", name=A, exact=True).first.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Search")
    page.locator(".found tbody a").first.click()
    expect(page.locator("#examples .found").first).to_be_visible()


def test_two_features_are_compared_by_their_names(maren: Page, site: str) -> None:
    page = maren
    page.goto(f"{site}/compare")
    page.get_by_label("this").fill(f"{A}:3")
    page.get_by_label("with").fill(f"{B}:5")
    page.keyboard.press("Enter")
    tops = {(page.get_by_label(f"Feature {n} of").locator(".examples").bounding_box() or {})["y"] for n in (3, 5)}
    assert max(tops) - min(tops) < 2, "what is compared stands side by side"


def test_a_job_is_started_cancelled_and_run_again_with_changes(maren: Page, site: str) -> None:
    page = maren
    page.goto(f"{site}/jobs")
    page.get_by_role("link", name="train an SAE").click()
    page.get_by_label("model needed").select_option("smollm2-135m")
    page.get_by_label("corpus needed").select_option("demo")
    page.get_by_label("layer needed").fill("3")
    page.locator("button.main").click()
    expect(page).to_have_url(re.compile("/jobs/train-"))
    expect(page.get_by_text("waiting for a worker")).to_be_visible()
    page.get_by_text("The exact config").click()
    expect(page.locator(".config pre")).to_contain_text('"layer": 3')
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("cancelled", exact=True)).to_be_visible()
    page.get_by_role("link", name="run again with changes").click()
    expect(page.get_by_label("layer needed")).to_have_value("3")


def test_an_sae_is_renamed_and_its_old_address_still_leads_there(maren: Page, site: str) -> None:
    page = maren
    page.goto(f"{site}/saes/archived-l3/manage")
    page.get_by_role("textbox", name="Name").first.fill("early-l3")
    page.get_by_role("textbox", name="Description").first.fill("looks at <b>dates</b>")
    page.get_by_role("button", name="Keep").first.click()
    expect(page).to_have_url(re.compile("/saes/early-l3"))
    page.get_by_role("button", name="Bring it back").click()
    page.goto(f"{site}/saes/archived-l3")
    expect(page.get_by_role("heading", level=1)).to_have_text("early-l3")
    expect(page.get_by_text("looks at <b>dates</b>")).to_be_visible()


def test_a_chart_is_taken_home_and_a_page_cites_itself(maren: Page, site: str) -> None:
    page = maren
    page.goto(f"{site}{SAE}/features/3")
    figure = page.locator("figure").first
    figure.get_by_text("as text").click()
    for kind in ("SVG", "CSV"):
        with page.expect_download() as taken:
            figure.get_by_role("link", name=kind).first.click()
        assert taken.value.suggested_filename.endswith(f".{kind.lower()}")
        assert taken.value.path().stat().st_size > 100
    page.get_by_text("Cite this page").click()
    expect(page.locator(".cite pre").first).to_contain_text(f"{SAE}/features/3")


def test_a_way_back_is_offered_where_there_is_no_page(page: Page, site: str) -> None:
    for address, back in ((f"{SAE}/features/999", SAE), ("/jobs/none", "/jobs"), (f"{SAE}?min_density=x", SAE), ("/none", "/")):
        page.goto(site + address)
        page.locator("main a").click()
        expect(page).to_have_url(site + back)


def test_people_write_without_javascript(browser: Browser, site: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{site}{SAE}/features/5")
    page.get_by_role("link", name="Labels, notes, lists").click()
    page.get_by_label("To label it, say who you are").fill("Ines")
    page.keyboard.press("Enter")
    page.get_by_label("A label").fill("days of the week")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="star").click()
    page.get_by_label("A note").fill("see also 3")
    page.get_by_role("button", name="Write it down").click()
    page.goto(f"{site}{SAE}/features/5")
    expect(page.get_by_role("heading", level=1)).to_have_text("Feature 5 days of the week")
    context.close()
