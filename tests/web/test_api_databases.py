"""Both databases give scripts the same answers: every route that reads is asked on SQLite and on PostgreSQL."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.api.common import PREFIX
from server.api.v1 import DOCUMENT
from server.app import create_app
from server.db import Database
from server.settings import Settings
from server.store import search
from server.store.features import SORT_KEYS
from tests.keeping.conftest import new_database
from tests.web.conftest import at, put
from tests.web.factory import Shape
from tests.web.test_api_schema import THERE

FEATURES = f"{PREFIX}/saes/smollm2-l17/features"
WAYS = (
    *(f"{FEATURES}?sort={sign}{key}&limit=7" for key in SORT_KEYS if "share" not in key for sign in ("", "-")),
    *(f"{FEATURES}?head=4&{way}&limit=7" for way in ("sort=-head_share", "sort=dfa_share", "leads=true", "min_share=0.1")),
    *(f"{FEATURES}?{way}" for way in ("family=induction", "dead=true", "min_density=0.001&max_density=0.01")),
    *(f"{FEATURES}?{way}" for way in ("label=tide", "labelled=true")),
    *(f"{FEATURES}/export?include=examples,dfa,logits&all_examples=true&sort={key}" for key in ("idx", "-max")),
    *(f"{PREFIX}/saes/smollm2-l17/search?kind={kind}&q=tide" for kind in search.KINDS),
    f"{PREFIX}/search?q=tide",
    "/api/feature/smollm2-135m/17-smollm2-l17/3",
    "/api/source-set/smollm2-135m/smollm2-l17",
)  # fmt: skip
KEYS = [{"sae": "smollm2-l17", "index": index} for index in (3, 1, 3, 20)]
ASKED = (
    (f"{PREFIX}/features/batch", {"features": KEYS, "include": "dfa,others"}),
    ("/api/features", [{"modelId": "smollm2-135m", "layer": "17-smollm2-l17", "index": "3", "maxActsToReturn": 4}]),
    ("/api/features-offset", {"modelId": "smollm2-135m", "layer": "17-smollm2-l17", "offset": 2}),
    ("/api/activation/get", {"modelId": "smollm2-135m", "source": "17-smollm2-l17", "index": "3"}),
    ("/api/explanation/search", {"modelId": "smollm2-135m", "layers": ["17-smollm2-l17"], "query": "tides"}),
)  # fmt: skip


NOTHING = (f"{PREFIX}/live/", f"{PREFIX}/prompts/")
"""Questions that an engine answers, and texts under ids drawn at random, which have a test of their own."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, postgres: sa.URL) -> Iterator[tuple[TestClient, TestClient]]:
    """The same features, labels and lists on SQLite and on PostgreSQL."""
    settings = [at(tmp_path_factory.mktemp("sqlite")), at(tmp_path_factory.mktemp("postgres"))]
    settings[1] = settings[1].model_copy(update={"database_url": new_database(postgres)})
    with _filled(settings[0]) as one, _filled(settings[1]) as other:
        yield one, other


def _filled(settings: Settings) -> TestClient:
    database = Database(settings.url)
    database.upgrade()
    database.close()
    put(settings, Shape(n_features=24, n_dead=2, running_job=False))
    database = Database(settings.url)
    search.write(database, 1, search.unfenced)
    database.close()
    client = TestClient(create_app(settings), base_url="http://127.0.0.1:8000", headers={"X-Author": "Maren"})
    for path, body in (
        (f"{PREFIX}/lists", {"name": "Tides"}),
        (f"{PREFIX}/lists/1/entries", {"sae": "smollm2-l17", "index": 3}),
        (f"{FEATURES}/3/labels", {"text": "tides"}),
        (f"{FEATURES}/3/notes", {"text": "Comes back."}),
    ):
        assert client.post(path, json=body).status_code == 201, path
    return client


def timeless(value: Any) -> Any:
    """Without the times at which things were made, which differ, and with numbers as far as both databases keep them."""
    if isinstance(value, dict):
        return {
            name: timeless(one) for name, one in value.items() if name != "at" and not name.endswith(("_at", "At", "seconds"))
        }
    if isinstance(value, float):
        return float(f"{value:.12g}")
    return [timeless(one) for one in value] if isinstance(value, list) else value


def said(answer: Any) -> Any:
    if answer.headers["content-type"].startswith("application/jsonl"):
        return [timeless(json.loads(line)) for line in answer.text.splitlines()]
    return timeless(answer.json())


def routes() -> list[str]:
    """Every route of the document that reads, about what is there."""
    found = []
    for path, operations in DOCUMENT.openapi["paths"].items():
        if "get" in operations and not path.endswith(("/export", "/events", "/search")) and not path.startswith(NOTHING):
            for name, value in THERE.items():
                path = path.replace("{" + name.removeprefix("path.") + "}", str(value))
            found.append(path)
    return found


def test_no_word_of_a_written_harvest_waits_to_be_put_into_the_index(both: tuple[TestClient, TestClient]) -> None:
    app = both[1].app
    assert isinstance(app, FastAPI)
    with app.state.db.write() as session:
        session.execute(sa.text("create extension if not exists pgstattuple"))
        assert session.execute(sa.text("select count(*) from context_text")).scalar_one() > 0
        assert session.scalar(sa.text("select pending_tuples from pgstatginindex('ix_context_text_words')")) == 0


@pytest.mark.parametrize("address", [*routes(), *WAYS])
def test_a_route_reads_the_same_from_both(both: tuple[TestClient, TestClient], address: str) -> None:
    one, other = (client.get(address) for client in both)
    assert one.status_code == other.status_code == 200, (one.text, other.text)
    assert said(one) == said(other)
    assert len(one.content) > 2


@pytest.mark.parametrize(("address", "body"), ASKED)
def test_a_question_with_a_body_is_answered_the_same_from_both(
    both: tuple[TestClient, TestClient], address: str, body: Any
) -> None:
    one, other = (client.post(address, json=body) for client in both)
    assert one.status_code == other.status_code == 200, (one.text, other.text)
    assert said(one) == said(other)


def test_a_shared_text_is_read_the_same_from_both(both: tuple[TestClient, TestClient]) -> None:
    shared = {"text": "The tide came back.", "saes": ["smollm2-l17"], "feature": {"sae": "smollm2-l17", "index": 3, "dest": 2}}
    read = []
    for client in both:
        made = client.post(f"{PREFIX}/prompts", json=shared)
        assert made.status_code == 201, made.text
        found = client.get(made.headers["Location"]).json()
        assert found == made.json()
        assert found["line"].pop("id") == made.headers["Location"].rpartition("/")[2]
        assert found["line"]["expires_at"] > found["line"]["created_at"]
        read.append(timeless(found))
    assert read[0] == read[1]
    assert read[0]["text"] == shared["text"]
