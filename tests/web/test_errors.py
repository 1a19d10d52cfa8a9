"""What bad addresses and bad days get: one sentence, on a page or in one shape of JSON."""

from pathlib import Path

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from server.app import create_app
from server.db import Database
from server.settings import Settings
from tests.web.conftest import SAE, at
from tests.web.reading import PART

UNKNOWN = [
    ("/nowhere", "no page at /nowhere"),
    ("/saes/gone", "There are: smollm2-l17."),
    ("/saes/gone/features/1", "There are: smollm2-l17."),
    (f"{SAE}/features/60", "features 0 to 59"),
    (f"{SAE}/features/{10**30}", "features 0 to 59"),
    (f"{SAE}/features/x", "no page at"),
    ("/jobs/gone", "There is no job gone."),
    ("/jobs/gone/events", "There is no job gone."),
    (f"{SAE}/jump?q=99", "features 0 to 59"),
]


@pytest.mark.parametrize(("address", "sentence"), UNKNOWN)
def test_unknown_things_are_404_with_a_sentence_that_helps(client: TestClient, address: str, sentence: str) -> None:
    answer = client.get(address)
    assert answer.status_code == 404
    assert sentence in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("address", ["/saes/gone.json", f"{SAE}/features/60.json", "/jobs/gone.json", "/nowhere.json"])
def test_the_json_of_an_error_has_one_shape(client: TestClient, address: str) -> None:
    answer = client.get(address)
    assert answer.status_code == 404
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"code", "message", "field"}


BAD = [
    ("sort=colour", "sort", "no column 'colour'"),
    ("head=9", "head", "heads 0 to 8"),
    ("head=-1", "head", "greater than or equal to 0"),
    ("leads=true", "head", "needs a head"),
    ("min_density=often", "min_density", "valid number"),
    ("max_density=2", "max_density", "less than or equal to 1"),
    ("after=nonsense", "after", "no place in this table"),
    ("after=x~1", "after", "no place in this table"),
    ("limit=0", "limit", "greater than or equal to 1"),
]


@pytest.mark.parametrize(("query", "field", "sentence"), BAD)
def test_a_bad_question_is_answered_with_its_field(client: TestClient, query: str, field: str, sentence: str) -> None:
    error = client.get(f"{SAE}.json?{query}")
    assert error.status_code == 422
    assert sentence in error.json()["error"]["message"]
    assert error.json()["error"]["field"] == field


def test_a_bad_filter_says_so_in_the_table_and_leaves_the_form_alone(client: TestClient) -> None:
    answer = client.get(f"{SAE}?min_density=often", headers=PART)
    assert answer.status_code == 422
    assert answer.text.startswith('<p class="error" role="alert">min_density: ')


@pytest.mark.parametrize("query", ["context=7", "head=99", "head=x"])
def test_a_bad_view_of_a_feature_is_refused(client: TestClient, query: str) -> None:
    assert client.get(f"{SAE}/features/3?{query}").status_code == 422


def test_a_wrong_method_is_a_sentence(client: TestClient) -> None:
    answer = client.post("/jobs")
    assert answer.status_code == 405
    assert "POST is not possible at /jobs; possible: GET, HEAD, OPTIONS." in answer.text


def test_a_huge_body_is_refused(client: TestClient) -> None:
    assert client.post(f"{SAE}/features/3", data={"text": "x" * 2_000_000}).status_code == 413


def web(settings: Settings) -> TestClient:
    return TestClient(create_app(settings), base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


def test_a_database_that_was_never_upgraded_says_what_to_run(tmp_path: Path) -> None:
    answer = web(at(tmp_path)).get("/")
    assert answer.status_code == 503
    assert "headscope db upgrade" in answer.text


def test_a_database_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    settings = at(tmp_path)
    database = Database(settings.url)
    database.upgrade()
    with database.write() as session:
        session.execute(sa.text("update alembic_version set version_num = '9999'"))
    database.close()
    answer = web(settings).get("/index.json")
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "database_too_new"


def test_a_database_that_is_away_is_a_page_and_not_a_crash(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path / "gone" / "deeper", cache=tmp_path)
    for address in ("/", f"{SAE}/features/1", "/jobs", "/readyz"):
        answer = web(settings).get(address)
        assert answer.status_code == 503
        assert "does not answer" in answer.text


def test_a_database_that_goes_away_later_is_a_page_too(settings: Settings) -> None:
    database = Database(settings.url)
    database.upgrade()
    client = web(settings)
    assert client.get("/").status_code == 200
    with database.write() as session:
        session.execute(sa.text("alter table sae rename to elsewhere"))
    database.close()
    assert client.get("/").status_code == 503


def test_a_fault_of_ours_shows_a_sentence_and_no_traceback(filled: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.pages.home.home_page", lambda _: 1 / 0)
    answer = web(filled).get("/")
    assert answer.status_code == 500
    assert "the server&#39;s log says what" in answer.text
    assert "ZeroDivisionError" not in answer.text
