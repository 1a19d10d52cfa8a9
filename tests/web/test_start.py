"""Forms that start jobs: made from the configs, nothing lost when refused, filled from a job that was run before."""

from collections.abc import Iterator
from html import unescape
from pathlib import Path
from urllib.parse import urlencode

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from sae_core.config import (
    CompareJob,
    Config,
    EvaluateJob,
    HarvestConfig,
    HarvestJob,
    HeadsStudy,
    InductionProxy,
    InductionStudy,
    IoiStudy,
    PrefixStudy,
    RegexProxy,
    Site,
    SpecificityStudy,
    SweepConfig,
    TokensProxy,
    TrainConfig,
)
from server import jobs
from server.app import create_app
from server.db import Database
from server.forms import filled, typed
from server.pages import start
from server.settings import Settings
from server.store import jobs as store
from server.tables import SAE as SAE_TABLE
from tests.web.conftest import at, put
from tests.web.factory import Shape
from tests.web.reading import Reader
from tests.web.test_compare import CONFIG

TRAIN = {"model": "smollm2-135m", "corpus": "demo", "site.layer": "3"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = put(at(tmp_path_factory.mktemp("start")), Shape(n_features=12, n_dead=1))
    database = Database(settings.url)
    jobs.upgrade(settings, database)
    with database.write() as session:
        session.execute(sa.update(SAE_TABLE).values(config=CONFIG))
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
    """What a browser would send of the form: of a select the chosen option, else its first."""
    found: dict[str, str] = {}
    select: str | None = None
    for tag, attributes, text in options(html):
        if tag == "input" and "name" in attributes and attributes.get("type") != "hidden":
            found[attributes["name"]] = attributes["value"]
        elif tag == "select":
            select = attributes["name"]
        elif tag == "option" and select is not None and "value" not in attributes:
            if "selected" in attributes:
                found[select] = text
            found.setdefault(select, text)
    return found


def options(html: str) -> Iterator[tuple[str, dict[str, str], str]]:
    """Elements with the text that follows each."""
    for part in html.split("<")[1:]:
        tag = Reader(f"<{part}")
        for name, attributes in tag.elements:
            yield name, attributes, unescape(part.partition(">")[2])


def test_the_form_has_every_field_of_the_config_with_its_words(web: TestClient) -> None:
    html = web.get("/jobs/new/train").text
    words = Reader(html).text
    for name, info in TrainConfig.model_fields.items():
        if name not in ("site", "rows", "harvests"):
            assert f'name="{name}"' in html
            assert (info.description or "")[:20].replace("`", "") in words
    for name in ("site.layer", "rows.context", "harvests.0.top_k"):
        assert f'name="{name}"' in html


SAE = {"sae": "smollm2-l17", "corpus": "demo"}
NEEDED = {
    "train": TRAIN,
    "sweep": {f"base.{name}": value for name, value in TRAIN.items()} | {"base.harvests": "0"},
    "harvest": {"saes": "smollm2-l17", "corpus": "demo"},
    "evaluate": SAE,
    "compare": {"sae": "smollm2-l17", "against": "other"},
    "specificity": SAE | {"feature": "3", "proxies.0.texts": " board, Board"},
    "induction": {"model": "smollm2-135m"},
    "heads": {"model": "smollm2-135m"},
    "ioi": {"sae": "smollm2-l17"},
    "prefix": {"sae": "smollm2-l17"},
}


@pytest.mark.parametrize("kind", start.KINDS)
def test_a_form_sent_as_it_came_gives_the_defaults(web: TestClient, kind: str) -> None:
    model = start.KINDS[kind].model
    sent = values(web.get(f"/jobs/new/{kind}").text) | NEEDED[kind]
    result = filled(model, sent)
    assert result.errors == {}
    assert result.config == filled(model, NEEDED[kind]).config


def examples() -> Iterator[tuple[str, Config]]:
    """Configs of each kind in which much differs from the defaults."""
    train = TrainConfig(model="smollm2-135m", corpus="demo", site=Site(layer=2))
    yield "train", train.model_copy(update={"harvests": ()})
    yield "train", train.model_copy(update={"harvests": (HarvestConfig(tokens=9), HarvestConfig(bands=2), HarvestConfig())})
    each = {"relu": {"lr": 1 / 3}}
    yield "sweep", SweepConfig(base=train, layers=(3, 4), archs=("relu", "topk"), ks=(7, 9), each=each)
    yield "sweep", SweepConfig(base=train.model_copy(update={"harvests": ()}), layers="all")
    yield "harvest", HarvestJob(saes=("smollm2-l17",), corpus="demo", harvest=HarvestConfig(tokens=77))
    yield "evaluate", EvaluateJob(sae="smollm2-l17", corpus="demo", against=("a", "b"))
    yield "compare", CompareJob(sae="smollm2-l17", against="other")
    proxies = (
        InductionProxy(texts=(" board", "a,b\\", "\n")),
        RegexProxy(pattern="[.!?]{1,2} ", on="token", negated=True),
        TokensProxy(texts=(" ",)),
    )
    yield "specificity", SpecificityStudy(sae="smollm2-l17", feature=3, corpus="demo", proxies=proxies, bins=7)
    yield "induction", InductionStudy(model="smollm2-135m", layers=(1, 2), corpus="demo", samples=7)
    yield "ioi", IoiStudy(sae="smollm2-l17", samples=10, words=("or",), layers=(4, 5))
    yield "prefix", PrefixStudy(sae="smollm2-l17", prefixes=4)
    yield "heads", HeadsStudy(model="smollm2-135m", vocabulary=99)


@pytest.mark.parametrize(("kind", "config"), list(examples()), ids=lambda one: one if isinstance(one, str) else one.hash())
def test_a_job_of_any_kind_run_again_is_the_same_job(web: TestClient, place: Settings, kind: str, config: Config) -> None:
    job_id = f"{kind}-again-{config.hash()}"
    stored = config.model_dump(mode="json")
    database = Database(place.url)
    with database.write() as session:
        store.create(session, job_id, "study" if "kind" in stored else kind, "Again", stored)
    database.close()
    assert f'href="/jobs/new/{kind}?from={job_id}"' in web.get(f"/jobs/{job_id}").text
    assert filled(type(config), values(web.get(f"/jobs/new/{kind}?from={job_id}").text)).config == config


@pytest.mark.parametrize(
    ("kind", "starts"),
    [
        ("sweep", "sweep-"),
        ("specificity", "study-"),
        ("induction", "study-"),
        ("heads", "study-"),
        ("ioi", "study-"),
        ("prefix", "study-"),
    ],
)
def test_a_job_of_any_kind_is_queued(web: TestClient, kind: str, starts: str) -> None:
    listed = {"ks": "16,32"} if kind == "sweep" else {}
    status, where, html = send(web, kind, **NEEDED[kind], **listed)
    assert (status, where.startswith(f"/jobs/{starts}")) == (303, True), Reader(html).text


def test_as_many_conditions_as_are_asked_for_have_inputs(web: TestClient) -> None:
    html = web.get("/jobs/new/specificity?sae=smollm2-l17&feature=3&proxies=2&name=&tokens_swept=99").text
    shown = values(html)
    assert {"proxies.0.kind", "proxies.1.kind", "proxies.1.pattern"} <= set(shown)
    assert "proxies.2.kind" not in shown
    assert (shown["feature"], shown["tokens_swept"]) == ("3", "99")
    buttons = Reader(html[html.index('class="start"') :]).all("button")
    assert "formmethod" not in buttons[0], "what Enter presses starts the job"
    assert "formmethod" in buttons[1]


@pytest.mark.parametrize(
    ("kind", "sent", "field", "said"),
    [
        (
            "specificity",
            {"proxies.0.kind": "regex", "proxies.0.pattern": "(", "proxies.0.texts": ""},
            "proxies.0",
            "no regular expression",
        ),
        ("specificity", {"proxies.0.kind": "regex", "proxies.0.texts": ""}, "proxies.0.pattern", "This is needed."),
        ("specificity", {"proxies.0.pattern": "x"}, "proxies.0.pattern", "leave it empty"),
        ("specificity", {"proxies": "many"}, "proxies", "valid tuple"),
        ("specificity", {"proxies": "0", "proxies.0.texts": ""}, "proxies", "at least 1"),
        ("specificity", {"feature": "4096"}, "feature", "no feature 4096"),
        ("sweep", {"ks": "16,16"}, "ks", "lists a value twice"),
        ("sweep", {"each": "{"}, "each", "valid dictionary"),
        ("sweep", {"base.warmup": "0.9", "base.decay": "0.9", "ks": "1,2"}, "base.warmup", "more than the whole run"),
        ("induction", {"length": "16"}, "length", "no room for a prefix"),
        ("heads", {"layers": "1,44"}, "", "there is no layer 44"),
    ],
)
def test_what_is_wrong_with_any_kind_stands_beside_its_input(
    web: TestClient, kind: str, sent: dict[str, str], field: str, said: str
) -> None:
    status, _, html = send(web, kind, **(NEEDED[kind] | sent))
    assert status == 422
    assert said in (html[html.index(f'id="{field}') :] if field else html)


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
    assert filled(TrainConfig, typed(TrainConfig, cfg.model_dump(mode="json"))).config == cfg


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
        assert "No model is registered yet" in Reader(client.get("/jobs/new/heads").text).text, "text is left to them"
        for kind in start.KINDS:
            assert client.get(f"/jobs/new/{kind}").status_code == 200, kind


def test_how_a_job_is_done_is_asked_for_by_form_and_api(web: TestClient, place: Settings) -> None:
    status, address, _ = send(
        web, "train", **TRAIN, name="urgent", **{"how.priority": "1", "how.only_on": "cuda", "how.time_limit": "90"}
    )
    assert status == 303
    wished = {"priority": 2, "only_on": "cpu", "time_limit": 60}
    config = {"model": "smollm2-135m", "corpus": "demo", "site": {"layer": 3}}
    made = web.post("/api/v1/jobs", json={"kind": "train", "config": config, "name": "by-api", "how": wished})
    assert made.status_code == 201, made.text
    usual = web.post("/api/v1/jobs", json={"kind": "train", "config": config, "name": "as-usual"}).json()
    database = Database(place.url)
    with database.read() as session:
        job = store.get(session, address.removeprefix("/jobs/"))
    database.close()
    assert (job.priority, job.only_on, job.time_limit) == (1, "cuda", 90)
    assert {name: made.json()[name] for name in wished} == wished
    assert (usual["priority"], usual["only_on"], usual["time_limit"]) == (5, None, None)


def test_a_priority_that_is_none_is_refused_beside_its_input(web: TestClient) -> None:
    status, _, html = send(web, "train", **TRAIN, name="x", **{"how.priority": "12"})
    assert status == 422
    assert 'id="how.priority-error"' in html
    assert 'value="12"' in html
    assert web.post("/api/v1/jobs", json={"kind": "train", "config": {}, "how": {"priority": 0}}).status_code == 422
