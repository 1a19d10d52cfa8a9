"""`/lists`: features put together, in order, with notes; nothing is lost by a slip."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.db import Database
from server.settings import Settings
from tests.web.conftest import SAE, Visit
from tests.web.factory import Shape, add_sae
from tests.web.reading import PART, Reader, counted

OTHER = "/saes/other-l3"


def of(client: TestClient, list_id: int = 1) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = client.get(f"/lists/{list_id}.json").json()
    return found


def order(client: TestClient) -> list[object]:
    return [entry["index"] for entry in of(client)["entries"]]


@pytest.fixture
def three(peopled: Settings, visit: Visit) -> TestClient:
    """Maren with a list of three features of two SAEs: 3, 8 and the other's 4."""
    database = Database(peopled.url)
    with database.write() as session:
        add_sae(session, Shape(sae="other-l3", layer=3, n_features=20, seed=1, running_job=False))
    database.close()
    maren = visit("Maren")
    made = maren.post(f"{SAE}/features/3/lists", data={"list": "", "name": "For the talk"})
    assert made.status_code == 303
    maren.post(f"{SAE}/features/8/lists", data={"list": "1", "name": ""})
    maren.post(f"{OTHER}/features/4/lists", data={"list": "1", "name": ""})
    return maren


def test_a_list_holds_features_of_several_saes_as_cards(three: TestClient) -> None:
    page = of(three)
    assert [(one["sae"], one["index"], one["author"]) for one in page["entries"]] == [
        ("smollm2-l17", 3, "Maren"), ("smollm2-l17", 8, "Maren"), ("other-l3", 4, "Maren"),
    ]  # fmt: skip
    assert [len(one["card"]["examples"]) for one in page["entries"]] == [3, 3, 3]
    feature = three.get(f"{OTHER}/features/4.json").json()
    card = page["entries"][2]["card"]
    assert card["examples"] == feature["examples"][:3]
    assert card["heads"] == feature["heads"]
    read = Reader(three.get("/lists/1").text)
    assert read.refused == []
    assert {f"{SAE}/features/3", f"{OTHER}/features/4"} <= {a["href"] for a in read.all("a")}
    assert len([p for p in read.all("p") if p.get("class") == "text"]) == 9


def test_a_feature_says_in_which_lists_it_is_and_is_in_each_once(three: TestClient) -> None:
    three.post(f"{SAE}/features/3/lists", data={"list": "1", "name": ""})
    assert order(three) == [3, 8, 4]
    lists = three.get(f"{SAE}/features/3/labels.json").json()["lists"]
    assert lists == [{"id": 1, "name": "For the talk", "holds": True}]
    assert three.get(f"{SAE}/features/9/labels.json").json()["lists"][0]["holds"] is False


def test_entries_move_one_place_and_the_ends_stay(three: TestClient) -> None:
    first, second, third = (one["id"] for one in of(three)["entries"])
    for entry, way, expected in (
        (third, "up", [3, 4, 8]),
        (third, "up", [4, 3, 8]),
        (third, "up", [4, 3, 8]),
        (second, "down", [4, 3, 8]),
        (third, "down", [3, 4, 8]),
    ):
        assert three.post(f"/lists/1/entries/{entry}/move", data={"way": way}).status_code == 303
        assert order(three) == expected
    part = three.post(f"/lists/1/entries/{first}/move", data={"way": "down"}, headers=PART)
    assert part.status_code == 200
    assert "<html" not in part.text
    assert order(three) == [4, 3, 8]


def test_what_is_taken_out_or_deleted_comes_back_where_it_was_with_its_note(three: TestClient, visit: Visit) -> None:
    entry = of(three)["entries"][1]["id"]
    three.post(f"/lists/1/entries/{entry}/note", data={"note": "why\nso"})
    ola = visit("Ola")
    ola.post(f"/lists/1/entries/{entry}/remove")
    page = of(three)
    assert [one["index"] for one in page["entries"]] == [3, 4]
    assert [(one["index"], one["note"], one["removed_by"]) for one in page["removed"]] == [(8, "why\nso", "Ola")]
    three.post(f"/lists/1/entries/{entry}/restore")
    assert order(three) == [3, 8, 4]
    assert of(three)["entries"][1]["note"] == "why\nso"
    ola.post("/lists/1/delete")
    assert three.get("/lists.json").json()["lists"] == []
    assert "deleted this list" in Reader(three.get("/lists/1").text).text
    three.post("/lists/1/restore")
    assert [(one["name"], one["entries"]) for one in three.get("/lists.json").json()["lists"]] == [("For the talk", 3)]


def test_a_list_is_renamed_and_described_and_a_bad_name_keeps_what_was_typed(three: TestClient) -> None:
    three.post("/lists/1", data={"name": "Figure <3>", "description": "a\r\nb"})
    line = of(three)["list"]
    assert (line["name"], line["description"]) == ("Figure <3>", "a\nb")
    bad = three.post("/lists/1", data={"name": "x" * 121, "description": "kept"})
    assert bad.status_code == 422
    assert "121 characters; at most 120" in bad.text
    assert "kept</textarea>" in bad.text
    bad = three.post("/lists", data={"name": " ", "description": "kept too"})
    assert bad.status_code == 422
    assert "kept too</textarea>" in bad.text


def test_without_a_name_a_list_is_read_and_not_changed(three: TestClient, visit: Visit) -> None:
    nobody = visit(None)
    page = nobody.get("/lists/1")
    assert page.status_code == 200
    assert "take out" not in page.text
    for path in ("/lists", "/lists/1", "/lists/1/delete", "/lists/1/entries/1/remove"):
        assert nobody.post(path, data={"name": "mine"}).status_code == 422
    assert order(three) == [3, 8, 4]


def test_a_long_list_takes_as_few_queries_as_a_short_one(three: TestClient) -> None:
    engine = three.app.state.db.engine  # type: ignore[attr-defined]
    with counted(engine) as short:
        three.get("/lists/1")
    for index in range(20, 40):
        three.post(f"{SAE}/features/{index}/lists", data={"list": "1"})
    with counted(engine) as long:
        three.get("/lists/1")
    assert len(short) == len(long) == 4


def test_what_is_not_there_is_told(three: TestClient) -> None:
    assert three.get("/lists/9").status_code == 404
    assert three.post("/lists/9/delete").status_code == 404
    assert three.post("/lists/1/entries/99/remove").status_code == 404
    assert three.post(f"{SAE}/features/3/lists", data={"list": "9"}).status_code == 404
    assert three.post(f"{SAE}/features/3/lists", data={"list": "", "name": ""}).status_code == 422


def test_the_table_is_filtered_by_a_list(three: TestClient) -> None:
    page = three.get(f"{SAE}.json?in_list=1&sort=idx").json()
    assert [row["index"] for row in page["table"]["rows"]] == [3, 8]
    assert page["lists"] == [{"id": 1, "name": "For the talk"}]
    shown = three.get(f"{SAE}?in_list=1")
    assert '<option value="1" selected>For the talk' in shown.text
    entry = of(three)["entries"][0]
    three.post(f"/lists/1/entries/{entry['id']}/remove")
    again = three.get(f"{SAE}?in_list=1", headers={"If-None-Match": shown.headers["etag"]})
    assert again.status_code == 200, "a browser that has the page asks for it again"
    assert [row["index"] for row in three.get(f"{SAE}.json?in_list=1").json()["table"]["rows"]] == [8]
    assert three.get(f"{SAE}.json?in_list=4711").json()["table"]["rows"] == []
    assert three.get(f"{SAE}/random?from=in_list%3D1").headers["location"].startswith(f"{SAE}/features/8")
