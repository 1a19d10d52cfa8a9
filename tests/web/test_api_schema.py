"""The API is what its document says: schemathesis asks every route for what the document allows, and for what it does not."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import requests
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from schemathesis import BaseSchema, Case, Config, Response
from schemathesis.openapi import from_dict

from server.api.common import EXAMPLES, PREFIX
from server.api.described import WORDS
from server.api.v1 import DOCUMENT
from server.app import create_app
from server.circuits.asked import CircuitQuestion
from server.live import InLine, PromptQuestion, SteerQuestion
from server.settings import Settings
from tests.web.api_examples import CALLS, Answers, recorded
from tests.web.conftest import at, listened, put, queued
from tests.web.factory import Shape

THERE = {
    "path.sae": "smollm2-l17", "path.index": 3, "path.head": 4, "path.model": "smollm2-135m", "path.harvest": 1,
    "path.job": "train-smollm2-l17-1", "path.list_id": 1, "path.entry_id": 1, "path.label_id": 1, "path.note_id": 1,
    "header.X-Author": "Maren",
}  # fmt: skip
"""Names and numbers of what is there, so that routes are not only asked for what is not."""
REFUSALS = ["2xx", "3xx", "400", "403", "404", "409", "415", "422", "5xx"]
"""A question of the right form may still be about what cannot be: a head that the SAE lacks, a filter that needs a head, a
config whose parts do not fit. 422 says so, and names the field."""
AWAY = {"include-path-regex": f"^{PREFIX}/live/", "checks": {"not_a_server_error": {"expected-statuses": ["2xx", "4xx", "503"]}}}
"""No engine runs here, and live questions say so."""

LARGE = {"include-operation-id": "create_job", "generation": {"mode": "positive"}}
"""To spoil each of a hundred fields of a job's config in turn takes minutes; `test_api_writing.py` spoils some."""


def loaded(parameters: dict[str, object]) -> BaseSchema:
    """What the document says, to be asked for with some parameters given."""
    acceptance = {"positive_data_acceptance": {"expected-statuses": REFUSALS}}
    return from_dict(
        DOCUMENT.openapi, config=Config.from_dict({"checks": acceptance, "operations": [AWAY, LARGE], "parameters": parameters})
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The web process, really listening, on a filled database with a list, a label, a note and a queue."""
    settings = queued(put(at(tmp_path_factory.mktemp("schema")), Shape(n_features=24, n_dead=2, running_job=False)))
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", headers={"X-Author": "Maren"}) as client:
        of = f"{PREFIX}/saes/smollm2-l17/features/3"
        for path, body in (
            (f"{PREFIX}/lists", {"name": "Tides"}),
            (f"{PREFIX}/lists/1/entries", {"sae": "smollm2-l17", "index": 3}),
            (f"{of}/labels", {"text": "tides"}),
            (f"{of}/notes", {"text": "Comes back."}),
        ):
            assert client.post(path, json=body).status_code == 201
    yield from listened(settings)


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    """Keeps the connection."""
    with requests.Session() as session:
        yield session


def test_the_document_is_the_one_that_is_served(client: TestClient) -> None:
    assert client.get(f"{PREFIX}/openapi.json").json() == DOCUMENT.openapi
    assert DOCUMENT.openapi["openapi"].startswith("3.1")


def test_every_route_has_words_and_an_example_that_its_schema_allows() -> None:
    components = {"components": DOCUMENT.openapi["components"]}
    for operations in DOCUMENT.openapi["paths"].values():
        for one in operations.values():
            assert one["summary"]
            assert one["description"]
            answer = next(reply for status, reply in one["responses"].items() if status.startswith("2"))
            if "application/json" in answer["content"]:
                said = answer["content"]["application/json"]
                jsonschema_rs.validator_for(said["schema"] | components).validate(said["example"])


def test_every_field_and_every_parameter_says_what_it_means() -> None:
    document = DOCUMENT.openapi
    lacking = [
        f"{name}.{field}"
        for name, schema in document["components"]["schemas"].items()
        for field, one in schema.get("properties", {}).items()
        if not one.get("description", "").strip()
    ]
    lacking += [
        f"{operation['operationId']}: {one['name']}"
        for operations in document["paths"].values()
        for operation in operations.values()
        for one in operation.get("parameters", ())
        if not one.get("description", "").strip()
    ]
    assert lacking == []


def test_no_word_is_explained_that_no_field_has() -> None:
    known = {field for schema in DOCUMENT.openapi["components"]["schemas"].values() for field in schema.get("properties", ())}
    assert set(WORDS) - known == set()


def test_answers_have_an_etag_where_the_document_says_so_and_nowhere_else(client: TestClient) -> None:
    for path, operations in DOCUMENT.openapi["paths"].items():
        if "get" not in operations or path.endswith(("/export", "/events")):
            continue
        one = operations["get"]
        at = path
        for name, value in THERE.items():
            at = at.replace("{" + name.removeprefix("path.") + "}", str(value))
        asked = client.get(at, params={"q": "tide"} if "search" in path else None)
        if asked.status_code == 404:  # no list or shared text is there to read
            assert path.startswith((f"{PREFIX}/lists/", f"{PREFIX}/prompts/")), at
            continue
        headers = [parameter["name"] for parameter in one.get("parameters", ()) if parameter["in"] == "header"]
        said = [status for status, reply in one["responses"].items() if "ETag" in reply.get("headers", {})]
        if "ETag" in asked.headers:
            assert (headers, said) == (["If-None-Match"], ["200", "304"]), path
            again = client.get(asked.url, headers={"If-None-Match": f'"other", {asked.headers["ETag"]}'})
            assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", asked.headers["ETag"])
        else:
            assert (headers, said, "304" in one["responses"]) == ([], [], False), path


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every route answers, whole, by its operation's id."""
    return recorded(tmp_path_factory.mktemp("answers"))


def test_examples_have_the_fields_that_are_answered(answers: dict[str, Any]) -> None:
    known = json.loads(EXAMPLES.read_text(encoding="utf-8"))
    assert {name: sorted(answer) for name, answer in answers.items()} == {name: sorted(answer) for name, answer in known.items()}


def closed(schema: Any) -> Any:
    """A schema whose objects have no other fields than those that it names."""
    if isinstance(schema, list):
        return list(map(closed, schema))
    if not isinstance(schema, dict):
        return schema
    named = {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else {}
    return named | {key: closed(value) for key, value in schema.items()}


def documented(operation: str) -> Any:
    """What tells whether a body is, field by field, what the document says of the operation's answer."""
    every = (one for operations in DOCUMENT.openapi["paths"].values() for one in operations.values())
    found = next(one for one in every if one["operationId"] == operation)
    answer = next(reply for status, reply in found["responses"].items() if status.startswith("2"))
    components = {"schemas": closed(DOCUMENT.openapi["components"]["schemas"])}
    return jsonschema_rs.validator_for(closed(answer["content"]["application/json"]["schema"]) | {"components": components})


def test_every_answer_has_the_fields_that_the_document_names_and_no_other(answers: dict[str, Any]) -> None:
    live = {one["operationId"] for path, of in DOCUMENT.openapi["paths"].items() if "/live/" in path for one in of.values()}
    assert live <= set(answers), "no engine runs where schemathesis asks, so this is where live answers are seen"
    for operation, body in answers.items():
        documented(operation).validate(body)
        assert not documented(operation).is_valid({**body, "of_nobody": 1}), operation
        assert not documented(operation).is_valid(dict(list(body.items())[1:])), operation


class AtOnce(Answers):
    """An engine that has answered as soon as it is asked."""

    def leave(self, ticket: str, question: PromptQuestion, wait: float) -> InLine:
        return super().leave(ticket, question, max(wait, 1.0)).model_copy(update={"place": None})

    def leave_steer(self, ticket: str, question: SteerQuestion, wait: float) -> InLine:
        return super().leave_steer(ticket, question, max(wait, 1.0)).model_copy(update={"place": None})

    def leave_circuit(self, ticket: str, question: CircuitQuestion, wait: float) -> InLine:
        return super().leave_circuit(ticket, question, max(wait, 1.0)).model_copy(update={"place": None})


@pytest.mark.parametrize(
    ("operation", "kind"), [("leave_prompt", "answer"), ("leave_steer", "steered"), ("leave_circuit", "circuit")]
)
def test_an_answer_in_the_line_is_the_one_that_the_document_describes(filled: Settings, operation: str, kind: str) -> None:
    app = create_app(filled)
    app.state.live = AtOnce()
    (method, path, question) = next(call[1:] for call in CALLS if call[0] == operation)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        body = client.request(method, f"{PREFIX}{path}", json=question).json()
    assert {name for name in ("answer", "steered", "circuit") if body[name] is not None} == {kind}
    assert body["place"] is None
    documented(operation).validate(body)


def names_a_field(answer: Response) -> None:
    """A refusal says which parameter or field is wrong."""
    if answer.status_code == 422:
        assert answer.json()["error"]["field"] is not None, answer.text


PATIENCE = 60
"""Seconds: how busy this machine is says nothing of the API."""
FEW = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
FEWER = settings(FEW, max_examples=2)


@loaded(dict(THERE)).parametrize()
@FEW
def test_what_is_there_answers_as_the_document_says(case: Case, site: str, session: requests.Session) -> None:
    names_a_field(case.call_and_validate(base_url=site, session=session, timeout=PATIENCE))


@loaded({}).parametrize()
@FEWER
def test_whatever_is_asked_is_answered_as_the_document_says(case: Case, site: str, session: requests.Session) -> None:
    names_a_field(case.call_and_validate(base_url=site, session=session, timeout=PATIENCE))
