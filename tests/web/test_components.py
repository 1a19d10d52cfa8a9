"""`/saes/{sae}/features/{index}/components`."""

from urllib.parse import urljoin

import pytest
from fastapi.testclient import TestClient

from sae_core.errors import EngineAway, UnsupportedModel
from server.live import ComponentsQuestion, Live, LiveAttribution, LiveComponents, LiveQuestion
from tests.web.conftest import SAE
from tests.web.reading import PART, Reader, counted

FEATURE = f"{SAE}/features/3"
HERE = f"{FEATURE}/components"


def answer_to(question: ComponentsQuestion) -> LiveComponents:
    """Four sources, three components: MLP 0 is the largest, the embedding negative."""
    tokens = list(question.tokens or [0, 1, 2, 3])
    rest = [0.0] * (len(tokens) - 3)
    given = [[-0.25, 0.0, -0.5, *rest], [0.0, 0.125, 0.0, *rest], [1.0, 2.0, 0.0, *rest]]
    dest = 2 if question.dest is None else question.dest
    return LiveComponents(
        sae=question.sae, index=question.index, tokens=tokens, texts=[f" <t{i}>" for i in range(len(tokens))], dest=dest,
        head=question.head, names=["embedding", "attention 0", "MLP 0"], given=given,
        by_head=[[sum(row), *[0.0] * 8] for row in given], dfa=[0.75, 2.125, -0.5, *rest], bias=-0.375, preact=2.0, gap=1e-7,
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ComponentsQuestion]:
    """What the engine was asked, which answers by `answer_to`."""
    seen: list[ComponentsQuestion] = []

    def components(_: Live, question: ComponentsQuestion) -> LiveComponents:
        seen.append(question)
        return answer_to(question)

    monkeypatch.setattr(Live, "components", components)
    return seen


def test_a_stored_examples_row_is_asked_about_at_its_destination(client: TestClient, asked: list[ComponentsQuestion]) -> None:
    example = client.get(f"{FEATURE}.json").json()["examples"][4]
    place = f"?band={example['band']}&rank={example['rank']}"
    assert client.get(f"{HERE}{place}").status_code == 200
    (question,) = asked
    assert (question.sae, question.index, question.dest, question.head) == ("smollm2-l17", 3, example["dest"], None)
    assert question.tokens is not None
    assert len(question.tokens) >= example["start"] + len(example["texts"])
    client.get(f"{HERE}{place}&head=5")
    assert (asked[-1].head, asked[-1].tokens) == (5, question.tokens)


def test_own_tokens_are_asked_about_as_they_are(client: TestClient, asked: list[ComponentsQuestion]) -> None:
    client.get(f"{HERE}?tokens=0,7,11,13&dest=3")
    assert asked == [ComponentsQuestion(sae="smollm2-l17", index=3, tokens=[0, 7, 11, 13], dest=3)]


@pytest.mark.usefixtures("asked")
def test_components_stand_by_size_with_their_sum_and_the_identity(client: TestClient) -> None:
    page = client.get(f"{HERE}.json?tokens=0,1,2,3&dest=2").json()
    assert [(part["name"], part["value"]) for part in page["parts"]] == [
        ("MLP 0", 3.0),
        ("embedding", -0.75),
        ("attention 0", 0.125),
    ]
    assert [part["share"] for part in page["parts"]] == pytest.approx([3 / 3.875, 0.75 / 3.875, 0.125 / 3.875])
    assert [(s["position"], s["offset"], s["value"]) for s in page["parts"][0]["sources"]] == [(1, -1, 2.0), (0, -2, 1.0)]
    assert (page["total"], page["dfa"], page["preact"]) == (2.375, 2.375, 2.0)
    html = Reader(client.get(f"{HERE}?tokens=0,1,2,3&dest=2").text)
    assert "2.38 − 0.38 = 2.00" in html.text
    current = [a["href"] for a in html.all("a") if a.get("aria-current") == "true"]
    assert current == [f"{HERE}?tokens=0%2C1%2C2%2C3&dest=2"], "no head is chosen"
    assert html.text.index("MLP 0") < html.text.index("embedding") < html.text.index("attention 0")
    assert html.refused == []
    assert "<t1>" in html.text, "token texts are escaped, not lost"


@pytest.mark.usefixtures("asked")
def test_of_one_head_the_sum_is_that_heads_dfa(client: TestClient) -> None:
    text = Reader(client.get(f"{HERE}?tokens=0,1,2,3&dest=2&head=4").text).text
    assert "2.38 = 2.38 DFA of head 4" in " ".join(text.split())


@pytest.mark.usefixtures("asked")
def test_it_is_a_block_for_htmx_and_a_page_by_plain_get(client: TestClient) -> None:
    address = f"{HERE}?band=0&rank=0"
    part, whole = client.get(address, headers=PART), client.get(address)
    assert "<html" not in part.text
    assert "<html" in whole.text
    assert part.text.strip() in whole.text


@pytest.mark.usefixtures("asked")
def test_every_example_has_its_address(client: TestClient) -> None:
    address = f"{FEATURE}?head=4"
    links = [urljoin(address, a["href"]) for a in Reader(client.get(address).text).all("a") if "/components?" in a["href"]]
    examples = client.get(f"{FEATURE}.json").json()["examples"]
    assert links == [f"{HERE}?band={e['band']}&rank={e['rank']}&head=4" for e in examples]
    for link in links:
        assert client.get(link).status_code == 200


def test_typed_text_has_its_address_too(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def attribute(_: Live, question: LiveQuestion) -> LiveAttribution:
        return LiveAttribution(
            sae=question.sae, index=question.index, tokens=[0, 5, 9], texts=["<s>", "a", "b"], activations=[0, 0, 1.0],
            preacts=[-1, -1, 1.0], excluded=[True, False, False], dest=2, dfa=[[0.0, 1.0, 0.5]] + [[0.0] * 3] * 8, bias=-0.5,
            gap=0.0,
        )  # fmt: skip

    monkeypatch.setattr(Live, "attribute", attribute)
    page = Reader(client.post(FEATURE, data={"text": "a b"}, headers=PART).text)
    assert [a["href"] for a in page.all("a") if "/components?" in a["href"]] == [f"{HERE}?tokens=0%2C5%2C9&dest=2"]


@pytest.mark.parametrize(
    "error", [EngineAway("The engine does not answer; start it."), UnsupportedModel("tiny cannot be split by component: no.")]
)
def test_an_engine_that_cannot_answer_says_why_and_the_page_stays(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> LiveComponents:
        raise error

    monkeypatch.setattr(Live, "components", fail)
    for headers in ({}, PART):
        page = client.get(f"{HERE}?band=0&rank=0", headers=headers)
        assert page.status_code == 200
        assert str(error) in Reader(page.text).text


@pytest.mark.parametrize(
    ("asks", "status", "said"),
    [
        ("?band=0&rank=99", 404, "keeps no example 99 in band 0"),
        ("", 422, "Give either band and rank of an example, or tokens"),
        ("?band=0&rank=0&tokens=1,2", 422, "Give either"),
        ("?tokens=1,x", 422, "tokens"),
        ("?band=0&rank=0&head=9", 422, "Head 9 does not exist"),
    ],
)
def test_what_cannot_be_asked_gets_a_sentence(client: TestClient, asks: str, status: int, said: str) -> None:
    answer = client.get(f"{HERE}.json{asks}")
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]
    assert client.get(f"{SAE}/features/999/components.json?band=0&rank=0").status_code == 404


@pytest.mark.usefixtures("asked")
def test_it_needs_two_queries(client: TestClient) -> None:
    client.get(HERE)
    with counted(client.app.state.db.engine) as statements:  # type: ignore[attr-defined]
        client.get(f"{HERE}?band=0&rank=0")
    assert len(statements) == 2
