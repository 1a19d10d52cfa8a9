"""`/`: the first page."""

from pathlib import Path

import sqlalchemy as sa
from fastapi.testclient import TestClient

from server.db import Database
from server.pages.reply import to_json
from server.settings import Settings
from server.store.home import home_page
from server.tables import HeadSummary
from tests.web.conftest import SAE, at, put
from tests.web.reading import PART, Reader


def test_a_newcomer_is_told_what_to_do(empty_client: TestClient) -> None:
    text = Reader(empty_client.get("/").text).text
    assert "Nothing to browse yet" in text
    assert "headscope demo" in text


def test_while_the_first_sae_is_made_the_page_says_so(empty_client: TestClient, settings: Settings) -> None:
    database = Database(settings.url)
    with database.write() as session:
        session.execute(
            sa.text(
                "insert into job (id, kind, title, config, status, attempt, done, total, unit, rate, created_at) values "
                "('train-a-1', 'train', 'Train a', '{}', 'running', 1, 3, 4, 'tokens', 5, '2026-11-20 10:00:00')"
            )
        )
    database.close()
    page = Reader(empty_client.get("/").text)
    assert "The first SAE is being made" in page.text
    assert page.all("progress")[0]["value"] == "0.7500"


def test_the_map_leads_to_the_heads_and_to_their_table(client: TestClient) -> None:
    links = [a["href"] for a in Reader(client.get("/").text).all("a")]
    for head in range(9):
        assert f"{SAE}/heads/{head}" in links
    assert "/models/smollm2-135m/heads" in links
    assert links.count("/compare") == 1, "one SAE is not compared with another; the bar has the page"


def test_a_cell_says_its_main_family_and_is_marked_where_that_is_much_of_it(client: TestClient) -> None:
    page = Reader(client.get("/").text)
    assert "6 induction" in page.text
    assert "no family stands out" in page.text  # head 0
    marks = [path for path in page.all("path") if path.get("class") == "mark s0"]
    assert len(marks) >= 5


def test_the_map_counts_as_the_summaries_of_heads_do_or_the_features_of_older_harvests(tmp_path: Path) -> None:
    settings = put(at(tmp_path))
    database = Database(settings.url)

    def counts() -> list[int]:
        with database.read() as session:
            return [cell.features for cell in home_page(session).models[0].cells]

    with_summaries = counts()
    assert sum(with_summaries) == 55
    with database.write() as session:
        session.execute(sa.update(HeadSummary).where(HeadSummary.head == 4).values(n_led_norm=99))
    assert counts()[4] == 99
    with database.write() as session:
        session.execute(sa.delete(HeadSummary))
    assert counts() == with_summaries
    database.close()


def test_cards_show_key_figures(client: TestClient) -> None:
    text = Reader(client.get("/").text).text.replace("\u202f", " ")
    for figure in ("31.4", "24.3 %", "97.2 %", "55 live features"):
        assert figure in text


def test_running_jobs_are_asked_for_again_only_while_they_run(client: TestClient, empty_client: TestClient) -> None:
    part = client.get("/", headers=PART).text
    assert 'hx-trigger="every 2s"' in part
    assert "<html" not in part
    assert "hx-trigger" not in empty_client.get("/", headers=PART).text


def test_a_page_left_open_is_made_anew_when_an_sae_is_published(client: TestClient) -> None:
    jobs = Reader(client.get("/").text).all("section")[0]["hx-get"]
    assert "hx-refresh" not in client.get(jobs, headers=PART).headers
    assert client.get("/?seen=before", headers=PART).headers["hx-refresh"] == "true"


def test_the_json_is_the_same_dataclass(client: TestClient, filled: Settings) -> None:
    database = Database(filled.url)
    with database.read() as session:
        page = home_page(session)
    database.close()
    assert client.get("/index.json").content == to_json(page)


def test_health_names_the_database(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok", "version": "0.1.0"}
    assert client.get("/readyz").json() == {"status": "ready", "version": "0.1.0", "database": "sqlite"}


def test_the_openapi_description_names_every_twin(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {path for path in paths if path.endswith(".json")} == {
        "/index.json",
        "/people.json",
        "/keys.json",
        "/audit.json",
        "/saes/{sae}.json",
        "/saes/{sae}/features/{index}.json",
        "/saes/{sae}/features/{index}/components.json",
        "/saes/{sae}/features/{index}/examples/{band}/{rank}.json",
        "/saes/{sae}/features/{index}/labels.json",
        "/labels.json",
        "/search.json",
        "/saes/{sae}/search.json",
        "/archive.json",
        "/saes/{sae}/manage.json",
        "/lists.json",
        "/lists/{list_id}.json",
        "/saes/{sae}/reviews.json",
        "/reviews/{review_id}.json",
        "/reviews/{review_id}/rate.json",
        "/jobs.json",
        "/jobs/{job_id}.json",
        "/saes/{sae}/heads/{head}.json",
        "/models/{model}/heads.json",
        "/compare.json",
        "/sweeps/{job_id}.json",
        "/studies.json",
        "/studies/{study_id}.json",
        "/status.json",
        "/prompt.json",
        "/prompts/{prompt_id}.json",
        "/interventions.json",
        "/saes/{sae}/features/{index}/circuit.json",
        "/prompts/{prompt_id}/circuit.json",
    }
