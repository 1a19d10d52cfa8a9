"""Every route, as everybody: what is private is in no answer to a stranger, and nobody changes what they may not."""

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from pydantic import BaseModel

import server
from server.access import Needs
from server.app import create_app
from server.store.viewers import VISIBILITIES
from server.tables import Base
from tests.web.accounts import NAMES, WORD, Lab, lab_app, settle, visitors
from tests.web.conftest import at

STRANGERS = ("Ines", "Rita", "anonymous")
ASKED = (
    "", "?q=zebrafish", "?q=sae", "?in_list={list}", "?sae=private-sae", "?starred=true", "?author=Ola",
    "?a=private-sae&b=shared-sae", "?starred=true&q=label", "?saes=private-sae", "?from={job}", "?from=harvest-both",
    "?as=circuit-tracer", "?do=logit&after=1", "?go=pick%3Df3.3%401", "?figure=how-strongly-it-fires.svg", "?figure=none.svg",
)  # fmt: skip
"""Questions put to every address that reads them."""
UNSIGNED = {
    "/jobs/new/{kind}": {"from", "sae", "saes", "name"},
    **{
        f"{path}/circuit{twin}": {"as", "do", "go", "after", "name", "at"}
        for path, twin in product(("/saes/{sae}/features/{index}", "/prompts/{prompt_id}"), ("", ".json"))
    },
}
"""What routes take from the address by themselves, so that their signatures do not say it."""
OF_PAGES = {"figure", "scheme"}
"""What `reply.reply` takes so for every page."""
SENT = {
    "name": "x", "description": "x", "label": "x", "note": "x", "text": "x", "on": "1", "visibility": "public", "role": "admin",
    "password": "a long enough one", "way": "up", "answer": "yes", "back": "/", "author": "x",  # pragma: allowlist secret
}  # fmt: skip
ENDLESS = re.compile("/events$")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    unbounded = at(tmp_path_factory.mktemp("lab")).model_copy(update={"live_per_minute": 10_000})
    return settle(unbounded)  # a walk asks more in a minute than a person does, and 429 would hide what an answer tells


@pytest.fixture(scope="module")
def people(lab: Lab) -> Iterator[dict[str, TestClient]]:
    with visitors(lab_app(lab.settings)) as found:
        yield found


def routes(app: FastAPI) -> list[tuple[str, str, APIRoute]]:
    """(method, path, route) of all that can be asked."""
    found = []
    waiting: list[tuple[str, Any]] = [("", route) for route in app.routes]
    while waiting:
        before, route = waiting.pop(0)
        if isinstance(route, APIRoute):
            found += [(method, before + route.path_format, route) for method in sorted(route.methods or ())]
        elif (inner := getattr(route, "original_router", None)) is not None:
            # A router's own prefix is in its routes' paths, but not in those of the routers within it.
            waiting += [(before + ("" if isinstance(one, APIRoute) else inner.prefix), one) for one in inner.routes]
    return found


def address(lab: Lab, path: str, seen: str) -> str:
    """The route's path with names and numbers of what has this visibility."""
    source = f"{10 + VISIBILITIES.index(seen)}-{NAMES[seen]}"
    values = {
        "sae": NAMES[seen], "index": 3, "head": 0, "band": 0, "rank": 0, "list_id": lab.lists[seen],
        "entry_id": lab.entries[seen], "job_id": lab.jobs[seen], "job": lab.jobs[seen], "study_id": lab.studies[seen],
        "review_id": lab.reviews[seen], "harvest_id": lab.harvests[seen], "harvest": lab.harvests[seen],
        "prompt_id": lab.prompts[seen], "ticket": "a-ticket-of-nobody",
        "label_id": lab.labels[seen], "note_id": lab.notes[seen], "model": "smollm2-135m", "kind": "harvest",
        "model_id": "smollm2-135m", "layer": source, "source": source, "sweep_id": lab.jobs[seen],
    }  # fmt: skip
    return re.sub(r"\{(\w+)(?::\w+)?\}", lambda found: str(values.get(found[1], 3)), path)


def test_every_route_is_walked(lab: Lab) -> None:
    found = routes(lab_app(lab.settings))
    assert len({path for _, path, _ in found}) > 100
    assert {"/", "/saes/{sae}", "/api/v1/saes/{sae}", "/api/list/get", "/people", "/embed/saes/{sae}/features/{index}"} <= {
        re.sub(r":\w+\}", "}", path) for _, path, _ in found
    }


def test_the_word_is_there_for_whoever_may_see_it(lab: Lab, people: dict[str, TestClient]) -> None:
    for name in ("Ola", "Ada"):
        found = [address(lab, path, "private") for method, path, _ in routes(lab_app(lab.settings)) if method == "GET"]
        told = [one for one in found if not ENDLESS.search(one) and WORD in people[name].get(one).text.lower()]
        assert len(told) > 25, told


def read_by(route: APIRoute) -> set[str]:
    """Names of what the route reads of a query."""
    page = route.endpoint.__module__.startswith("server.pages")
    found = UNSIGNED.get(re.sub(r":\w+\}", "}", route.path_format), set()) | (OF_PAGES if page else set())
    for one in route.dependant.query_params:
        kind = one.field_info.annotation
        whole = isinstance(kind, type) and issubclass(kind, BaseModel)
        found |= {field.alias or name for name, field in kind.model_fields.items()} if whole else {one.alias}
    return found


def test_every_question_is_read_by_a_route(lab: Lab) -> None:
    found = routes(lab_app(lab.settings))
    assert set(UNSIGNED) <= {re.sub(r":\w+\}", "}", path) for _, path, _ in found}
    read = [read_by(route) for _, _, route in found]
    assert [one for one in ASKED if not any(set(parse_qs(one.removeprefix("?"))) <= names for names in read)] == []


def test_no_other_file_takes_from_the_address_what_no_signature_says() -> None:
    folder = Path(server.__file__).parent
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.py") if "query_params" in path.read_text(encoding="utf-8")}
    # The API refuses what its document does not name, and whoever comes back from another service's login brings its words.
    assert found == {"pages/start.py", "pages/circuit.py", "pages/reply.py", "api/common.py", "access.py"}


def test_a_form_and_a_figure_tell_whoever_may_see_it_what_the_address_asked_for(people: dict[str, TestClient]) -> None:
    for question in ("from=harvest-both", "sae=private-sae", "saes=private-sae,public-sae"):
        assert NAMES["private"] in people["Ola"].get(f"/jobs/new/harvest?{question}").text, question
    drawn = people["Ola"].get(f"/saes/{NAMES['private']}/features/3?figure=how-strongly-it-fires.svg")
    assert drawn.headers["content-type"] == "image/svg+xml"


@pytest.mark.parametrize("name", STRANGERS)
def test_no_answer_to_a_stranger_tells_of_what_is_private(lab: Lab, people: dict[str, TestClient], name: str) -> None:
    leaks, failed = [], []
    for (method, path, route), seen in product(routes(lab_app(lab.settings)), VISIBILITIES):
        alone = "{" not in path and seen != "private"  # asked once is enough
        if method != "GET" or alone or (ENDLESS.search(path) and seen != "private"):
            continue
        for question in ASKED:
            if not set(parse_qs(question.removeprefix("?"))) <= read_by(route):
                continue  # it would be the same as the bare address
            asked = address(lab, path, seen) + question.format(list=lab.lists["private"], job=lab.jobs["private"])
            answer = people[name].get(asked)
            said = answer.text + str(dict(answer.headers))
            # What was typed may be said again: the name in the address, and the word that was searched for.
            word = WORD in said.lower().replace("zebrafish", "", said.count("zebrafish") if "zebrafish" in question else 0)
            if word or (NAMES["private"] in said and NAMES["private"] not in asked):
                leaks.append((asked, answer.status_code))
            if answer.status_code >= 500 and "/studies/" not in path:  # the lab's studies have found too little to be drawn
                failed.append((asked, answer.status_code))
    assert leaks == []
    assert [one for one in failed if one[1] != 503] == []


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_not_seen_is_not_found(lab: Lab, people: dict[str, TestClient], name: str) -> None:
    of = re.compile(r"^/(?!api/(?!v1)).*\{(sae|list_id|job_id|job|study_id|review_id|harvest_id|harvest)(:\w+)?\}")
    found = {
        path: people[name].get(address(lab, path, "private")).status_code
        for method, path, _ in routes(lab_app(lab.settings))
        if method == "GET" and of.search(path)
    }
    assert len(found) > 40
    told = {path: status for path, status in found.items() if status not in (404, 405, 422)}
    # Who is not logged in is asked to, before it is looked whether there is such a thing.
    assert {path: status for path, status in told.items() if status not in (303, 401) or name != "anonymous"} == {}


@pytest.mark.parametrize(("name", "status"), [("Rita", 403), ("anonymous", 401)])
def test_whoever_may_not_change_things_is_refused(lab: Lab, people: dict[str, TestClient], name: str, status: int) -> None:
    before = snapshot(lab)
    for (method, path, route), seen in product(routes(lab_app(lab.settings)), VISIBILITIES):
        needed = getattr(route.endpoint, "needs", None)
        if method != "GET" and (needed is None or needed.role in ("editor", "admin")):
            answer = people[name].request(method, address(lab, path, seen), data=SENT)
            assert answer.status_code == status, (method, path, answer.text)
    assert snapshot(lab) == before


def test_only_marked_routes_are_less_than_an_editors(lab: Lab) -> None:
    marked: dict[str, Needs] = {
        f"{method} {path}": route.endpoint.needs
        for method, path, route in routes(lab_app(lab.settings))
        if method != "GET" and hasattr(route.endpoint, "needs") and not path.endswith("/")
    }
    assert {one for one, needed in marked.items() if needed.role == "nobody"} == {"POST /login", "POST /logout"}
    reads = {one for one, needed in marked.items() if needed.role == "anonymous"}
    assert reads == {
        "POST /author", "POST /api/v1/features/batch", "POST /api/features", "POST /api/features-offset",
        "POST /api/activation/get", "POST /api/list/get", "POST /api/list/list", "POST /api/explanation/search",
        "POST /api/explanation/search-model", "POST /api/explanation/search-all",
    }  # fmt: skip


def test_an_editor_changes_nothing_of_what_is_hidden(lab: Lab, people: dict[str, TestClient]) -> None:
    before = snapshot(lab)
    for method, path, _ in routes(lab_app(lab.settings)):
        if method != "GET" and path not in ("/logout", "/lists", "/api/v1/lists") and "/list/new" not in path:
            people["Ines"].request(method, address(lab, path, "private"), data={**SENT, "list": str(lab.lists["private"])})
            people["Ines"].request(method, address(lab, path, "private"), json={**SENT, "sae": NAMES["private"], "index": 3})
    assert snapshot(lab) == before


def test_batches_and_neuronpedia_ask_for_nothing_hidden(lab: Lab, people: dict[str, TestClient]) -> None:
    key, at_ = {"sae": NAMES["private"], "index": 3}, {"modelId": "smollm2-135m", "layer": f"10-{NAMES['private']}", "index": "3"}
    asked = (
        ("/api/v1/features/batch", {"features": [{"sae": NAMES["public"], "index": 3}, key]}),
        ("/api/features", [at_]),
        ("/api/features-offset", {"modelId": at_["modelId"], "layer": at_["layer"], "offset": 0}),
        ("/api/activation/get", {"modelId": at_["modelId"], "source": at_["layer"], "index": "3"}),
        ("/api/list/get", {"listId": lab.lists["private"]}),
        ("/api/list/list", {}),
        ("/api/explanation/search-all", {"query": "label", "saeReleaseNames": []}),
        ("/api/explanation/search-model", {"modelId": "smollm2-135m", "query": "label"}),
    )
    for path, body in asked:
        assert WORD in people["Ola"].post(path, json=body).text, path
        for name in STRANGERS:
            answer = people[name].post(path, json=body)
            assert WORD not in answer.text, (path, name)
            assert answer.status_code < 500, answer.text


def test_without_accounts_everything_is_seen(lab: Lab) -> None:
    with TestClient(create_app(lab.settings), base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        assert client.get(f"/saes/{NAMES['private']}").status_code == 200
        assert client.get("/people").status_code == 404


def snapshot(lab: Lab) -> dict[str, list[tuple[object, ...]]]:
    """Every row that people write, but for logins."""
    engine = sa.create_engine(lab.settings.url)
    left_out = ("login", "audit", "example", "feature", "context", "feature_detail", "feature_head", "feature_token")
    with engine.connect() as connection:
        rows = {
            name: [tuple(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key.columns))]
            for name, table in Base.metadata.tables.items()
            if name not in left_out
        }
    engine.dispose()
    return rows
