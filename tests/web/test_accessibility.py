"""axe-core on every page, light and dark: no violation of WCAG 2 A and AA or of axe's own best practice."""

from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

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
    "/jobs/train-running-1",
    "/jobs/train-smollm2-l17-1",
    "/jobs/new/train",
    "/jobs/new/harvest?sae=smollm2-l17",
    "/studies",
    "/search?q=the",
    "/saes/smollm2-l17/search?q=the&kind=text",
    "/saes/smollm2-l17/features/3/labels",
    "/labels",
    "/lists",
    "/author",
    "/saes/smollm2-l17/reviews",
    "/saes/smollm2-l17/manage",
    "/archive",
    "/api",
    "/nothing",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The web process on a filled database, really listening."""
    yield from listened(put(at(tmp_path_factory.mktemp("axe")), Shape(n_features=24, n_dead=3)))


@pytest.fixture(params=["light", "dark"])
def seen(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page in one scheme. The policy is lifted for axe alone, which must be put into the page to look at it."""
    context = browser.new_context(color_scheme=request.param, bypass_csp=True, reduced_motion="reduce")
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
