"""`/interventions`: what the form asks of the engine, what its answer looks like, the line, and that nothing is stored."""

import re

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from sae_core.errors import EngineAway, UsageError
from server.live import (
    ActivationChange,
    ChangedFeature,
    FeatureChanged,
    InLine,
    LayerAblated,
    Live,
    LiveSteered,
    NextChange,
    SteerQuestion,
    WrittenText,
)
from server.pages.interventions import positions
from server.settings import Settings
from server.tables import Base
from tests.web.conftest import database_of
from tests.web.reading import PART, Reader, table_rows

SAE = "smollm2-l17"
FORM = {
    "text": "The tide came back", "error": "keep", "f.0.sae": SAE, "f.0.index": "3", "f.0.how": "ablate", "f.0.value": "",
    "f.0.at": "", "new": "4", "temperature": "0.5", "seed": "7",
}  # fmt: skip
WORDS = ["<|endoftext|>", "The", " tide", " came", " back"]


def steered(question: SteerQuestion) -> LiveSteered:
    """The token " came" is harder, " back" easier; two later features change."""
    tokens = [
        NextChange(id=i, text=text, probability=0.25, changed=0.5 - 0.1 * i, logit=10.0 - i, changed_logit=9.0 + i)
        for i, text in enumerate((" Mary", " John", " now"))
    ]
    return LiveSteered(
        model="smollm2-135m", tokens=[0, 1, 2, 3, 4], texts=WORDS, losses=[5.0, 2.0, 1.0, 3.0],
        changed_losses=[5.0, 2.0, 2.0, 2.5], kl=[0.0, 0.0, 0.25, 0.5, 0.125], look=4 if question.look is None else question.look,
        likely=tokens[1:], asked=tokens[: len(question.next_texts)],
        features=[ChangedFeature(sae=one.sae, index=one.index, activations=[0, 0, 1.5, 0, 0]) for one in question.features],
        reached=[
            ActivationChange(sae=SAE, index=5, position=3, activation=0.0, changed=1.25),
            ActivationChange(sae=SAE, index=6, position=4, activation=2.0, changed=0.5),
        ],
        n_reached=7, plain=WrittenText(tokens=[1, 2], text=" in time"), changed=WrittenText(tokens=[1, 3], text=" in a boat"),
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[SteerQuestion]:
    """What the engine was asked; it answers at once."""
    seen: list[SteerQuestion] = []

    def leave(_: Live, ticket: str, question: SteerQuestion, wait: float) -> InLine:
        assert wait > 0
        seen.append(question)
        return InLine(ticket=ticket, place=None, answer=None, steered=steered(question))

    monkeypatch.setattr(Live, "leave_steer", leave)
    monkeypatch.setattr(Live, "warm", lambda *_: None)
    return seen


def test_the_form_opens_on_the_feature_of_the_address_without_the_engine(client: TestClient) -> None:
    page = client.get(f"/interventions?sae={SAE}&feature=3&how=steer&value=8").text
    assert re.search(r'name="f.0.index" value="3"', page)
    assert f'<option value="{SAE}" selected>' in page
    assert '<option value="steer" selected>' in page
    assert re.search(r'name="f.0.value" value="8"', page)
    assert client.get("/interventions.json").json()["models"][0]["saes"][0]["name"] == SAE
    feature = client.get(f"/saes/{SAE}/features/3").text
    assert f'href="/interventions?sae={SAE}&amp;feature=3"' in feature
    assert 'form="to-interventions"' not in page


def test_the_form_is_asked_as_it_was_filled_in(client: TestClient, asked: list[SteerQuestion]) -> None:
    client.post("/interventions", data=FORM)
    one = FeatureChanged(sae=SAE, index=3, how="ablate")
    told = SteerQuestion(features=[one], text="The tide came back", most=40, new_tokens=4, temperature=0.5, seed=7)
    assert asked[-1] == told
    more = {
        "f.0.at": "2, 3-4", "f.1.sae": SAE, "f.1.index": "5", "f.1.how": "set", "f.1.value": "2.5", "f.2.index": "",
        "f.2.sae": SAE, "l.0.layer": "9", "l.0.how": "resample", "l.0.heads": "0 2-3", "l.0.at": "",
        "other": "The boat\r\ncame", "look": "2", "next": " Mary", "less": " John",
    }  # fmt: skip
    page = client.post("/interventions", data=FORM | more).text
    wanted = asked[-1]
    assert wanted.features == [one.model_copy(update={"at": [2, 3, 4]}), FeatureChanged(sae=SAE, index=5, how="set", value=2.5)]
    assert wanted.ablations == [LayerAblated(layer=9, how="resample", heads=[0, 2, 3])]
    assert (wanted.other, wanted.look, wanted.next_texts) == ("The boat\ncame", 2, [" Mary", " John"])
    assert wanted.keep_error
    hidden = dict(re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)">', page.split('class="losses"')[0]))
    again = {name: value for name, value in hidden.items() if name != "ticket"}
    client.post("/interventions", data=again | {"pick": "look:3"})
    assert asked[-1] == wanted.model_copy(update={"look": 3}), "a token picked carries the whole form"
    client.post("/interventions", data={name: value for name, value in FORM.items() if name != "error"})
    assert not asked[-1].keep_error


def test_the_answer_is_painted_and_told(client: TestClient, asked: list[SteerQuestion]) -> None:
    page = client.post("/interventions", data=FORM | {"next": " Mary", "less": " John"}).text
    assert asked
    read = Reader(page)
    assert read.refused == []
    classes = re.findall(r'value="look:\d" class="loss([^"]*)"', page)
    assert classes == ["", "", " edited", " worse c15", " better c8"], "the feature fires at 2 alone, so nothing else was edited"
    assert "3: loss 1.000 → 2.000; KL of what is predicted next 0.500" in page
    assert "mean 2.750 → 2.875 nats" in page
    assert [row[0] for row in table_rows(page, "nexts")] == ["·Mary", "·John", "·now"]
    assert table_rows(page, "nexts")[0][1:] == ["25 %", "50 %", "10.00", "−1.0"]
    assert "+1.00 → <b>−1.00</b>" in page, "10 less 9, then 9 less 10"
    rows = table_rows(page, "fires")
    assert [(row[1], row[3], row[4], row[5]) for row in rows] == [("5", "0", "1.25", "+1.25"), ("6", "2.00", "0.500", "−1.50")]
    assert "7, the 2 that change most" in read.text
    assert '<span class="quiet"> in </span>time' in page
    assert '<span class="quiet"> in </span><mark>a boat</mark>' in page
    assert "alike for 1 token" in read.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text": " "}, "Type some text first"),
        ({"text": "x" * 40_001}, "at most 40000"),
        ({"f.0.index": ""}, "Name a feature"),
        ({"f.0.index": "4096"}, "Feature 4096 does not exist"),
        ({"f.0.index": "x"}, "is not a feature&#39;s index"),
        ({"f.0.sae": "gone"}, "no SAE called"),
        ({"f.0.how": "set"}, "Say how much"),
        ({"f.0.how": "set", "f.0.value": "much"}, "is not a strength"),
        ({"f.0.how": "set", "f.0.value": "1e9"}, "less than or equal to 10000"),
        ({"f.0.at": "7-3"}, "names no positions"),
        ({"f.0.how": "resample"}, "Give the text to resample from"),
        ({"new": "500"}, "new tokens: Input should be less than or equal to 100"),
        ({"temperature": "hot"}, "is not a temperature"),
        ({"look": "end"}, "is not a position"),
    ],
)
def test_what_cannot_be_asked_gets_a_sentence_and_keeps_the_form(
    client: TestClient, asked: list[SteerQuestion], change: dict[str, str], says: str
) -> None:
    page = client.post("/interventions", data=FORM | change)
    assert page.status_code == 422
    assert says in page.text
    assert asked == []
    assert re.search(r'name="seed" value="7"', page.text)
    assert client.post("/interventions", data=FORM | change, headers=PART).status_code == 200, "htmx swaps what is well"


def test_lines_are_added_and_taken_away_without_the_engine(client: TestClient, asked: list[SteerQuestion]) -> None:
    page = client.post("/interventions", data=FORM | {"do": "add-feature"}).text
    assert len(re.findall(r'name="f\.\d\.index"', page)) == 2
    page = client.post("/interventions", data=FORM | {"do": "add-layer"}).text
    assert re.search(r'name="l.0.layer"', page)
    page = client.post("/interventions", data=FORM | {"do": "drop-feature:0"}).text
    assert "f.0.index" not in page
    assert "The tide came back" in page
    page = client.post("/interventions", data=FORM | {"do": "open"}).text
    assert 'id="outcome"' not in page
    assert asked == []


def test_a_question_in_the_line_is_looked_for_and_cancelled(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(Live, "leave_steer", lambda _, ticket, *__: InLine(ticket=ticket, place=2, answer=None))
    monkeypatch.setattr(Live, "cancel", lambda _, ticket: looked.append(f"cancel {ticket}"))

    def look(_: Live, ticket: str, __: float = 0.0) -> InLine:
        looked.append(ticket)
        question = SteerQuestion(features=[FeatureChanged(sae=SAE, index=3, how="ablate")], text="The tide came back")
        return InLine(ticket=ticket, place=None, answer=None, steered=steered(question))

    monkeypatch.setattr(Live, "look", look)
    page = client.post("/interventions", data=FORM).text
    assert "<b>2</b> questions before yours" in page
    ticket = re.search('name="ticket" value="([^"]+)"', page)
    assert ticket
    found = client.post("/interventions/look", data=FORM | {"ticket": ticket[1]}).text
    assert "What was changed" in found
    gone = client.post("/interventions/look", data=FORM | {"ticket": ticket[1], "do": "cancel"}).text
    assert "Cancelled. The text is still here." in gone
    assert looked == [ticket[1], f"cancel {ticket[1]}"]
    assert "no ticket of a question" in client.post("/interventions/look", data=FORM | {"ticket": "x"}).text


@pytest.mark.parametrize("error", [EngineAway("The engine does not answer."), UsageError("The text has 600 tokens.")])
def test_what_the_engine_says_is_said(client: TestClient, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: object) -> InLine:
        raise error

    monkeypatch.setattr(Live, "leave_steer", refuse)
    assert str(error) in client.post("/interventions", data=FORM).text


def test_nothing_typed_is_stored(client: TestClient, asked: list[SteerQuestion], filled: Settings) -> None:
    typed = "Never-to-be-found-again"
    client.post("/interventions", data=FORM | {"text": typed, "other": typed, "f.0.how": "resample"})
    assert asked[-1].other == typed
    with database_of(filled) as db, db.read() as session:
        for table in Base.metadata.sorted_tables:
            for row in session.execute(sa.select(table)):
                assert typed not in repr(row)


def test_positions_are_read_as_people_write_them() -> None:
    assert positions("") is None
    assert positions(" 3,5-7  ") == [3, 5, 6, 7]
    assert positions("2 2 1") == [1, 2]
    for wrong in ("x", "-1", "3-", "0-99999"):
        with pytest.raises(UsageError):
            positions(wrong)
