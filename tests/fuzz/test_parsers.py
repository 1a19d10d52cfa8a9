"""Damaged files, odd addresses and odd words give what they are, or a sentence: never a traceback, never a 5xx."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.app import create_app
from server.db import Database
from server.settings import Settings
from tests.fuzz.targets import TARGETS, Source, attempt
from tests.web.factory import Shape, fill

FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
PAGES = (
    "/saes/{sae}", "/saes/{sae}/features/{n}", "/saes/{sae}/heads/{n}", "/saes/{sae}/search", "/search", "/jobs/new/{word}",
    "/saes/{sae}.json", "/saes/{sae}/features/{n}.json", "/compare", "/jobs/{word}", "/saes/{word}",
    "/api/v1/saes/{sae}/features", "/api/v1/jobs", "/saes/{sae}/features/{n}/preview.png", "/saes/{sae}/features/{n}/components",
)  # fmt: skip
NAMES = (
    "q", "kind", "sort", "after", "before", "min_density", "max_density", "head", "leads", "family", "min_share", "dead",
    "figure", "scheme", "band", "rank", "a", "b", "limit", "from", "sae", "layer", "dest", "label", "page",
)  # fmt: skip
WORDS = st.one_of(
    st.sampled_from(
        ["", "0", "-1", "1e999", "nan", "9" * 40, "%", "\0", "\u202e", "idx", "-density", "text", "true", "{", "'", "../.."]
    ),
    st.text(max_size=12).filter(lambda text: text.isprintable()),
    st.integers().map(str),
    st.floats().map(str),
)


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_taken_or_refused_with_a_sentence(name: str) -> None:
    outcomes: set[bool] = set()

    @FEW
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        def below(n: int) -> int:
            return data.draw(st.integers(0, max(n - 1, 0)))

        def some(n: int) -> bytes:
            return data.draw(st.binary(min_size=1, max_size=n))

        outcomes.add(attempt(name, Source(below, some)))

    tried()
    assert True in outcomes, "some damages harm nothing"
    assert name == "typed" or False in outcomes, "some are refused"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A small harvest's pages."""
    folder: Path = tmp_path_factory.mktemp("fuzzed")
    made = Settings(data=folder / "data", cache=folder / "cache").prepare()
    database = Database(made.url)
    fill(database, Shape(n_features=12, n_dead=2))
    database.close()
    with TestClient(create_app(made), base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as client:
        yield client


def test_no_address_breaks_a_page(web: TestClient) -> None:
    seen: set[int] = set()

    @settings(FEW, max_examples=250)
    @given(st.sampled_from(PAGES), st.lists(st.tuples(st.sampled_from(NAMES), WORDS), max_size=3), WORDS, st.booleans())
    def tried(page: str, asked: list[tuple[str, str]], word: str, part: bool) -> None:
        path = page.format(sae="smollm2-l17", n=3, word=quote(word, safe="") or "x")
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in asked)
        headers = {"HX-Request": "true", "HX-Request-Type": "partial"} if part else {}
        answer = web.get(f"{path}?{query}", headers=headers)
        assert answer.status_code < 500, (path, query, answer.text[-300:])
        seen.add(answer.status_code)

    tried()
    assert {200, 404, 422} <= seen
