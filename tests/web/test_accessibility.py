"""axe-core on every page, light and dark: no violation of WCAG 2 A and AA or of axe's own best practice."""

from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from server.db import Database
from server.pages.writing import COOKIE
from server.store import labels, lists
from server.store.saes import find_sae
from tests.web.conftest import SAE, at, listened, put
from tests.web.factory import Shape

pytestmark = pytest.mark.browser

PAGES = (
    "/",
    SAE,
    f"{SAE}?head=4&leads=true",
    f"{SAE}/features/3",
    f"{SAE}/features/7",  # a dead one
    f"{SAE}/heads/4",
    "/models/smollm2-135m/heads",
    f"/embed{SAE}/features/3?panels=family,heads,tokens,activation,distance,examples",
    "/compare",
    "/compare?a=smollm2-l17&b=smollm2-l17",
    "/compare?a=smollm2-l17:3&b=smollm2-l17:5",
    "/jobs",
    "/status",
    "/jobs/train-running-1",
    "/jobs/train-smollm2-l17-1",
    "/jobs/new/train",
    "/jobs/new/harvest?sae=smollm2-l17",
    "/jobs/new/sweep",
    "/jobs/new/specificity?sae=smollm2-l17&feature=3&proxies=2",
    "/compare?sae=smollm2-l17",  # which has one harvest, and two are needed
    "/saes/smollm2-l17/search?q=a&kind=label",
    "/studies",
    "/search?q=the",
    "/saes/smollm2-l17/search?q=the&kind=text",
    "/saes/smollm2-l17/features/3/labels",
    "/labels",
    "/lists",
    "/lists/1",
    "/saes/smollm2-l17/features/3/components?band=0&rank=0",
    "/author",
    "/saes/smollm2-l17/reviews",
    "/saes/smollm2-l17/manage",
    "/archive",
    "/api",
    "/nothing",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The web process on a filled database, really listening; people have written about feature 3."""
    settings = put(at(tmp_path_factory.mktemp("axe")), Shape(n_features=24, n_dead=3))
    database = Database(settings.url)
    with database.write() as session:
        door = find_sae(session, "smollm2-l17")
        labels.add_label(session, door.id, 3, "dates after 'on'", "Maren")
        labels.add_note(session, door.id, 3, "head 4 looks at what followed", "Maren")
        labels.star(session, door.id, 3, "Maren", True)
        mine = lists.create(session, "For the talk", "", "Maren")
        lists.add(session, mine, door.id, 3, "the cleanest", "Maren")
    database.close()
    yield from listened(settings)


@pytest.fixture(params=["light", "dark"])
def seen(browser: Browser, site: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page in one scheme, as somebody who may write sees it. The policy is lifted for axe alone, which must be put into
    the page to look at it."""
    context = browser.new_context(color_scheme=request.param, bypass_csp=True, reduced_motion="reduce")
    context.add_cookies([{"name": COOKIE, "value": "Maren", "url": site}])
    yield context.new_page()
    context.close()


def violations(page: Page) -> list[str]:
    """What axe finds wrong, a line each."""
    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {one['help']}: {node['html'][:200]} {node.get('failureSummary', '')[:300]}"
        for one in found
        for node in one["nodes"][:3]
    ]


@pytest.mark.parametrize("path", PAGES)
def test_axe_finds_no_violation(seen: Page, site: str, path: str) -> None:
    seen.goto(site + path)
    assert violations(seen) == []


def test_axe_sees_what_is_wrong(seen: Page, site: str) -> None:
    seen.goto(site)
    seen.evaluate("document.querySelector('main').insertAdjacentHTML('beforeend', '<img src=x><p class=bad>a</p>')")
    assert any(one.startswith("image-alt") for one in violations(seen))
