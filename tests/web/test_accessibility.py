"""axe-core on every page, light and dark: no violation of WCAG 2 A and AA or of axe's own best practice."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

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
Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = ("light", "dark")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The web process on a database with one of everything, really listening."""
    yield from listened(furnish(at(tmp_path_factory.mktemp("axe"))))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same where there are accounts."""
    yield from listened(with_accounts(settle(at(tmp_path_factory.mktemp("lab"))).settings))


@contextmanager
def visited(browser: Browser, width: int = 1280) -> Iterator[Page]:
    """A page of a browser of its own. The policy is lifted for axe alone, which must be put into the page to look at it."""
    context = browser.new_context(bypass_csp=True, reduced_motion="reduce", viewport={"width": width, "height": 844})
    yield context.new_page()
    context.close()


@pytest.fixture(scope="module")
def seen(browser: Browser, site: str) -> Iterator[Page]:
    """A page as somebody who may write sees it."""
    with visited(browser) as page:
        page.context.add_cookies([{"name": COOKIE, "value": "Maren", "url": site}])
        yield page


def violations(page: Page, scheme: Scheme) -> list[str]:
    """What axe finds wrong in this scheme, a line each. Only colours differ, so in the dark it looks at contrast alone."""
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("scheme => matchMedia(`(prefers-color-scheme: ${scheme})`).matches", scheme)
    found = Axe().run(page, options={"runOnly": ["color-contrast"]} if scheme == "dark" else None).response["violations"]
    return [
        f"{scheme}: {one['id']}: {one['help']}: {node['html'][:200]} {node.get('failureSummary', '')[:300]}"
        for one in found
        for node in one["nodes"][:3]
    ]


@pytest.mark.parametrize("path", [path for paths in PAGES.values() for path in paths])
def test_axe_finds_no_violation(seen: Page, site: str, path: str) -> None:
    seen.goto(site + path)
    seen.wait_for_timeout(250)  # blocks that the page asks for when it is there
    assert [found for scheme in SCHEMES for found in violations(seen, scheme)] == []


@pytest.mark.parametrize("name", ["Ada", "Rita", None])
def test_axe_finds_no_violation_where_there_are_accounts(browser: Browser, lab: str, name: str | None) -> None:
    with visited(browser) as page:
        if name:
            assert page.request.post(f"{lab}/login", form={"name": name, "password": PASSWORD}).ok
        for path in [path for paths in OF_PEOPLE.values() for path in paths]:
            page.goto(lab + path)
            assert [found for scheme in SCHEMES for found in violations(page, scheme)] == [], path


def test_every_kind_of_page_is_looked_at(tmp_path: Path) -> None:
    asked = {path for method, path, _ in routes(create_app(at(tmp_path))) if method == "GET"}
    pages = {re.sub(r":\w+\}", "}", path) for path in asked if not re.search(r"/api/|\.(json|csv|png)$", path)}
    assert pages - NO_PAGES == {*PAGES, *OF_PEOPLE} - {""}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_sees_what_is_wrong(seen: Page, site: str, scheme: Scheme) -> None:
    seen.goto(f"{site}/author")
    seen.evaluate("""() => {
      document.querySelector("main").insertAdjacentHTML("beforeend", "<img src=x><p>pale</p>");
      document.querySelector("main > p").style.color = "#777";
    }""")
    found = {one.split(": ")[1] for one in violations(seen, scheme)}
    assert found == {"color-contrast"} | ({"image-alt"} if scheme == "light" else set())
