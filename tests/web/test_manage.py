"""SAEs and harvests described, renamed, archived, deleted."""

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from sae_core.errors import NotFound
from server.db import Database
from server.settings import Settings
from server.store import registry
from server.tables import SAE as Row
from server.tables import Base, Harvest, Job
from tests.web.conftest import SAE
from tests.web.factory import METRICS
from tests.web.reading import Reader

NEW = "/saes/induction-l17"


@pytest.fixture
def db(peopled: Settings) -> Database:
    return Database(peopled.url)


def rename(client: TestClient, name: str, description: str = "") -> int:
    return client.post(f"{SAE}/manage", data={"name": name, "description": description}).status_code


def test_a_former_name_leads_to_the_same_page_with_its_query_whatever_the_page(maren: TestClient) -> None:
    assert rename(maren, "induction-l17") == 303
    for old, new in (
        (SAE, NEW),
        (f"{SAE}?head=3&leads=true", f"{NEW}?head=3&leads=true"),
        (f"{SAE}.json", f"{NEW}.json"),
        (f"{SAE}/features/3.json", f"{NEW}/features/3.json"),
        (f"{SAE}/features/3/labels", f"{NEW}/features/3/labels"),
    ):
        answer = maren.get(old)
        assert (answer.status_code, answer.headers["location"]) == (307, new)
        assert maren.get(new).status_code == 200
    written = maren.post(f"{SAE}/features/3/labels", data={"label": "dates"}, follow_redirects=True)
    assert written.status_code == 200
    assert maren.get("/labels.json").json()["lines"][0]["sae"] == "induction-l17"
    assert maren.get("/saes/never").status_code == 404


def test_names_go_there_and_back_and_a_name_in_use_is_refused(maren: TestClient, db: Database) -> None:
    for name in ("induction-l17", "second"):
        maren.post(f"{SAE}/manage", data={"name": name}, follow_redirects=True)
    assert maren.get("/saes/second/manage.json").json()["former_names"] == ["smollm2-l17", "induction-l17"]
    assert maren.get(SAE).headers["location"] == "/saes/second"
    maren.post("/saes/second/manage", data={"name": "smollm2-l17"})
    assert maren.get(SAE).status_code == 200
    assert maren.get("/saes/second").headers["location"] == SAE
    with db.read() as session:
        assert {"second", "induction-l17", "smollm2-l17"} == registry.sae_names(session), "no new SAE takes one of them"
        assert registry.metrics(session, "second") == METRICS, "a job that knows it by that name finds it"
        with pytest.raises(NotFound):
            registry.metrics(session, "never")


@pytest.mark.parametrize("name", ["", "a/b", "../x", "x.json", "-x", "x" * 101, "a b", "é"])
def test_a_name_that_no_address_could_hold_is_refused_and_kept_in_the_box(maren: TestClient, name: str) -> None:
    answer = maren.post(f"{SAE}/manage", data={"name": name, "description": "kept"})
    assert answer.status_code == 422
    assert "is no name for an SAE" in Reader(answer.text).text
    assert "kept</textarea>" in answer.text
    assert maren.get(SAE).status_code == 200


def test_a_description_stands_on_the_page_and_ends_what_browsers_keep(maren: TestClient) -> None:
    tag = maren.get(SAE).headers["etag"]
    assert rename(maren, "smollm2-l17", "Ours, <b>second</b> try.\u202e") == 303
    page = maren.get(SAE, headers={"If-None-Match": tag})
    assert page.status_code == 200
    assert "Ours, <b>second</b> try.⟨202E⟩" in Reader(page.text).text


def test_an_archived_sae_is_off_the_first_page_and_reachable(maren: TestClient) -> None:
    assert maren.post(f"{SAE}/archive", data={"on": "1"}).status_code == 303
    home = maren.get("/index.json").json()
    assert (home["saes"], home["archived"], home["models"][0]["cells"]) == ([], 1, [])
    assert "1 archived" in maren.get("/").text
    assert [card["sae"]["name"] for card in maren.get("/archive.json").json()["saes"]] == ["smollm2-l17"]
    assert "archived" in Reader(maren.get(SAE).text).text
    maren.post(f"{SAE}/archive", data={"on": "0"})
    assert len(maren.get("/index.json").json()["saes"]) == 1


def test_nothing_is_renamed_or_deleted_under_a_job_that_works_on_it(maren: TestClient, db: Database) -> None:
    with db.write() as session:
        session.add(Job(id="harvest-x", kind="harvest", title="t", config={"saes": ["smollm2-l17"]}, status="running"))
    for path, data in (("manage", {"name": "other"}), ("delete", {"name": "smollm2-l17"})):
        answer = maren.post(f"{SAE}/{path}", data=data)
        assert answer.status_code == 400
        assert "The job harvest-x works on smollm2-l17" in Reader(answer.text).text
    assert rename(maren, "smollm2-l17", "a description is no harm") == 303
    with db.write() as session:
        session.get_one(Job, "harvest-x").status = "done"
    assert rename(maren, "other") == 303


def test_a_deleted_sae_takes_everything_with_it_and_its_folder(maren: TestClient, db: Database, peopled: Settings) -> None:
    folder = peopled.data / "saes" / "smollm2-l17"
    folder.mkdir(parents=True)
    (folder / "sae.safetensors").write_bytes(b"x")
    neighbour = peopled.data / "saes" / "other"
    neighbour.mkdir()
    maren.post(f"{SAE}/features/3/labels", data={"label": "dates"})
    maren.post(f"{SAE}/features/3/labels", data={"label": "years", "follows": "1"})
    maren.post(f"{SAE}/features/3/notes", data={"note": "x"})
    maren.post(f"{SAE}/features/3/star", data={"on": "1"})
    maren.post(f"{SAE}/features/3/lists", data={"name": "mine"})
    maren.post(f"{SAE}/reviews", data={"n": "3"})
    maren.post("/reviews/1/rate", data={"place": "1", "answer": "yes"})
    asked = Reader(maren.get(f"{SAE}/delete").text).text
    assert "2 labels, with their history, 1 note, 1 star, 1 review" in asked
    assert maren.post(f"{SAE}/delete", data={"name": "smollm2"}).status_code == 422
    assert maren.get(SAE).status_code == 200
    gone = maren.post(f"{SAE}/delete", data={"name": "smollm2-l17"})
    assert (gone.status_code, gone.headers["location"]) == (303, "/")
    assert maren.get(SAE).status_code == 404
    assert not folder.exists()
    assert neighbour.exists()
    kept = {"model", "corpus", "job", "job_point", "job_log", "worker", "feature_list"}
    with db.read() as session:
        left = {t.name: session.scalar(sa.select(sa.func.count()).select_from(t)) for t in Base.metadata.sorted_tables}
    assert {name for name, n in left.items() if n} == kept
    assert maren.get("/lists/1.json").json()["entries"] == []


def test_a_harvest_is_named_archived_and_deleted_while_labels_stay(maren: TestClient, db: Database) -> None:
    maren.post(f"{SAE}/features/3/labels", data={"label": "dates"})
    maren.post("/harvests/1", data={"name": "the large one", "description": "twice\r\nas long"})
    line = maren.get(f"{SAE}/manage.json").json()["harvests"][0]
    assert (line["name"], line["description"], line["status"]) == ("the large one", "twice\nas long", "published")
    maren.post("/harvests/1/archive", data={"on": "1"})
    assert maren.get(f"{SAE}/manage.json").json()["harvests"][0]["archived_at"]
    assert "they are empty then" in Reader(maren.get("/harvests/1/delete").text).text
    assert maren.post("/harvests/1", data={"name": "x" * 121}).status_code == 422
    assert maren.post("/harvests/1/delete").status_code == 303
    with db.read() as session:
        assert session.scalars(sa.select(Harvest.id)).all() == []
        assert session.scalars(sa.select(Row.harvest_id)).all() == [None]
    assert maren.get("/labels.json").json()["lines"][0]["text"] == "dates"
    assert maren.get("/harvests/1/delete").status_code == 404
