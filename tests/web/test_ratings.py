"""Blind reviews: a fair draw, nothing given away, and numbers that follow from the answers."""

from collections import Counter
from typing import Any

import pytest
from fastapi.testclient import TestClient

from sae_core.studies.shares import wilson
from server.db import Database
from server.settings import Settings
from server.store import ratings as store
from server.store.saes import find_sae
from tests.web.conftest import SAE, Visit
from tests.web.reading import Reader


@pytest.fixture
def drawn(maren: TestClient) -> TestClient:
    """Maren, who drew six features."""
    made = maren.post(f"{SAE}/reviews", data={"n": "6", "seed": "5"})
    assert (made.status_code, made.headers["location"]) == (303, "/reviews/1")
    return maren


def answer(client: TestClient, answers: str, **said: str) -> None:
    """Rate as many features as there are letters, in the order in which they come."""
    for letter in answers:
        place = client.get("/reviews/1/rate").headers["location"].split("=")[1]
        given = {"y": "yes", "m": "maybe", "n": "no"}[letter]
        assert client.post("/reviews/1/rate", data={"place": place, "answer": given, **said}).status_code == 303


def result(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/reviews/1.json").json()
    return found


def test_the_draw_is_of_live_features_repeatable_and_uniform(peopled: Settings) -> None:
    database = Database(peopled.url)
    seen = Counter[int]()
    with database.write() as session:
        door = find_sae(session, "smollm2-l17")
        for seed in range(300):
            review = store.create(session, door, 11, seed, "x")
            seen.update(store.order_for(session, review, "x"))
        again = store.create(session, door, 11, 299, "y")
        assert set(store.order_for(session, again, "x")) == set(store.order_for(session, review, "x"))
    database.close()
    assert len(seen) == 55, "each of the 55 live features, and none of the five dead ones"
    spread = sum(
        (n - 60) ** 2 / 60 for n in seen.values()
    )  # a fifth are drawn, so this is chi-squared with 54 degrees, times 4/5
    assert 20 < spread < 80


def test_each_reviewer_has_the_same_features_in_an_order_of_their_own(drawn: TestClient, peopled: Settings) -> None:
    assert drawn.get("/reviews/1.json").json()["review"]["n"] == 6
    database = Database(peopled.url)
    with database.read() as session:
        orders = {who: store.order_for(session, 1, who) for who in ("Maren", "Ola", "Ines")}
    database.close()
    assert len({tuple(sorted(order)) for order in orders.values()}) == 1
    assert len({tuple(order) for order in orders.values()}) == 3


def test_a_page_gives_away_neither_index_nor_label_nor_family(drawn: TestClient) -> None:
    indices = [one["index"] for one in result(drawn)["features"]]
    for index in indices:
        drawn.post(f"{SAE}/features/{index}/labels", data={"label": "GIVENAWAY"})
    families = {drawn.get(f"{SAE}/features/{index}.json").json()["family"] for index in indices} - {None}
    assert families
    for place in range(1, 7):
        page = drawn.get(f"/reviews/1/rate?place={place}")
        read = Reader(page.text)
        assert read.refused == []
        assert "GIVENAWAY" not in page.text
        assert "/features/" not in page.text
        assert not [family for family in families if family in read.text]
        twin = drawn.get(f"/reviews/1/rate.json?place={place}").json()
        assert not {"index", "family", "label", "verdict"} & set(twin)
        assert len(twin["examples"]) == 12


def test_what_others_judged_is_hidden_until_one_has_rated_everything(drawn: TestClient, visit: Visit) -> None:
    answer(drawn, "yyynnn", label="SPOILER")
    ola = visit("Ola")
    assert "SPOILER" not in ola.get("/reviews/1").text
    assert "SPOILER" not in visit(None).get("/reviews/1").text
    assert "SPOILER" in ola.get("/reviews/1?look=true").text
    assert "SPOILER" in drawn.get("/reviews/1").text
    answer(ola, "yyynnn")
    assert "SPOILER" in ola.get("/reviews/1").text


def test_shares_intervals_and_agreement_follow_from_the_answers(drawn: TestClient, visit: Visit) -> None:
    """Two people, then three: against counts by hand on the very answers."""
    answer(drawn, "yyyymn")
    page = result(drawn)
    low, high = wilson(4, 6)
    yes = {
        "hits": 4,
        "n": 6,
        "value": pytest.approx(4 / 6, rel=1e-5),
        "low": pytest.approx(low, rel=1e-5),
        "high": pytest.approx(high, rel=1e-5),
    }
    assert page["people"] == [{"author": "Maren", "counts": {"yes": 4, "maybe": 1, "no": 1}, "yes": yes}]
    assert page["yes"] == yes
    assert page["agreement"] is None
    ola = visit("Ola")
    answer(ola, "yyynnn")
    page = result(drawn)
    both = [[one["answer"] for one in feature["ratings"]] for feature in page["features"]]
    equal = sum(a == b for a, b in both)
    expected = (4 * 3 + 1 * 3) / 36  # Maren's yes with Ola's yes, Maren's no with Ola's no
    assert page["agreement"]["measure"] == "Cohen's kappa"
    assert page["agreement"]["value"] == pytest.approx((equal / 6 - expected) / (1 - expected))
    assert page["yes"]["hits"] == sum(pair == ["yes", "yes"] for pair in both), "one of two is not more than half"
    answer(visit("Ines"), "y")
    page = result(drawn)
    assert page["agreement"]["measure"] == "Krippendorff's alpha"
    text = Reader(drawn.get("/reviews/1").text).text
    assert "Krippendorff's alpha" in text
    assert "4 of 6, 95 %" in text


def test_a_rating_can_be_changed_and_a_wrong_one_is_refused_with_what_was_typed(drawn: TestClient) -> None:
    drawn.post("/reviews/1/rate", data={"place": "2", "answer": "no", "label": "first"})
    drawn.post("/reviews/1/rate", data={"place": "2", "answer": "yes", "label": "second"})
    again = drawn.get("/reviews/1/rate.json?place=2").json()
    assert (again["rated"], again["rating"]["answer"], again["rating"]["label"]) == (1, "yes", "second")
    bad = drawn.post("/reviews/1/rate", data={"place": "3", "answer": "perhaps", "label": "typed"})
    assert bad.status_code == 422
    assert "typed</textarea>" in bad.text
    assert drawn.post("/reviews/1/rate", data={"place": "7", "answer": "yes"}).status_code == 404


def test_labels_of_a_review_become_the_features_labels_once(drawn: TestClient) -> None:
    answer(drawn, "y", label="dates")
    answer(drawn, "ynnnn")
    for _ in range(2):
        assert drawn.post("/reviews/1/labels").status_code == 303
    lines = drawn.get("/labels.json").json()["lines"]
    assert [(line["text"], line["author"]) for line in lines] == [("dates", "Maren")]


@pytest.mark.parametrize(
    ("n", "said"), [("0", "1 to 55"), ("56", "1 to 55"), ("many", "no whole number"), ("-3", "no whole number")]
)
def test_a_draw_that_cannot_be_is_refused(maren: TestClient, n: str, said: str) -> None:
    answered = maren.post(f"{SAE}/reviews", data={"n": n})
    assert answered.status_code == 422
    assert said in Reader(answered.text).text
    assert maren.get(f"{SAE}/reviews.json").json()["reviews"] == []


def test_rating_needs_a_name_and_a_review(drawn: TestClient, visit: Visit) -> None:
    assert visit(None).get("/reviews/1/rate").status_code == 422
    assert drawn.get("/reviews/9").status_code == 404
    assert drawn.get("/reviews/9/rate").status_code == 404
    assert drawn.post("/reviews/9/rate", data={"place": "1", "answer": "yes"}).status_code == 404
