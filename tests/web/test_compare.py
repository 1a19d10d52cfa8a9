"""`/compare`: two SAEs, two features, two harvests."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from server import jobs
from server.app import create_app
from server.db import Database
from server.settings import Settings
from server.tables import SAE, Feature, Harvest, Study
from tests.web.conftest import at, put
from tests.web.factory import Shape, add_sae
from tests.web.reading import Reader

A, B = "smollm2-l17", "other-l17"
CONFIG = {
    "arch": "batchtopk", "d_in": 576, "d_sae": 60, "k": 32, "n_heads": 9, "d_head": 64, "site": {"layer": 17},
    "model": "smollm2-135m", "model_fingerprint": "f", "processing": {}, "scale": 1.0, "max_norm": None, "context": 64,
}  # fmt: skip


def side(name: str, alone: tuple[int, int]) -> dict[str, Any]:
    summary = {"against": name, "features": 55, "others": 55, "mean": 0.5, "median": 0.6, "above_07": 0.4, "above_09": 0.1,
               "mutual": 0.3, "mutual_mean": 0.9}  # fmt: skip
    return {
        "summary": summary,
        "counts": [0] * 38 + [5, 50],
        "apart": 1,
        "alone": [{"a": alone[0], "b": alone[1], "cosine": 0.21}],
    }


RESULT = {
    "summary": "2 mutual pairs", "ours": side(B, (11, 12)), "theirs": side(A, (13, 14)), "mutual": 2, "notes": ["a note"],
    "best": [{"a": 3, "b": 4, "cosine": 0.98}], "spread": [{"a": 3, "b": 4, "cosine": 0.98}, {"a": 5, "b": 6, "cosine": 0.4}],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    settings = put(at(tmp_path_factory.mktemp("compare")))
    database = Database(settings.url)
    jobs.upgrade(settings, database)
    with database.write() as session:
        add_sae(session, Shape(sae=B, seed=1, running_job=False))
        add_sae(session, Shape(sae="far-l3", seed=2, layer=3, n_features=12, n_dead=1, running_job=False))
        for sae in session.scalars(sa.select(SAE)):
            sae.config = CONFIG | {"site": {"layer": sae.layer}}
    database.close()
    return settings


@pytest.fixture(scope="module")
def web(place: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(place), base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        yield client


def post(web: TestClient, **fields: str) -> Any:
    return web.post("/compare", content=urlencode(fields), headers={"content-type": "application/x-www-form-urlencoded"})


def test_nothing_chosen_offers_what_there_is(web: TestClient) -> None:
    options = [option.get("value") for option in Reader(web.get("/compare").text).all("option")]
    assert {A, B, "far-l3"} <= set(options)


def test_two_saes_are_matched_by_a_job_that_runs_once(web: TestClient) -> None:
    page = web.get(f"/compare?a={A}&b={B}").text
    assert "Match their features" in page
    first = post(web, a=A, b=B)
    assert first.status_code == 303
    assert first.headers["location"].startswith("/jobs/compare-")
    assert post(web, a=A, b=B).headers["location"] == first.headers["location"]
    assert web.get(first.headers["location"]).status_code == 200


def test_saes_of_different_sites_are_not_matched(web: TestClient) -> None:
    assert "different sites" in web.get(f"/compare?a={A}&b=far-l3").text
    refused = post(web, a=A, b="far-l3")
    assert refused.status_code == 422
    assert "choose two SAEs of one site" in refused.text
    assert "choose two SAEs" in post(web, a=A, b=A).text


def test_what_the_job_found_is_shown_from_both_sides(web: TestClient, place: Settings) -> None:
    database = Database(place.url)
    with database.write() as session:
        sae = session.scalars(sa.select(SAE).where(SAE.name == A)).one()
        config = {"sae": A, "against": B}
        session.add(
            Study(job_id="c1", kind="compare", title="t", model_id=sae.model_id, sae_id=sae.id, config=config, result=RESULT)
        )
    database.close()
    page = web.get(f"/compare?a={A}&b={B}").text
    assert f'href="/saes/{A}/features/11"' in page
    assert f'href="/saes/{B}/features/13"' in page
    assert f"a={A}%3A3&amp;b={B}%3A4" in page
    assert "a note" in page
    there = web.get(f"/compare.json?a={B}&b={A}").json()["saes"]["matched"]
    assert there["swapped"]
    assert there["result"]["best"] == [{"a": 4, "b": 3, "cosine": 0.98}]
    assert there["result"]["ours"] == RESULT["theirs"]
    turned = web.get(f"/compare?a={B}&b={A}").text
    assert f'href="/saes/{B}/features/13"' in turned
    assert web.get("/studies/1").headers["location"] == f"/compare?a={A}&b={B}"
    assert web.get("/studies").status_code == 200


def test_two_features_stand_side_by_side(web: TestClient) -> None:
    page = web.get(f"/compare.json?a={A}:3&b={B}:5").json()["features"]
    assert (page["a"]["index"], page["b"]["index"], page["cosine"]) == (3, 5, None)
    near = web.get(f"/compare.json?a={A}:3&b={A}:5").json()["features"]
    assert near["cosine"] == 0.76  # as the factory has it for the second neighbour
    assert web.get(f"/compare?a={A}:3&b={A}:5").text.count('class="example"') == 8
    assert web.get(f"/compare?a={A}:3&b={B}").status_code == 422
    assert web.get(f"/compare?a={A}:x&b={B}:1").status_code == 422
    assert web.get(f"/compare?a={A}:7&b={A}:8").status_code == 200  # a dead one


def test_two_harvests_of_an_sae_are_compared(web: TestClient, place: Settings) -> None:
    assert "one harvest" in web.get(f"/compare?sae={A}").text
    database = Database(place.url)
    with database.write() as session:
        old = session.scalars(sa.select(Harvest).where(Harvest.job_id == f"harvest-{A}")).one()
        kept = ("sae_id", "corpus_id", "config", "n_rows", "context")
        fields = {name: getattr(old, name) for name in kept}
        new = Harvest(job_id="h2", status="replaced", n_tokens=5, n_live=3, published_at=datetime.now(UTC), **fields)
        session.add(new)
        session.flush()
        live = sa.select(Feature).where(Feature.harvest_id == old.id, Feature.n_fired > 0, Feature.idx < 5)
        for row in session.scalars(live).all():
            values = {column.key: getattr(row, column.key) for column in sa.inspect(Feature).columns if column.key != "id"}
            session.add(Feature(**values | {"harvest_id": new.id, "density": row.density * 3 if row.idx == 2 else row.density}))
        ids = (old.id, new.id)
    database.close()
    found = web.get(f"/compare.json?sae={A}&harvest={ids[0]}&other={ids[1]}").json()["harvests"]
    assert (found["a"]["id"], found["b"]["id"], found["both"], found["only_a"], found["only_b"]) == (*ids, 5, 50, 0)
    assert found["changes"][0]["index"] == 2
    assert found["changes"][0]["b"] == pytest.approx(3 * found["changes"][0]["a"])
    assert sum(bar["count"] for bar in found["a"]["density"]) == 55
    assert "replaced" in web.get(f"/compare?sae={A}").text
    assert "has no harvest 99" in web.get(f"/compare?sae={A}&harvest=99").text
