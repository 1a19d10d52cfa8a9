"""Labels, notes and stars: written, shown, kept; and what was written safely."""

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from server.app import create_app
from server.db import Database
from server.settings import Settings
from server.store import labels, search
from server.store.saes import find_sae
from server.tables import Label
from tests.web.conftest import SAE, Visit
from tests.web.reading import PART, Reader, counted

FEATURE = f"{SAE}/features/3"


def known(client: TestClient, index: int = 3) -> dict[str, list[dict[str, object]]]:
    found: dict[str, list[dict[str, object]]] = client.get(f"{SAE}/features/{index}/labels.json").json()
    return found


def test_a_label_stands_in_the_title_the_table_and_the_list_of_all(maren: TestClient) -> None:
    answer = maren.post(f"{FEATURE}/labels", data={"label": "  dates\tafter   'on' "})
    assert (answer.status_code, answer.headers["location"]) == (303, f"{FEATURE}/labels")
    assert "Feature 3 dates after 'on'" in Reader(maren.get(FEATURE).text).text
    assert maren.get(f"{FEATURE}.json").json()["label"] == "dates after 'on'"
    rows = maren.get(f"{SAE}.json?labelled=true").json()["table"]["rows"]
    assert [(row["index"], row["label"]) for row in rows] == [(3, "dates after 'on'")]
    assert "dates after" in maren.get(SAE).text
    line = maren.get("/labels.json?q=DATES").json()["lines"][0]
    assert (line["sae"], line["index"], line["author"], line["method"]) == ("smollm2-l17", 3, "Maren", "person")
    assert maren.get("/labels.json?q=date_").json()["lines"] == []


def test_the_table_is_searched_and_halved_by_labels(maren: TestClient) -> None:
    for index, text in ((3, "Dates"), (8, "names of boats"), (9, "update verbs")):
        maren.post(f"{SAE}/features/{index}/labels", data={"label": text})

    def kept(asked: str) -> list[int]:
        return sorted(row["index"] for row in maren.get(f"{SAE}.json?limit=200&{asked}").json()["table"]["rows"])

    assert kept("labelled=true") == [3, 8, 9]
    assert kept("label=date") == [3, 9]
    assert kept("label=%25") == []
    assert len(kept("labelled=false")) == 57
    assert len(kept("label=&labelled=")) == 60


def test_an_edit_keeps_what_was_there_and_who_ended_it(maren: TestClient, visit: Visit) -> None:
    maren.post(f"{FEATURE}/labels", data={"label": "dates"})
    first = known(maren)["labels"][0]["id"]
    ola = visit("Ola Ødegård")
    ola.post(f"{FEATURE}/labels", data={"label": "dates in prose", "follows": first})
    page = known(ola)
    assert [(one["text"], one["author"], one["follows"]) for one in page["labels"]] == [("dates in prose", "Ola Ødegård", first)]
    assert [(one["text"], one["author"], one["ended"], one["ended_by"]) for one in page["history"]] == [
        ("dates", "Maren", "superseded", "Ola Ødegård")
    ]
    maren.post(f"{FEATURE}/labels/{page['labels'][0]['id']}/withdraw")
    page = known(maren)
    assert page["labels"] == []
    assert [(one["text"], one["ended"]) for one in page["history"]] == [("dates in prose", "withdrawn"), ("dates", "superseded")]
    text = Reader(maren.get(f"{FEATURE}/labels").text).text
    assert "history: 2 earlier" in text
    assert "withdrawn by Maren" in text
    assert maren.get(f"{FEATURE}.json").json()["label"] is None


def test_of_two_who_change_a_label_at_once_the_second_is_told(maren: TestClient, visit: Visit) -> None:
    maren.post(f"{FEATURE}/labels", data={"label": "dates"})
    first = known(maren)["labels"][0]["id"]
    visit("Ola").post(f"{FEATURE}/labels", data={"label": "years", "follows": first})
    late = maren.post(f"{FEATURE}/labels", data={"label": "months", "follows": first})
    assert late.status_code == 409
    assert "Ola changed or withdrew this label meanwhile" in Reader(late.text).text
    assert [one["text"] for one in known(maren)["labels"]] == ["years"]


def test_a_persons_label_is_shown_before_a_methods(maren: TestClient, peopled: Settings) -> None:
    database = Database(peopled.url)
    maren.post(f"{FEATURE}/labels", data={"label": "by hand"})
    with database.write() as session:
        labels.add_label(session, find_sae(session, "smollm2-l17").id, 3, "made", "explainer", method="explain-2")
    database.close()
    assert maren.get(f"{FEATURE}.json").json()["label"] == "by hand"
    assert [one["text"] for one in known(maren)["labels"]] == ["by hand", "made"]
    assert "explain-2" in maren.get(f"{FEATURE}/labels").text


def test_labels_outlive_their_harvest(maren: TestClient, peopled: Settings) -> None:
    maren.post(f"{FEATURE}/labels", data={"label": "dates"})
    database = Database(peopled.url)
    with database.write() as session:
        session.execute(sa.text("update sae set harvest_id = null"))
        session.execute(sa.text("delete from harvest"))
    with database.read() as session:
        assert session.scalars(sa.select(Label.text)).all() == ["dates"]
    database.close()
    assert [one["text"] for one in known(maren)["labels"]] == ["dates"]


def test_notes_are_deleted_by_a_mark(maren: TestClient) -> None:
    maren.post(f"{FEATURE}/notes", data={"note": "seen\r\ntwice  \r\n"})
    note = known(maren)["notes"][0]
    assert (note["text"], note["author"], note["deleted_at"]) == ("seen\ntwice", "Maren", None)
    maren.post(f"{FEATURE}/notes/{note['id']}/delete")
    note = known(maren)["notes"][0]
    assert (note["text"], note["deleted_by"]) == (None, "Maren")
    shown = maren.get(f"{FEATURE}/labels").text
    assert "twice" not in shown
    assert "was deleted by" in shown


def test_a_star_belongs_to_a_person_and_goes_again(maren: TestClient, visit: Visit) -> None:
    ola = visit("Ola")
    for client in (maren, maren, ola):
        client.post(f"{FEATURE}/star", data={"on": "1"})
    assert known(maren)["stars"] == ["Maren", "Ola"]
    mine = maren.get("/labels.json?starred=true&author=Maren").json()["lines"]
    assert [(line["index"], line["text"]) for line in mine] == [(3, None)]
    maren.post(f"{FEATURE}/star", data={"on": "0"})
    assert known(maren)["stars"] == ["Ola"]


def test_nothing_is_written_without_a_name_and_the_name_is_asked_for_once(visit: Visit) -> None:
    nobody = visit(None)
    answer = nobody.post(f"{FEATURE}/labels", data={"label": "dates"})
    assert answer.status_code == 422
    assert "Say who you are first" in answer.text
    assert known(nobody)["labels"] == []
    asked = nobody.get(f"{FEATURE}/labels", headers=PART).text
    assert 'name="author"' in asked
    assert 'name="label"' not in asked
    back = nobody.post("/author", data={"author": " Ola  Ødegård ", "back": FEATURE})
    assert (back.status_code, back.headers["location"]) == (303, FEATURE)
    assert "samesite=lax" in back.headers["set-cookie"].lower()
    asked = nobody.get(f"{FEATURE}/labels", headers=PART).text
    assert 'name="author"' not in asked
    assert "Ola Ødegård" in Reader(asked).text


@pytest.mark.parametrize("back", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:x", "/a\nb", ""])
def test_the_name_form_leads_nobody_to_another_site(visit: Visit, back: str) -> None:
    assert visit().post("/author", data={"author": "Maren", "back": back}).headers["location"] == "/"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        (" \u200b\u200d ", "empty"),
        ("x" * 201, "201 characters; at most 200"),
        ("bell\x07", "U+0007"),
        ("nul\x00", "U+0000"),
    ],
)
def test_a_bad_label_is_refused_beside_the_box_which_keeps_it(maren: TestClient, text: str, said: str) -> None:
    answer = maren.post(f"{FEATURE}/labels", data={"label": text}, headers=PART)
    assert answer.status_code == 422
    assert "<html" not in answer.text
    assert said in Reader(answer.text).text
    if text.strip().isprintable():
        assert text in [attrs.get("value") for attrs in Reader(answer.text).all("input")]
    assert known(maren)["labels"] == []


HOSTILE = {
    "script": ("<script>alert(1)</script>", "<script>alert(1)</script>"),
    "attribute": ("\" onfocus=alert(1) autofocus x=\"", "\" onfocus=alert(1) autofocus x=\""),
    "override": ("safe\u202eexe.txt", "safe⟨202E⟩exe.txt"),
    "zero width": ("ad\u200bmin", "ad⟨200B⟩min"),
    "joined family": ("👩\u200d👩\u200d👧 at home", "👩\u200d👩\u200d👧 at home"),
    "joiner in latin": ("ad\u200dmin", "ad⟨200D⟩min"),
    "right to left": ("שלום עולם", "שלום עולם"),
    "persian": ("می\u200cخواهم", "می\u200cخواهم"),
    "isolate": ("a\u2067b", "a⟨2067⟩b"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_text_is_shown_safely_and_legibly(maren: TestClient, case: str) -> None:
    typed, shown = HOSTILE[case]
    maren.post("/author", data={"author": typed[:60]})
    maren.post(f"{FEATURE}/labels", data={"label": typed})
    maren.post(f"{FEATURE}/notes", data={"note": typed})
    assert known(maren)["labels"][0]["text"] == typed, "kept as it was typed"
    for address in (FEATURE, f"{FEATURE}/labels", SAE, "/labels", "/lists"):
        read = Reader(maren.get(address).text)
        assert read.refused == []
        assert shown in read.text
        assert not [attrs for _, attrs in read.elements if "autofocus" in attrs]


def test_a_new_label_ends_what_a_browser_keeps_of_the_feature_and_its_table(maren: TestClient) -> None:
    pages = (FEATURE, SAE, f"{FEATURE}.json")
    kept = {address: maren.get(address).headers["etag"] for address in pages}
    for address, tag in kept.items():
        assert maren.get(address, headers={"If-None-Match": tag}).status_code == 304
    maren.post(f"{FEATURE}/labels", data={"label": "dates"})
    for address, tag in kept.items():
        assert maren.get(address, headers={"If-None-Match": tag}).status_code == 200


def test_htmx_gets_the_block_and_the_title_beside_it(maren: TestClient) -> None:
    part = maren.post(f"{FEATURE}/labels", data={"label": "dates"}, headers=PART)
    assert part.status_code == 200
    assert "<html" not in part.text
    title = next(attrs for attrs in Reader(part.text).all("span") if attrs.get("id") == "feature-label")
    assert title["hx-swap-oob"] == "true"


def test_what_people_wrote_takes_few_queries_and_adds_none_to_the_page(peopled: Settings) -> None:
    app = create_app(peopled)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        client.get(FEATURE)
        with counted(app.state.db.engine) as page:
            client.get(FEATURE)
        with counted(app.state.db.engine) as block:
            client.get(f"{FEATURE}/labels", headers=PART)
    assert len(page) == 3
    assert len(block) == 5


def test_a_feature_that_is_not_there_gets_no_label(maren: TestClient) -> None:
    for address in (f"{SAE}/features/60/labels", "/saes/none/features/1/labels"):
        assert maren.get(address).status_code == 404
        assert maren.post(address, data={"label": "x"}).status_code == 404
    assert maren.post(f"{FEATURE}/labels/99/withdraw").status_code == 404
    assert maren.post(f"{FEATURE}/notes/99/delete").status_code == 404
    assert maren.post(f"{FEATURE}/labels", data={"label": "x", "follows": "abc"}).status_code == 404


def test_a_label_is_found_wherever_one_searches(maren: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, text in ((3, "Dates"), (8, "names of boats"), (9, "update verbs"), (3, "more dates")):
        maren.post(f"{SAE}/features/{index}/labels", data={"label": text})

    def hits(q: str, after: str = "") -> tuple[list[tuple[int, str]], str | None]:
        found = maren.get(f"{SAE}/search.json", params={"q": q, "kind": "label"} | ({"after": after} if after else {})).json()
        assert found["trouble"] is None, "labels need no index of the harvest's"
        return [(hit["index"], hit["label"]) for hit in found["hits"]], found["next"]

    assert hits("DATE") == ([(3, "more dates"), (9, "update verbs")], None)
    assert hits("%") == ([], None)
    assert hits("date\0s")[0] == [(3, "more dates")]
    monkeypatch.setattr(search, "PAGE", 1)
    first, more = hits("date")
    assert first + hits("date", more or "")[0] == [(3, "more dates"), (9, "update verbs")]
    everywhere = maren.get("/search.json?q=date").json()
    assert [(line["index"], line["text"]) for line in everywhere["labels"]] == [
        (3, "more dates"),
        (9, "update verbs"),
        (3, "Dates"),
    ]
    shown = Reader(maren.get(f"{SAE}/search?q=boats&kind=label").text)
    assert "names of boats" in shown.text
    assert any(a["href"].endswith("/features/8") for a in shown.all("a"))
    assert "names of boats" in Reader(maren.get("/search?q=boats").text).text
    assert "No label of a feature" in Reader(maren.get(f"{SAE}/search?q=zzz&kind=label").text).text
    withdrawn = known(maren, 8)["labels"][0]["id"]
    maren.post(f"{SAE}/features/8/labels/{withdrawn}/withdraw")
    assert hits("boats") == ([], None)
