"""axe-core on every page, light and dark: no violation of WCAG 2 A and AA or of axe's own best practice."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from server.app import create_app
from server.pages.writing import COOKIE
from tests.web.accounts import PASSWORD, settle, with_accounts
from tests.web.conftest import at, listened
from tests.web.everything import NO_PAGES, OF_PEOPLE, PAGES, furnish
from tests.web.test_access_walk import routes

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The web process on a database with one of everything, really listening."""
    yield from listened(furnish(at(tmp_path_factory.mktemp("axe"))))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same where there are accounts."""
    yield from listened(with_accounts(settle(at(tmp_path_factory.mktemp("lab"))).settings))


@pytest.fixture(params=["light", "dark"])
def seen(browser: Browser, site: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page in one scheme, as somebody who may write sees it. The policy is lifted for axe alone, which must be put into
    the page to look at it."""
    context = browser.new_context(color_scheme=request.param, bypass_csp=True, reduced_motion="reduce")
    context.add_cookies([{"name": COOKIE, "value": "Maren", "url": site}])
    yield context.new_page()
    context.close()


def violations(page: Page) -> list[str]:
    """What axe finds wrong, a line each. In the dark only colours differ, so there it looks at contrast alone."""
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    found = Axe().run(page, options={"runOnly": ["color-contrast"]} if dark else None).response["violations"]
    return [
        f"{one['id']}: {one['help']}: {node['html'][:200]} {node.get('failureSummary', '')[:300]}"
        for one in found
        for node in one["nodes"][:3]
    ]


@pytest.mark.parametrize("path", [path for paths in PAGES.values() for path in paths])
def test_axe_finds_no_violation(seen: Page, site: str, path: str) -> None:
    seen.goto(site + path)
    seen.wait_for_timeout(250)  # blocks that the page asks for when it is there
    assert violations(seen) == []


@pytest.mark.parametrize("name", ["Ada", "Rita", None])
def test_axe_finds_no_violation_where_there_are_accounts(seen: Page, lab: str, name: str | None) -> None:
    if name:
        assert seen.request.post(f"{lab}/login", form={"name": name, "password": PASSWORD}).ok
    for path in [path for paths in OF_PEOPLE.values() for path in paths]:
        seen.goto(lab + path)
        assert violations(seen) == [], path


def test_every_kind_of_page_is_looked_at(tmp_path: Path) -> None:
    asked = {path for method, path, _ in routes(create_app(at(tmp_path))) if method == "GET"}
    pages = {re.sub(r":\w+\}", "}", path) for path in asked if not re.search(r"/api/|\.(json|csv|png)$", path)}
    assert pages - NO_PAGES == {*PAGES, *OF_PEOPLE} - {""}


def test_axe_sees_what_is_wrong(seen: Page, site: str) -> None:
    seen.goto(f"{site}/author")
    seen.evaluate("""() => {
      document.querySelector("main").insertAdjacentHTML("beforeend", "<img src=x><p>pale</p>");
      document.querySelector("main > p").style.color = "#777";
    }""")
    found = {one.partition(":")[0] for one in violations(seen)}
    assert "color-contrast" in found
    assert found == {"color-contrast"} or "image-alt" in found
