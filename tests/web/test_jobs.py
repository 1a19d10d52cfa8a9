"""`/jobs` and `/jobs/{job_id}`."""

import threading
import time
from pathlib import Path

import sqlalchemy as sa
from fastapi.testclient import TestClient

from server import jobs
from server.app import create_app
from server.db import Database
from server.pages import jobs as jobs_page
from server.pages.reply import to_json
from server.settings import Settings
from server.store import jobs as store
from tests.web.conftest import at, put
from tests.web.factory import Shape
from tests.web.reading import PART, Reader

RUNNING = "/jobs/train-running-1"


def test_a_running_job_shows_how_far_it_is(client: TestClient) -> None:
    page = Reader(client.get(RUNNING).text)
    text = page.text.replace("\u202f", " ")
    assert page.all("progress")[0]["value"] == "0.5000"
    for said in (
        "running",
        "9 120",
        "2 min 51 s",
        "524 288 of 1 048 576 tokens",
        "Collected 1 048 576 tokens in 88 s.",
        '"k": 32',
    ):
        assert said in text
    assert len(page.all("polyline")) == 2
    assert any(form.get("action") == f"{RUNNING}/cancel" for form in page.all("form"))


def test_a_harvest_shows_what_it_has_counted_and_all_that_it_sweeps(tmp_path: Path) -> None:
    settings = put(at(tmp_path), Shape(n_features=8, n_dead=0))
    database = Database(settings.url)
    with database.write() as session:
        config = {"saes": ["smollm2-l17", "gone"], "corpus": "demo"}
        store.create(session, "harvest-2-saes-x", "harvest", "Harvest 2 SAEs", config)
        attempt = store.start_attempt(session, "harvest-2-saes-x", "worker-0")
        for firings in (1000.0, 65432.0):  # the newer takes the older one's place
            store.add_points(session, "harvest-2-saes-x", attempt, [(0, {"firings": firings, "live": 4321.0})])
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        page = Reader(client.get("/jobs/harvest-2-saes-x").text)
        found = client.get("/jobs/harvest-2-saes-x.json").json()
    text = page.text.replace("\u202f", " ")
    assert "firings65 432" in text
    assert "live features4 321" in text
    assert page.all("polyline") == []
    assert found["counters"] == {"firings": 65432.0, "live": 4321.0}
    assert found["saes"] == ["smollm2-l17"]


def test_only_a_running_job_streams_polls_or_can_be_cancelled(client: TestClient) -> None:
    running, ended = client.get(RUNNING).text, client.get("/jobs/train-smollm2-l17-1").text
    assert f'hx-sse:connect="{RUNNING}/events"' in running
    assert "hx-sse:connect" not in ended
    assert "/cancel" not in ended
    assert 'href="/saes/smollm2-l17"' in ended


def test_the_list_asks_again_only_while_something_is_open(client: TestClient, empty_client: TestClient) -> None:
    assert 'hx-trigger="every 2s"' in client.get("/jobs", headers=PART).text
    quiet = empty_client.get("/jobs").text
    assert "hx-trigger" not in quiet
    assert "No job has been started" in quiet
    assert "headscope worker" in quiet


def test_the_json_is_the_same_dataclass(client: TestClient, filled: Settings) -> None:
    database = Database(filled.url)
    with database.read() as session:
        page = jobs_page.look(session, "train-running-1")
    database.close()
    assert client.get(f"{RUNNING}.json").content == to_json(page)
    assert [job["id"] for job in client.get("/jobs.json").json()["jobs"]] == ["train-running-1", "train-smollm2-l17-1"]


def test_the_stream_of_an_ended_job_shows_it_once_and_ends(client: TestClient) -> None:
    with client.stream("GET", "/jobs/train-smollm2-l17-1/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = "".join(answer.iter_text()).split("\n\n")
    assert events[0].startswith("data: ")
    assert ">done<" in events[0]
    assert events[1].startswith("event: end")
    assert not any(events[2:])


def test_the_stream_follows_a_job_until_it_ends(tmp_path: Path) -> None:
    settings = put(at(tmp_path), Shape(n_features=6, n_dead=0))
    database = Database(settings.url)

    begun = threading.Event()

    def end_it() -> None:
        begun.wait(30)
        time.sleep(0.3)
        with database.write() as session:
            store.finish(session, "train-running-1", 1)

    ending = threading.Thread(target=end_it)
    app = create_app(settings)
    sa.event.listen(app.state.db.engine, "after_cursor_execute", lambda *_: begun.set())
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        ending.start()
        events = client.get(f"{RUNNING}/events").text.split("\n\n")
    ending.join()
    database.close()
    assert ">running<" in events[0]
    assert ">done<" in events[1]
    assert events[2].startswith("event: end")


def test_cancel_ends_the_job_and_shows_it(tmp_path: Path) -> None:
    settings = at(tmp_path)
    database = Database(settings.url)
    jobs.upgrade(settings, database)
    database.close()
    put(settings, Shape(n_features=6, n_dead=0))
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        answer = client.post(f"{RUNNING}/cancel", headers={"Sec-Fetch-Site": "same-origin"})
        assert answer.status_code == 200
        assert answer.url.path == RUNNING
        assert ">cancelled<" in answer.text
        assert client.get(f"{RUNNING}.json").json()["job"]["status"] == "cancelled"
