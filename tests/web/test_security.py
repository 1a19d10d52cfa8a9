"""What every answer carries, and what is refused."""

import base64
import hashlib

import pytest
from fastapi.testclient import TestClient

from server.resources import resource_path
from tests.web.conftest import SAE
from tests.web.reading import PART, Reader

PAGES = (
    "/",
    SAE,
    f"{SAE}?head=3&leads=true",
    f"{SAE}/features/3",
    f"{SAE}/features/3?head=2&context=full",
    f"{SAE}/features/7",
    "/jobs",
    "/jobs/train-running-1",
    "/jobs/train-smollm2-l17-1",
    "/no/such/page",
)


@pytest.mark.parametrize("address", PAGES)
@pytest.mark.parametrize("headers", [{}, PART], ids=["whole", "part"])
def test_no_page_holds_what_the_csp_would_refuse(client: TestClient, address: str, headers: dict[str, str]) -> None:
    assert Reader(client.get(address, headers=headers).text).refused == []


def test_the_reader_sees_inline_code() -> None:
    bad = '<p style="x" onclick="y"><script>z()</script><a href="https://elsewhere">'
    assert len(Reader(bad).refused) == 4


@pytest.mark.parametrize("address", [*PAGES, "/healthz", "/index.json", "/static/app.css"])
def test_every_answer_carries_the_strict_policy(client: TestClient, address: str) -> None:
    headers = client.get(address).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-opener-policy"] == "same-origin"


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "null"},
    ],
)
@pytest.mark.parametrize("address", ["/jobs/train-running-1/cancel", f"{SAE}/features/3"])
def test_a_post_from_another_site_is_refused(client: TestClient, address: str, headers: dict[str, str]) -> None:
    answer = client.post(address, headers=headers, data={"text": "x"})
    assert answer.status_code == 403
    assert "another site" in answer.text
    assert client.get("/jobs/train-running-1.json").json()["job"]["status"] == "running"


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "same-origin"}, {"Origin": "http://127.0.0.1:8000"}, {}])
def test_a_post_from_our_own_page_or_a_program_gets_through(client: TestClient, headers: dict[str, str]) -> None:
    assert client.post("/jobs/none/cancel", headers=headers).status_code == 404


def test_another_host_name_is_refused(client: TestClient) -> None:
    assert client.get("/", headers={"Host": "attacker.example"}).status_code == 400


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("htmx-4.0.1.min.js", "Qp9rdC8H7EqOoX+nR0P3RPG2Noji+qdwJlGpfzwQJsfOpp3sGwIdSP9xO3+UlEhn"),
        ("hx-sse-4.0.1.min.js", "v8HvucQ+ohQhMg0arboXc5049yNR46QKMjphs7YDch+Wm7zpfK5XVS01f26mQDJV"),
    ],
)
def test_vendored_scripts_are_the_released_ones(name: str, digest: str) -> None:
    content = (resource_path("static") / "vendor" / name).read_bytes()
    assert base64.b64encode(hashlib.sha384(content).digest()).decode() == digest


def test_assets_are_kept_for_good_only_under_their_digest(client: TestClient) -> None:
    page = Reader(client.get("/").text)
    sheet = next(attrs["href"] for attrs in page.all("link") if attrs.get("rel") == "stylesheet")
    assert "immutable" in client.get(sheet).headers["cache-control"]
    assert client.get("/static/app.css").headers["cache-control"] == "no-cache"
