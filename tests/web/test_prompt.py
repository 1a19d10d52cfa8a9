"""`/prompt`: the form, the grid, a feature taken apart, two texts side by side, the line, and what is shared."""

import re
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from sae_core.errors import EngineAway, NotFound
from server.live import (
    Firing,
    InLine,
    Live,
    LiveAttribution,
    LivePrompt,
    LiveWritten,
    NextToken,
    PromptQuestion,
    PromptSae,
    PromptText,
)
from server.pages.prompt import read_form
from server.pages.prompt_grid import Hit, aligned, difference
from server.settings import Settings
from server.store import prompts as store
from server.store.prompts import strongest_ever
from server.store.saes import find_sae
from server.tables import Prompt
from tests.web.accounts import NAMES, lab_app, settle, visitors
from tests.web.conftest import at, database_of
from tests.web.reading import PART, table_rows

SAE = "smollm2-l17"
FORM = {"text": "The tide came back", "saes": f"sae:{SAE}"}
WORDS = ["<|endoftext|>", "The", " tide", " came", " back"]


def prompt_text(words: list[str], activation: float) -> PromptText:
    """Feature 3 fires at 2 and 3, feature 5 at 3."""
    at_2 = [Firing(index=3, position=2, activation=activation)]
    at_3 = [Firing(index=5, position=3, activation=2 * activation), Firing(index=3, position=3, activation=0.5)]
    sae = PromptSae(
        sae=SAE, layer=17, excluded=[True, *[False] * (len(words) - 1)], counts=[0, 0, 1, 2, *[0] * (len(words) - 4)],
        by_position=[[], [], at_2, at_3, *[[] for _ in words[4:]]],
    )  # fmt: skip
    return PromptText(tokens=[hash(word) % 997 for word in words], texts=words, saes=[sae])


def answer_to(question: PromptQuestion) -> LivePrompt:
    """Two heads, three sources."""
    apart, written = None, None
    if question.feature is not None:
        at = question.feature
        apart = LiveAttribution(
            sae=at.sae, index=at.index, tokens=[0, 1, 2, 3, 4], texts=WORDS, activations=[0.0, 0.0, 0.0, 1.5, 0.0],
            preacts=[0.0, 0.0, 0.0, 1.5, 0.0], excluded=[True, *[False] * 4], dest=at.dest,
            dfa=[[0.5, 1.0, 0.5, 0.0, 0.0], [0.0, -0.25, 0.0, 0.0, 0.0], *[[0.0] * 5] * 7], bias=-0.25, gap=0.0,
        )  # fmt: skip
        token = NextToken(id=7, text=" back", probability=0.25, written=0.125)
        written = LiveWritten(
            activation=1.5, chosen=token, rank=12, likely=[token],
            raised=[token.model_copy(update={"id": 8, "text": " up"})], lowered=[token.model_copy(update={"written": -0.5})],
        )  # fmt: skip
    against = None if question.against is None else prompt_text([*WORDS[:4], " in"], 3.0)
    return LivePrompt(model="smollm2-135m", prompt=prompt_text(WORDS, 1.0), against=against, attribution=apart, written=written)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[PromptQuestion]:
    """What the engine was asked; it answers at once."""
    seen: list[PromptQuestion] = []

    def leave(_: Live, ticket: str, question: PromptQuestion, wait: float) -> InLine:
        assert wait > 0
        seen.append(question)
        return InLine(ticket=ticket, place=None, answer=answer_to(question))

    monkeypatch.setattr(Live, "leave", leave)
    monkeypatch.setattr(Live, "warm", lambda *_: None)
    return seen


def test_the_box_comes_without_the_engine_and_offers_every_sae(client: TestClient) -> None:
    page = client.get(f"/prompt?sae={SAE}")
    assert page.status_code == 200
    assert f'<option value="sae:{SAE}" selected>' in page.text
    known = client.get("/prompt.json").json()
    assert known["models"][0]["saes"][0]["name"] == SAE
    assert known["models"][0]["saes"][0]["layer"] == 17


def test_the_grid_paints_shares_of_each_features_own_maximum(
    client: TestClient, asked: list[PromptQuestion], filled: Settings
) -> None:
    page = client.post("/prompt", data={**FORM, "do": "ask"})
    assert asked == [PromptQuestion(saes=[SAE], text="The tide came back")]
    with database_of(filled) as db, db.read() as session:
        most = strongest_ever(session, find_sae(session, SAE))
    assert most is not None
    rows = table_rows(page.text, "grid")
    assert [row[1] for row in rows] == [word.replace(" ", "·") for word in WORDS]
    title = re.findall(r'<td class="cell[^"]*" title="layer 17: ([^"]*)"', page.text)
    assert title[0] == "nothing fires"
    assert title[2] == f"1 fire; 3 most, 1, {100 / float(most[3]):.0f} % of its maximum"
    assert "row start" in rows[0][-1]
    assert "pick a token" in page.text.lower()


def test_a_picked_token_lists_its_features_and_a_picked_feature_is_taken_apart(
    client: TestClient, asked: list[PromptQuestion]
) -> None:
    page = client.post("/prompt", data={**FORM, "pick": "token:3:"})
    assert asked[-1].at == 3
    assert re.findall(rf'<th scope="row"><a href="/saes/{SAE}/features/(\d+)">', page.text) in (["5", "3"], ["3", "5"])
    page = client.post("/prompt", data={**FORM, "at": "3", "pick": f"feature:3@3@{SAE}"})
    feature = asked[-1].feature
    assert feature is not None
    assert (feature.sae, feature.index, feature.dest, feature.next, feature.next_text) == (SAE, 3, 3, None, None)
    rows = table_rows(page.text, "dfa")
    assert rows[0][:3] == ["The", "2", "+0.750"]
    for root in (f"root=3%403%40{SAE}", "root=next%403&amp;token=%237"):
        assert (
            f'form="to-circuit" name="go" value="{root}"' in page.text
            or f'class="no-print" name="go" value="{root}"' in page.text
        )
    foot = {row[0]: row[1] for row in rows if row[0] in ("all sources", "bias", "pre-activation")}
    assert foot == {"all sources": "+1.75", "bias": "−0.250", "pre-activation": "1.50"}
    assert '<a href="/saes/smollm2-l17/features/3">3</a> at' in page.text
    for given, wanted in (("#8", (8, None)), (" Paris", (None, " Paris")), ("#x", (None, "#x"))):
        client.post("/prompt", data={**FORM, "at": "3", "feature": f"3@3@{SAE}", "next": given})
        at = asked[-1].feature
        assert at is not None
        assert (at.next, at.next_text) == wanted
    client.post("/prompt", data={**FORM, "at": "3", "feature": f"3@3@{SAE}", "pick": "next:#8"})
    assert asked[-1].feature is not None
    assert asked[-1].feature.next == 8
    client.post("/prompt", data={**FORM, "at": "3", "feature": f"3@3@{SAE}", "do": "ask"})
    assert (asked[-1].at, asked[-1].feature) == (None, None), "another text has other tokens"


def test_two_texts_stand_side_by_side_with_what_differs(client: TestClient, asked: list[PromptQuestion]) -> None:
    page = client.post("/prompt", data={**FORM, "against": "The tide came in", "pick": "token:3:3"})
    assert (asked[-1].against, asked[-1].at, asked[-1].against_at, asked[-1].top) == ("The tide came in", 3, 3, 1000)
    rows = table_rows(page.text, "grid")
    assert [row[1:3] for row in rows] == [
        [a.replace(" ", "·"), b.replace(" ", "·")] for a, b in zip(WORDS, [*WORDS[:4], " in"], strict=True)
    ]
    assert re.findall('<tr class="(begin|same|other)', page.text) == ["begin", "same", "same", "same", "other"]
    assert "Feature" not in page.text or 'class="fires"' in page.text
    fires = table_rows(page.text, "fires")
    by_index = {row[0]: row for row in fires}
    assert by_index["5"][1:3] == ["2.00", "6.00"]
    assert by_index["5"][4] == "−4.00"
    assert by_index["3"][4] == "0"


@pytest.mark.parametrize(
    ("mine", "theirs", "pairs"),
    [
        ([0, 1, 2], [0, 1, 2], [(0, 0), (1, 1), (2, 2)]),
        ([0, 1, 2], [0, 2], [(0, 0), (1, None), (2, 1)]),
        ([0, 2], [0, 1, 2], [(0, 0), (None, 1), (1, 2)]),
        ([0, 1, 9], [0, 5, 6, 9], [(0, 0), (1, 1), (None, 2), (2, 3)]),
    ],
)
def test_tokens_are_put_side_by_side(mine: list[int], theirs: list[int], pairs: list[tuple[int | None, int | None]]) -> None:
    assert aligned(mine, theirs) == pairs


def test_what_differs_is_between_nothing_and_all() -> None:
    def hit(share: float | None, other: float | None) -> Hit:
        return Hit("s", 0, 0, 1.0 if share is None else 10 * share, 3.0 if other is None else 10 * other, share, other, None)

    assert difference([]) == 0
    assert difference([hit(0.5, 0.5)]) == 0
    assert difference([hit(0.5, 0.0), hit(0.0, 0.5)]) == 1
    assert difference([hit(0.5, 0.25), hit(0.5, 0.5)]) == pytest.approx(0.25)
    assert difference([hit(None, None)]) == pytest.approx(2 / 3)


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"text": " "}, "Type some text first"),
        ({"text": "x" * 40_001}, "at most 40000"),
        ({"saes": "sae:gone"}, "There is no SAE called &#39;gone&#39;"),
        ({"saes": "model:gone"}, "no SAEs of a model called &#39;gone&#39;"),
        ({"at": "x"}, "&#39;x&#39; is no token position"),
        ({"pick": "feature:1@y@z"}, "is no token position"),
        ({"pick": "feature:1"}, "is no feature at a token"),
    ],
)
@pytest.mark.usefixtures("asked")
def test_what_cannot_be_asked_gets_a_sentence_and_the_text_is_kept(client: TestClient, form: dict[str, str], says: str) -> None:
    page = client.post("/prompt", data={**FORM, **form})
    assert page.status_code == 422
    assert says in page.text
    assert {**FORM, **form}["text"] in page.text
    part = client.post("/prompt", data={**FORM, **form}, headers=PART)
    assert part.status_code == 200, "htmx swaps nothing else in"
    assert says in part.text
    assert "<html" not in part.text


def test_an_engine_that_is_away_says_so(client: TestClient) -> None:
    page = client.post("/prompt", data=FORM)
    assert "The engine does not answer; start it with <code>headscope engine</code>" in page.text
    assert client.get("/prompt").status_code == 200


# ---- the line ----


def test_while_it_waits_the_page_says_its_place_and_offers_to_cancel(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    tickets: list[str] = []
    cancelled: list[str] = []

    def leave(_: Live, ticket: str, *__: object) -> InLine:
        tickets.append(ticket)
        return InLine(ticket=ticket, place=2, answer=None)

    def look(_: Live, ticket: str, *__: object) -> InLine:
        if ticket != tickets[0] or cancelled:
            raise NotFound("The engine knows no question of that ticket.")
        return InLine(ticket=ticket, place=None, answer=answer_to(PromptQuestion(saes=[SAE], text="x")))

    monkeypatch.setattr(Live, "leave", leave)
    monkeypatch.setattr(Live, "look", look)
    monkeypatch.setattr(Live, "cancel", lambda _, ticket: cancelled.append(ticket))
    page = client.post("/prompt", data=FORM)
    assert "<b>2</b> questions before yours" in page.text
    assert f'name="ticket" value="{tickets[0]}"' in page.text
    assert len(tickets[0]) >= 20
    found = client.post("/prompt/look", data={**FORM, "ticket": tickets[0]})
    assert 'class="grid alone"' in found.text
    page = client.post("/prompt/look", data={**FORM, "ticket": tickets[0], "do": "cancel"})
    assert cancelled == tickets
    assert "Cancelled. The text is still here." in page.text
    assert FORM["text"] in page.text
    for ticket in (tickets[0], "x", ""):
        assert "ticket" in client.post("/prompt/look", data={**FORM, "ticket": ticket}).text


# ---- sharing ----


@pytest.mark.usefixtures("asked")
def test_a_prompt_is_stored_only_when_it_is_shared(maren: TestClient, peopled: Settings) -> None:
    def stored() -> int:
        with database_of(peopled) as db, db.read() as session:
            return session.scalar(sa.select(sa.func.count()).select_from(Prompt)) or 0

    maren.post("/prompt", data={**FORM, "pick": f"feature:3@3@{SAE}"})
    assert stored() == 0
    answer = maren.post("/prompt/share", data={**FORM, "at": "3", "feature": f"3@3@{SAE}", "days": "7"})
    assert (answer.status_code, stored()) == (303, 1)
    address = answer.headers["location"]
    assert re.fullmatch(r"/prompts/[A-Za-z0-9_-]{20,}", address)
    page = maren.get(address)
    assert FORM["text"] in page.text
    assert 'hx-trigger="submit, load"' in page.text
    assert f'<input type="hidden" name="feature" value="3@3@{SAE}">' in page.text
    told = maren.get(f"{address}.json").json()
    assert (told["text"], told["saes"], told["model"]) == (FORM["text"], [SAE], None)
    assert told["view"] == {"at": 3, "against_at": None, "feature": {"sae": SAE, "index": 3, "dest": 3}}
    left = datetime.fromisoformat(told["line"]["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=6.9) < left < timedelta(days=7.1)
    assert FORM["text"] in maren.get("/prompt").text
    assert maren.post(f"{address}/delete").status_code == 303
    assert (maren.get(address).status_code, stored()) == (404, 0)


@pytest.mark.parametrize(("days", "says"), [("0", "1 to 3650 days"), ("x", "no number of days"), ("99999", "1 to 3650")])
def test_a_share_that_cannot_be_gets_a_sentence(maren: TestClient, days: str, says: str) -> None:
    answer = maren.post("/prompt/share", data={**FORM, "days": days})
    assert answer.status_code == 422
    assert says in answer.text


def test_what_has_run_out_is_not_found_and_soon_deleted(peopled: Settings, maren: TestClient) -> None:
    with database_of(peopled) as db:
        with db.write() as session:
            door = find_sae(session, SAE)
            share = {"model": None, "doors": [door], "view": {"at": None, "against_at": None, "feature": None}}
            old = store.share(session, "old", None, visibility="shared", days=1, **share)
            kept = store.share(session, "kept", None, visibility="shared", days=None, **share)
            session.get_one(Prompt, old).expires_at = datetime.now(UTC) - timedelta(seconds=1)
        assert maren.get(f"/prompts/{old}").status_code == 404
        assert maren.get(f"/prompts/{kept}").status_code == 200
        with db.write() as session:
            store.share(session, "new", None, visibility="shared", days=1, **share)
            assert session.get(Prompt, old) is None


def test_a_shared_prompt_is_seen_by_those_it_is_shared_with_and_names_no_sae_that_they_do_not_see(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    lab = settle(at(tmp_path_factory.mktemp("lab")))
    with visitors(lab_app(lab.settings)) as people:
        addresses = {}
        for seen in ("private", "shared", "public"):
            form = {"text": f"told to {seen}", "saes": f"sae:{NAMES['private']}", "visibility": seen, "days": "30"}
            form["feature"] = f"3@1@{NAMES['private']}"
            answer = people["Ola"].post("/prompt/share", data=form)
            assert answer.status_code == 303, answer.text
            addresses[seen] = answer.headers["location"]
        assert people["Rita"].post("/prompt/share", data=form).status_code == 403
        assert people["Ines"].post("/prompt/share", data=form).status_code in (404, 422), "of an SAE that she does not see"
        found = {
            name: tuple(people[name].get(f"{address}.json").status_code for address in addresses.values())
            for name in ("Ola", "Ada", "Ines", "Rita", "anonymous")
        }
        everyone = {"Ola": (200, 200, 200), "Ada": (200, 200, 200), "Ines": (404, 200, 200), "Rita": (404, 200, 200)}
        assert found == {**everyone, "anonymous": (404, 404, 200)}
        told = people["anonymous"].get(f"{addresses['public']}.json")
        assert NAMES["private"] not in told.text
        assert told.json()["saes"] == []
        page = people["anonymous"].get(addresses["public"])
        assert "told to public" in page.text
        assert 'hx-trigger="submit, load"' not in page.text, "whoever may not ask is not made to"
        assert people["anonymous"].post("/prompt", data=FORM).status_code == 401
        assert people["Ines"].post(f"{addresses['shared']}/delete").status_code == 403
        assert people["Ines"].get(addresses["shared"]).status_code == 200
        assert people["Ola"].post(f"{addresses['shared']}/delete").status_code == 303
        assert people["Ada"].post(f"{addresses['private']}/delete").status_code == 303
        assert "told to" not in people["anonymous"].get("/prompt").text


def test_line_ends_are_those_that_were_typed() -> None:
    assert read_form({"text": "a\r\nb", "against": "c\r\nd"}).text == "a\nb"


def test_an_engine_that_leaves_in_between_says_so(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> InLine:
        raise EngineAway("The engine does not answer; start it with `headscope engine`, or `headscope up`.")

    monkeypatch.setattr(Live, "look", gone)
    page = client.post("/prompt/look", data={**FORM, "ticket": "a-ticket-of-somebody"})
    assert "start it with <code>headscope engine</code>" in page.text


def test_a_long_text_comes_a_page_at_a_time_and_keeps_what_is_looked_at(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["<|endoftext|>", *(f" word{i}" for i in range(1, 600))]

    def leave(_: Live, ticket: str, __: PromptQuestion, ___: float) -> InLine:
        found = LivePrompt(model="m", prompt=prompt_text(words, 1.0), against=None, attribution=None, written=None)
        return InLine(ticket=ticket, place=None, answer=found)

    monkeypatch.setattr(Live, "leave", leave)
    first = client.post("/prompt", data=FORM).text
    assert [row[0] for row in table_rows(first, "grid")] == [str(i) for i in range(256)]
    assert re.findall(r'value="from:(\d+)"', first) == ["0", "256", "512"]
    last = client.post("/prompt", data=FORM | {"at": "3", "pick": "from:512"}).text
    assert [row[0] for row in table_rows(last, "grid")] == [str(i) for i in range(512, 600)]
    assert 'name="begin" value="512"' in last
    assert len(table_rows(last, "fires")) == 2, "of token 3, which another page shows"
    there = client.post("/prompt", data=FORM | {"at": "300"}).text
    assert table_rows(there, "grid")[0][0] == "256", "a shared view opens where its token is"
