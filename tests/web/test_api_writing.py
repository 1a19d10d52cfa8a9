"""What scripts write by `/api/v1`: lists, labels, notes, stars and jobs."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from sae_core.config import DashboardsJob, ImportJob
from server.app import create_app
from server.settings import Settings
from tests.web.conftest import SAE, Visit, queued

API = "/api/v1"
OF = f"{API}{SAE}/features/3"


def told(client: TestClient, method: str, path: str, status: int = 200, **kwargs: Any) -> Any:
    """The JSON of an answer of that status."""
    answer = client.request(method, path, **kwargs)
    assert answer.status_code == status, answer.text
    return answer.json()


# ---- lists ----


def indices(page: Any) -> list[int]:
    return [entry["index"] for entry in page["entries"]]


def test_a_list_is_made_filled_ordered_emptied_deleted_and_brought_back(maren: TestClient) -> None:
    answer = maren.post(f"{API}/lists", json={"name": "Tides", "description": "What comes back."})
    assert answer.status_code == 201
    assert answer.json()["list"]["author"] == "Maren"
    here = answer.headers["location"]
    for index in (3, 5, 9):
        page = told(maren, "POST", f"{here}/entries", 201, json={"sae": "smollm2-l17", "index": index, "note": f"n{index}"})
    assert indices(page) == [3, 5, 9]
    first, second, third = (entry["id"] for entry in page["entries"])
    page = told(maren, "PUT", f"{here}/order", json={"entries": [third, first, second]})
    assert indices(page) == [9, 3, 5]
    assert page == told(maren, "GET", here)
    assert page == told(maren, "GET", here.removeprefix(API) + ".json")
    page = told(maren, "PUT", f"{here}/entries/{first}", json={"note": "the clearest"})
    assert page["entries"][1]["note"] == "the clearest"
    page = told(maren, "DELETE", f"{here}/entries/{third}")
    assert indices(page) == [3, 5]
    assert page["removed"][0]["removed_by"] == "Maren"
    assert indices(told(maren, "POST", f"{here}/entries/{third}/restore")) == [9, 3, 5]
    assert told(maren, "PUT", here, json={"name": "Tide", "description": ""})["list"]["name"] == "Tide"
    assert told(maren, "DELETE", here)["list"]["deleted_by"] == "Maren"
    assert told(maren, "GET", f"{API}/lists")["lists"] == []
    told(maren, "POST", f"{here}/restore")
    assert [one["name"] for one in told(maren, "GET", f"{API}/lists")["lists"]] == ["Tide"]


def test_an_order_that_leaves_one_out_or_names_one_twice_is_refused(maren: TestClient) -> None:
    here = maren.post(f"{API}/lists", json={"name": "Tides"}).headers["location"]
    for index in (3, 5):
        page = told(maren, "POST", f"{here}/entries", 201, json={"sae": "smollm2-l17", "index": index})
    first, second = (entry["id"] for entry in page["entries"])
    for wrong in ([first], [first, first], [first, second, 99], []):
        error = told(maren, "PUT", f"{here}/order", 422, json={"entries": wrong})["error"]
        assert error["field"] == "entries"
    assert indices(told(maren, "GET", here)) == [3, 5]


# ---- labels, notes, stars ----


def test_a_label_is_given_changed_and_withdrawn_with_its_history(maren: TestClient, visit: Visit) -> None:
    page = told(maren, "POST", f"{OF}/labels", 201, json={"text": "tides"})
    first = page["labels"][0]["id"]
    assert page["labels"][0]["author"] == "Maren"
    page = told(visit("Arago"), "PUT", f"{OF}/labels/{first}", json={"text": "tide tables"})
    (label,), (old,) = page["labels"], page["history"]
    assert (label["text"], label["follows"], label["author"]) == ("tide tables", first, "Arago")
    assert (old["text"], old["ended"], old["ended_by"]) == ("tides", "superseded", "Arago")
    error = told(maren, "PUT", f"{OF}/labels/{first}", 409, json={"text": "late"})["error"]
    assert error["code"] == "outdated"
    page = told(maren, "DELETE", f"{OF}/labels/{label['id']}")
    assert page["labels"] == []
    assert [one["ended"] for one in page["history"]] == ["withdrawn", "superseded"]
    assert page == told(maren, "GET", f"{SAE}/features/3/labels.json")


def test_notes_and_stars_come_and_go(maren: TestClient) -> None:
    page = told(maren, "POST", f"{OF}/notes", 201, json={"text": "Two lines.\nOf text."})
    assert page["notes"][0]["text"] == "Two lines.\nOf text."
    page = told(maren, "DELETE", f"{OF}/notes/{page['notes'][0]['id']}")
    assert page["notes"][0]["text"] is None
    assert told(maren, "PUT", f"{OF}/star")["stars"] == ["Maren"]
    assert told(maren, "PUT", f"{OF}/star")["stars"] == ["Maren"]
    assert told(maren, "DELETE", f"{OF}/star")["stars"] == []


def test_a_script_says_who_writes_by_a_header(visit: Visit) -> None:
    nobody = visit(None)
    assert told(nobody, "POST", f"{OF}/labels", 422, json={"text": "x"})["error"]["field"] == "X-Author"
    headers = {"X-Author": "%C3%89lodie"}
    page = told(nobody, "POST", f"{OF}/labels", 201, json={"text": "x"}, headers=headers)
    assert page["labels"][0]["author"] == "Élodie"
    assert told(nobody, "POST", f"{OF}/labels", 422, json={"text": "x"}, headers={"X-Author": " "})["error"]["field"] == "author"


# ---- jobs ----


@pytest.fixture
def worked(peopled: Settings) -> Iterator[TestClient]:
    """The web process on a filled database with a queue."""
    with TestClient(create_app(queued(peopled)), base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        yield client


HARVEST = {"kind": "harvest", "config": {"saes": ["smollm2-l17"], "corpus": "demo"}}


def test_a_job_is_started_watched_cancelled_and_run_again(worked: TestClient) -> None:
    answer = worked.post(f"{API}/jobs", json=HARVEST)
    assert answer.status_code == 201
    job = answer.json()
    assert (job["kind"], job["status"], job["config"]["saes"]) == ("harvest", "queued", ["smollm2-l17"])
    here = answer.headers["location"]
    assert worked.post(f"{API}/jobs", json=HARVEST).json() == job  # asked twice, it is there once
    assert told(worked, "GET", here)["job"] == job == told(worked, "GET", f"/jobs/{job['id']}.json")["job"]
    assert [one["id"] for one in told(worked, "GET", f"{API}/jobs", params={"status": "queued"})["jobs"]] == [job["id"]]
    assert told(worked, "POST", f"{here}/cancel")["status"] == "cancelled"
    events = [event.split("\n") for event in worked.get(f"{here}/events").text.strip().split("\n\n")]
    assert [event[0] for event in events] == ["event: job", "event: end"]
    assert json.loads(events[0][1].removeprefix("data: "))["status"] == "cancelled"
    assert events[1][1] == "data: cancelled"
    assert told(worked, "POST", f"{here}/retry")["status"] == "queued"
    assert told(worked, "POST", f"{here}/retry", 400)["error"]["code"] == "job_error"


def test_a_job_that_goes_on_is_watched_for_as_long_as_one_asks(worked: TestClient) -> None:
    text = worked.get(f"{API}/jobs/train-running-1/events?seconds=1").text
    assert text.startswith("event: job\n")
    assert text.strip().endswith("event: end\ndata: running")


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("train", {"model": "smollm2-135m", "corpus": "demo", "site": {"layer": 3}}),
        ("sweep", {"base": {"model": "smollm2-135m", "corpus": "demo", "site": {"layer": 3}}, "ks": [16, 32]}),
        ("evaluate", {"sae": "smollm2-l17", "corpus": "demo"}),
        ("study", {"kind": "induction", "model": "smollm2-135m"}),
        ("study", {"kind": "specificity", "sae": "smollm2-l17", "feature": 3, "corpus": "demo",
                   "proxies": [{"kind": "tokens", "texts": [" tide"]}]}),
        ("import", {"location": "owner/saes/layer_3", "model": "smollm2-135m", "layer": 3, "folded": False, "scale": 1.5}),
        ("import", {"location": "/srv/saes/one", "model": "smollm2-135m"}),
    ],
)  # fmt: skip
def test_every_kind_of_job_is_started_from_its_config(worked: TestClient, kind: str, config: dict[str, Any]) -> None:
    job = told(worked, "POST", f"{API}/jobs", 201, json={"kind": kind, "config": config})
    assert (job["kind"], job["status"]) == (kind, "queued")


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"model": "smollm2-135m", "corpus": "demo", "site": {"layer": 30}}, "layer"),
        ({"model": "smollm2-135m", "corpus": "demo", "site": {"layer": 3}, "lr": -1}, "lr"),
        ({"model": "smollm2-135m", "corpus": "demo", "site": {"layer": 3}, "colour": 1}, "colour"),
        ({"model": "smollm2-135m", "corpus": "gone", "site": {"layer": 3}}, "corpus"),
        ({"corpus": "demo", "site": {"layer": 3}}, "model"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_its_field(worked: TestClient, config: dict[str, Any], field: str) -> None:
    error = told(worked, "POST", f"{API}/jobs", 422, json={"kind": "train", "config": config})["error"]
    assert error["field"] == field


def test_an_import_is_the_job_that_the_command_line_starts(worked: TestClient) -> None:
    config = {"location": "owner/saes/layer_3", "model": "smollm2-135m", "layer": 3}
    for name in ("tides", "tides-2"):  # the second makes another SAE
        job = told(worked, "POST", f"{API}/jobs", 201, json={"kind": "import", "config": config, "name": "tides"})
        assert job["id"] == f"import-tides-{1 if name == 'tides' else 2}"
        assert job["title"] == f"Import {name} for smollm2-135m"
    assert job["config"] == ImportJob.model_validate(config).model_dump(mode="json")
    ours = told(worked, "GET", f"{API}/jobs", params={"kind": "import"})["jobs"]
    assert [one["id"] for one in ours] == ["import-tides-2", "import-tides-1"]


def test_dashboards_are_imported_once_however_often_they_are_asked_for(worked: TestClient) -> None:
    config = {"location": "/srv/dashboards", "sae": "smollm2-l17", "partial": True}
    first, again = (told(worked, "POST", f"{API}/jobs", 201, json={"kind": "dashboards", "config": config}) for _ in range(2))
    assert first == again
    assert (first["kind"], first["status"]) == ("import", "queued")
    assert first["config"] == DashboardsJob.model_validate(config).model_dump(mode="json")


@pytest.mark.parametrize(
    ("kind", "config", "status", "field"),
    [
        ("import", {"location": "saes", "model": "smollm2-135m"}, 422, "location"),
        ("import", {"location": "./saes/one", "model": "smollm2-135m"}, 422, "location"),
        ("import", {"location": "~/saes/one", "model": "smollm2-135m"}, 422, "location"),
        ("import", {"location": "/srv/a\0b", "model": "smollm2-135m"}, 422, "location"),
        ("import", {"location": "/srv/one", "model": "gone"}, 422, "model"),
        ("import", {"location": "/srv/one", "model": "smollm2-135m", "layer": 30}, 422, "layer"),
        ("import", {"location": "/srv/one", "model": "smollm2-135m", "scale": 0}, 422, "scale"),
        ("import", {"location": "/srv/one", "model": "smollm2-135m", "colour": 1}, 422, "colour"),
        ("import", {"model": "smollm2-135m"}, 422, "location"),
        ("dashboards", {"location": "owner/repository", "sae": "smollm2-l17"}, 422, "location"),
        ("dashboards", {"location": "/srv/dashboards", "sae": "gone"}, 404, "sae"),
        ("dashboards", {"location": "/srv/dashboards"}, 422, "sae"),
    ],
)
def test_an_import_that_cannot_be_is_refused_by_its_field(
    worked: TestClient, kind: str, config: dict[str, Any], status: int, field: str
) -> None:
    before = told(worked, "GET", f"{API}/jobs")["jobs"]
    error = told(worked, "POST", f"{API}/jobs", status, json={"kind": kind, "config": config})["error"]
    assert error["field"] == field
    assert told(worked, "GET", f"{API}/jobs")["jobs"] == before


def test_jobs_are_paged_newest_first(worked: TestClient) -> None:
    for k in (8, 16, 32):
        config = {"model": "smollm2-135m", "corpus": "demo", "site": {"layer": 3}, "k": k}
        told(worked, "POST", f"{API}/jobs", 201, json={"kind": "train", "config": config})
    whole = [job["id"] for job in told(worked, "GET", f"{API}/jobs")["jobs"]]
    assert whole == [job["id"] for job in told(worked, "GET", "/jobs.json")["jobs"]]
    found, after = [], None
    while True:
        page = told(worked, "GET", f"{API}/jobs", params={"limit": 2, **({"after": after} if after else {})})
        found += [job["id"] for job in page["jobs"]]
        if (after := page["next"]) is None:
            break
    assert found == whole
    assert len(found) == 5
