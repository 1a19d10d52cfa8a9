"""Forms that start jobs: made from the configs, nothing lost when refused, filled from a job that was run before."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from fastapi.testclient import TestClient

from sae_core.config import EvaluateJob, HarvestJob, TrainConfig
from server import jobs
from server.app import create_app
from server.db import Database
from server.forms import filled, typed
from server.settings import Settings
from server.store import jobs as store
from tests.web.conftest import at, put
from tests.web.factory import Shape
from tests.web.reading import Reader

TRAIN = {"model": "smollm2-135m", "corpus": "demo", "site.layer": "3"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = put(at(tmp_path_factory.mktemp("start")), Shape(n_features=12, n_dead=1))
    database = Database(settings.url)
    jobs.upgrade(settings, database)
    database.close()
    return settings


@pytest.fixture(scope="module")
def web(place: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(place), base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        yield client


def send(web: TestClient, kind: str, **fields: str) -> "tuple[int, str, str]":
    headers = {"content-type": "application/x-www-form-urlencoded"}
    answer = web.post(f"/jobs/new/{kind}", content=urlencode(fields), headers=headers)
    return answer.status_code, answer.headers.get("location", ""), answer.text


def values(html: str) -> dict[str, str]:
    """What stands in the form's inputs; of a select without a chosen option, its first."""
    page = Reader(html)
    found, select = {}, ""
    for tag, attributes in page.elements:
        if tag == "input" and "name" in attributes and attributes.get("type") != "hidden":
            found[attributes["name"]] = attributes["value"]
        select = attributes["name"] if tag == "select" else select
    return found


def test_the_form_has_every_field_of_the_config_with_its_words(web: TestClient) -> None:
    html = web.get("/jobs/new/train").text
    for name, info in TrainConfig.model_fields.items():
        if name not in ("site", "rows", "harvests"):
            assert f'name="{name}"' in html
            assert (info.description or "")[:20].replace("'", "&#39;") in html
    for name in ("site.layer", "rows.context", "harvests.0.top_k"):
        assert f'name="{name}"' in html


@pytest.mark.parametrize(("kind", "model"), [("train", TrainConfig), ("harvest", HarvestJob), ("evaluate", EvaluateJob)])
def test_a_form_sent_as_it_came_gives_the_defaults(web: TestClient, kind: str, model: type[TrainConfig]) -> None:
    needed = {
        "train": TRAIN,
        "harvest": {"saes": "smollm2-l17", "corpus": "demo"},
        "evaluate": {"sae": "smollm2-l17", "corpus": "demo"},
    }
    sent = values(web.get(f"/jobs/new/{kind}").text) | needed[kind]
    result = filled(model, sent)
    assert result.errors == {}
    assert result.config == filled(model, needed[kind]).config


def test_a_job_is_queued_with_what_was_typed(web: TestClient, place: Settings) -> None:
    status, where, _ = send(web, "train", **TRAIN, name="mine", k="16", **{"harvests.0.tokens": "2048", "l1": "none"})
    assert (status, where) == (303, "/jobs/train-mine-1")
    database = Database(place.url)
    with database.read() as session:
        cfg = TrainConfig.model_validate(store.get(session, "train-mine-1").config)
    database.close()
    assert (cfg.k, cfg.l1, cfg.site.layer, cfg.harvests[0].tokens, cfg.lr) == (16, None, 3, 2048, 3e-3)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("k", "many", "valid integer"),
        ("rows.context", "4", "greater than or equal to 8"),
        ("site.layer", "44", "there is no layer 44"),
        ("harvests.0.top_k", "900", "less than or equal to 200"),
        ("l1", "0.5", "l1 is read by relu and gated only"),
        ("k", "100000", "more than there are"),
    ],
)
def test_a_refusal_stands_beside_its_input_and_loses_nothing(web: TestClient, field: str, value: str, said: str) -> None:
    status, _, html = send(web, "train", **(TRAIN | {"lr": "0.00125", "name": "kept", field: value}))
    assert status == 422
    shown = values(html)
    assert shown["lr"] == "0.00125"
    assert shown["name"] == "kept"
    assert f'id="{field}-error"' in html
    assert said in html[html.index(f'id="{field}-error"') :][:300]
    if field in shown:
        assert shown[field] == value


def test_what_is_missing_is_said(web: TestClient) -> None:
    status, _, html = send(web, "train", corpus="demo")
    assert status == 422
    assert 'id="model-error" role="alert">This is needed.' in html
    assert 'id="site.layer-error"' in html


def test_a_job_is_run_again_with_changes(web: TestClient, place: Settings) -> None:
    begun = TrainConfig(
        model="smollm2-135m", corpus="demo", site={"layer": 2}, lr=1 / 3, groups=(0.1, 0.2), arch="matryoshka", k=7
    )
    database = Database(place.url)
    with database.write() as session:
        store.create(session, "train-old-1", "train", "Old", begun.model_dump(mode="json"))
    database.close()
    assert 'href="/jobs/new/train?from=train-old-1"' in web.get("/jobs/train-old-1").text
    html = web.get("/jobs/new/train?from=train-old-1").text
    again = values(html) | {"model": "smollm2-135m", "corpus": "demo", "arch": "matryoshka"}
    assert filled(TrainConfig, again).config == begun
    assert "open" in html, "what differs from the defaults is seen at once"
    assert web.get("/jobs/new/harvest?from=train-old-1").status_code == 422


def test_what_is_typed_reads_back_as_the_same_config() -> None:
    cfg = TrainConfig(
        model="m", corpus="c", site={"layer": 1}, lr=0.1 + 0.2, sink_norm=None, harvests=({"tokens": 9}, {"bands": 2})
    )
    assert filled(TrainConfig, typed(cfg.model_dump(mode="json"))).config == cfg


def test_a_form_about_an_sae_begins_with_it(web: TestClient) -> None:
    html = web.get("/jobs/new/harvest?sae=smollm2-l17").text
    assert values(html)["saes"] == "smollm2-l17"
    assert web.get("/jobs/new/harvest?sae=nothing").status_code == 404
    assert web.get("/jobs/new/dance").status_code == 404


def test_a_failed_job_can_be_run_again(web: TestClient, place: Settings) -> None:
    database = Database(place.url)
    with database.write() as session:
        store.create(session, "train-bad-1", "train", "Bad", {})
        store.cancel(session, "train-bad-1")
    assert 'action="/jobs/train-bad-1/retry"' in web.get("/jobs/train-bad-1").text
    assert web.post("/jobs/train-bad-1/retry").headers["location"] == "/jobs/train-bad-1"
    with database.read() as session:
        assert store.get(session, "train-bad-1").status == "queued"
    database.close()


def test_a_newcomers_form_says_what_is_lacking(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path).prepare()
    database = Database(settings.url)
    database.upgrade()
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        text = Reader(client.get("/jobs/new/train").text).text
        assert "No model and no corpus is registered yet" in text
        assert "No worker has been heard from" in text
