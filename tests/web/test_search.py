"""`/search` and `/saes/{sae}/search`."""

from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from server.app import create_app
from server.db import Database
from server.store import search
from tests.web.conftest import SAE, at, put
from tests.web.reading import PART, Reader

HOSTILE = (
    "", " ", "\"", "'", "*", "\" OR 1", "a AND", "NEAR(a b", "tide) -x", "col:tide", "^tide", "%", "\\", "\0", "=>", "!!!",
    "\u202e", "\U0001f600", "x" * 10_000, "tide " * 2000, "(" * 500, "\ud7ff", "東京", "e\u0301",
)  # fmt: skip


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Any:
    settings = put(at(tmp_path_factory.mktemp("searched")))
    database = Database(settings.url)
    search.write(database, 1, search.unfenced)
    database.close()
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        yield client


def found(client: TestClient, q: str, kind: str) -> dict[str, Any]:
    answer = client.get(f"{SAE}/search.json", params={"q": q, "kind": kind})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_a_feature_is_found_by_each_token_that_its_examples_end_on(client: TestClient) -> None:
    for index in (3, 10):
        examples = client.get(f"{SAE}/features/{index}.json?all=1").json()["examples"]
        strongest: dict[str, float] = {}
        for example in examples:
            text = example["texts"][example["dest"] - example["start"]]
            strongest[text] = max(strongest.get(text, 0.0), example["act"])
        for text, act in strongest.items():
            hits = {(hit["index"], hit["token"]): hit for hit in found(client, text, "token")["hits"]}
            assert hits[index, text]["weight"] == pytest.approx(act, rel=1e-6)


def test_spaces_and_capitals_do_not_matter_and_what_was_typed_comes_first(client: TestClient) -> None:
    assert set(found(client, "tide", "token")["spellings"]) >= {" tide"}
    assert found(client, "TIDE", "token")["spellings"] == found(client, "tide", "token")["spellings"]
    assert found(client, " tide", "token")["spellings"] == [" tide"]


def test_hits_come_strongest_first_and_page_by_page(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [(hit["index"], hit["token"]) for hit in found(client, "the", "token")["hits"]]
    weights = [hit["weight"] for hit in found(client, "the", "token")["hits"]]
    assert weights == sorted(weights, reverse=True)
    monkeypatch.setattr(search, "PAGE", 2)
    paged, after = [], ""
    while True:
        part = client.get(f"{SAE}/search.json?q=the&kind=token{after}").json()
        paged += [(hit["index"], hit["token"]) for hit in part["hits"]]
        if part["next"] is None:
            break
        after = f"&after={quote(part['next'])}"
    assert paged == whole
    assert len(paged) > 2


@pytest.mark.parametrize(("kind", "column"), [("promotes", "promoted"), ("suppresses", "suppressed")])
def test_a_feature_is_found_by_what_it_does_to_a_token(client: TestClient, kind: str, column: str) -> None:
    tokens = client.get(f"{SAE}/features/5.json").json()[column]
    text = tokens[0]["text"]
    hit = next(hit for hit in found(client, text, kind)["hits"] if (hit["index"], hit["token"]) == (5, text))
    assert hit["weight"] == pytest.approx(abs(tokens[0]["value"]))
    assert hit["n"] == 0


def test_a_text_finds_features_with_examples_in_its_rows_and_links_to_them(client: TestClient) -> None:
    answer = found(client, "the tide would come", "text")
    assert answer["rows"] > 0
    for hit in answer["hits"][:5]:
        page = client.get(f"{SAE}/features/{hit['index']}.json?all=1").json()
        example = next(e for e in page["examples"] if (e["band"], e["rank"]) == (hit["band"], hit["rank"]))
        assert "tide would come" in "".join(example["texts"])
    firsts = [hit["within"] for hit in answer["hits"]]
    assert firsts == sorted(firsts, reverse=True), "those that fire within the text come first"
    shown = client.get(f"{SAE}/search?q=tide+would+come&kind=text", headers=PART).text
    assert "<html" not in shown
    assert f"#example-{answer['hits'][0]['band']}-" in shown


def test_code_is_found_as_it_is_typed_and_by_the_beginning_of_a_word(client: TestClient) -> None:
    for q in ("read_rows(path", "rows.append(pa", "def read"):
        assert found(client, q, "text")["hits"], q
    assert not found(client, "rows read", "text")["hits"], "words count in their order"


@pytest.mark.parametrize("kind", search.KINDS)
@pytest.mark.parametrize("q", HOSTILE, ids=lambda q: repr(q)[:12])
def test_whatever_is_typed_gets_an_answer(client: TestClient, q: str, kind: str) -> None:
    assert found(client, q, kind)["hits"] is not None
    assert client.get(f"{SAE}/search", params={"q": q, "kind": kind}).status_code == 200
    assert client.get("/search", params={"q": q}).status_code == 200


def test_nothing_typed_and_nothing_found_are_sentences(client: TestClient) -> None:
    assert "Type what to look for." in client.get(f"{SAE}/search?q=").text
    assert "has no letter or digit" in client.get(f"{SAE}/search?q=%3D%3E").text
    assert "No token is “zzz”" in client.get(f"{SAE}/search?q=zzz&kind=token").text
    assert "No row of text among the examples has “zzz”" in client.get(f"{SAE}/search?q=zzz").text
    assert "There is no search by 'colour'" in client.get(f"{SAE}/search.json?q=a&kind=colour").json()["error"]["message"]


def test_a_harvest_from_before_there_was_a_search_says_so(tmp_path: Path) -> None:
    settings = put(at(tmp_path))
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        assert "`headscope db search`" in found(client, "tide", "token")["trouble"]


def test_everything_is_searched_at_once(client: TestClient) -> None:
    assert client.get("/search.json?q=smollm2").json()["models"] == ["smollm2-135m"]
    assert [sae["name"] for sae in client.get("/search.json?q=L17").json()["saes"]] == ["smollm2-l17"]
    both = client.get("/search.json?q=tide").json()
    assert {hit["sae"] for hit in both["tokens"]} == {"smollm2-l17"}
    assert both["texts"][0][0] == "smollm2-l17"
    page = Reader(client.get("/search?q=tide").text)
    assert any("/features/" in a["href"] for a in page.all("a"))
    assert "Nothing here is “zzz”" in client.get("/search?q=zzz").text


def test_a_hostile_query_stays_text(client: TestClient) -> None:
    for address in (f"{SAE}/search", "/search"):
        shown = client.get(address, params={"q": "<script>alert(1)</script>"}).text
        assert "<script>alert" not in shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("read_rows(path)", ["read", "rows", "path"]),
        ("Größe ÉTÉ", ["grösse", "été"]),
        ("東京タワー", ["東", "京", "タ", "ワ", "ー"]),
        ("हिन्दी", ["हिन्दी"]),
        ("e\u0301t\u0301", ["ét\u0301"]),
        ("=> !!", []),
        ("ｆｕｌｌ ①", ["full", "1"]),
    ],
)
def test_words_are_those_that_people_see(text: str, said: list[str]) -> None:
    assert search.words(text) == said


def test_a_text_is_found_in_the_tokens_that_hold_it() -> None:
    texts = ["Old", " Mar", "en", " said", ",", " the", " tide"]
    assert search.span_of(texts, "maren") == (1, 3)
    assert search.span_of(texts, "said the") == (3, 6)
    assert search.span_of(texts, "Maren said, the") == (1, 6)
