"""Circuits: what is drawn, the strongest ways, the page on an example, a shared prompt and typed text; circuit-tracer."""

import html
import json
import logging
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient
from pydantic import BaseModel, ConfigDict

from sae_core.errors import EngineAway, NotFound
from server.app import create_app
from server.circuits.asked import CircuitQuestion, FeatureRoot, LiveCircuit, LogitRoot, ScoreAt, place_id
from server.circuits.tracer import as_tracer
from server.circuits.view import View, drawn, said, strongest_paths
from server.live import InLine, Live
from server.pages.circuit import through
from server.settings import Settings
from server.store import transcoders
from server.store.prompts import ModelChoice, SaeChoice
from server.store.transcoders import TranscoderRecord
from server.tables import Prompt
from tests.web.circuit_answers import LOWER, OF_MLP, ROOT, TEXTS, UPPER, circuit_of, node, through_mlps
from tests.web.conftest import database_of
from tests.web.reading import PART, table_rows

SAE = "smollm2-l17"
HERE = f"/saes/{SAE}/features/3/circuit"
TYPED = {"text": "The tide came back", "saes": f"sae:{SAE}", "root": f"3@3@{SAE}"}
QUESTION = CircuitQuestion(saes=[SAE], text="The tide", root=FeatureRoot(sae=SAE, index=3, dest=3))


@pytest.fixture
def answer() -> LiveCircuit:
    return circuit_of(QUESTION)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[CircuitQuestion]:
    """What the engine was asked; it answers at once."""
    seen: list[CircuitQuestion] = []

    def leave(_: Live, ticket: str, question: CircuitQuestion, wait: float) -> InLine:
        assert wait > 0
        seen.append(question)
        return InLine(ticket=ticket, place=None, answer=None, circuit=circuit_of(question))

    def answer(_: Live, question: CircuitQuestion) -> LiveCircuit:
        seen.append(question)
        return circuit_of(question)

    monkeypatch.setattr(Live, "leave_circuit", leave)
    monkeypatch.setattr(Live, "circuit", answer)
    return seen


# ---- what is drawn ----


def test_ids_are_those_that_the_text_of_the_module_names() -> None:
    assert place_id("feature", 17, 8, 755, "") == "f17.755@8"
    assert place_id("error", 17, 8, -1, "") == "e17@8"
    assert place_id("MLP feature", 10, 8, 33, "") == "t10.33@8"
    assert place_id("MLP error", 10, 8, -1, "") == "u10@8"
    assert place_id("embedding", -1, 8, -1, "") == "x@8"
    assert place_id("bias", -1, -1, -1, "SAE bias") == "b:SAE-bias"
    assert place_id("logit", 30, 9, 504, "31") == "l504-31@9"


def test_everything_is_drawn_and_the_smallest_left_out_first(answer: LiveCircuit) -> None:
    whole = drawn(answer, View())
    assert {node.id for node in whole.nodes} == {node.id for node in answer.nodes}
    assert len(whole.edges) == len(answer.edges)
    few = drawn(answer, View(pins=LOWER), most=4)
    assert {node.id for node in few.nodes} == {ROOT, UPPER, LOWER, "x@1"}
    assert few.hidden == 3
    assert next(node for node in few.nodes if node.id == LOWER).pinned


def test_a_closed_node_hides_what_comes_through_it_alone(answer: LiveCircuit) -> None:
    shut = drawn(answer, View(closed=UPPER))
    assert {node.id for node in shut.nodes} == {ROOT, UPPER, "m2@2", "b:SAE-bias"}
    assert {edge.target for edge in shut.edges} == {ROOT}


def test_a_group_is_one_node_with_the_sum_of_its_own(answer: LiveCircuit) -> None:
    view = View(groups=f"tides:{UPPER},m2@2")
    found = drawn(answer, view)
    group = next(node for node in found.nodes if node.kind == "group")
    assert (group.label, group.members, group.effect) == ("tides", (UPPER, "m2@2"), pytest.approx(1.6))
    into = {(edge.source, edge.target): edge.effect for edge in found.edges}
    assert into[("g:tides", ROOT)] == pytest.approx(1.6)
    assert into[("x@1", "g:tides")] == pytest.approx(0.75)


def test_of_a_negative_root_shares_are_of_its_own_sign(answer: LiveCircuit) -> None:
    """The root -2: what held it down is a positive share, and widths and sizes are as those of the root 2."""
    nodes = [node.model_copy(update={"effect": -node.effect}) for node in answer.nodes]
    edges = [edge.model_copy(update={"effect": -edge.effect}) for edge in answer.edges]
    found = drawn(answer.model_copy(update={"nodes": nodes, "edges": edges}), View())
    shares = {node.id: (node.effect, node.share) for node in found.nodes}
    assert shares[ROOT] == (-2.0, 1.0)
    assert shares["x@1"] == (-0.75, pytest.approx(0.375))
    assert shares["b:SAE-bias"] == (0.2, pytest.approx(-0.1))
    assert {node.id: node.share for node in found.nodes} == {node.id: node.share for node in answer.nodes}
    assert [edge.share for edge in found.edges] == [edge.share for edge in drawn(answer, View()).edges]
    assert next(edge for edge in found.edges if edge.source == "m2@2").effect == -0.6


def test_the_view_goes_through_its_address(answer: LiveCircuit) -> None:
    view = View.model_validate(View(pins="x@1").toggled("pins", UPPER))
    assert view.pinned == ("x@1", UPPER)
    assert View.model_validate(view.toggled("pins", "x@1")).pinned == (UPPER,)
    view = View.model_validate(view.regrouped("a;b:c,", LOWER))
    assert view.grouped == {"a b c": (LOWER,)}
    view = View.model_validate(view.regrouped("other", LOWER))
    assert view.grouped == {"other": (LOWER,)}
    assert View.model_validate(view.regrouped("", LOWER)).grouped == {}
    assert View().asked() == {}
    picked = View(edge="x@1", head=3, lead=True).picking(UPPER)
    assert picked == {"pick": UPPER}
    assert said(answer.nodes[0], answer) == "feature 3 of layer 17 at 3 ' came'"


def test_the_strongest_ways_are_those_of_all_that_there_are(answer: LiveCircuit) -> None:
    edges: dict[str, list[tuple[str, float]]] = {}
    for edge in answer.edges:
        edges.setdefault(edge.target, []).append((edge.source, edge.share))

    def every(at: str) -> Iterator[tuple[tuple[str, ...], float]]:
        for source, share in edges.get(at, ()):
            below = list(every(source)) or [((source,), 1.0)]
            yield from (((at, *ids) if ids[0] == source else (at, source, *ids[1:]), share * product) for ids, product in below)

    known = sorted(every(ROOT), key=lambda way: -abs(way[1]))
    found = strongest_paths(answer)
    assert [(path.ids, pytest.approx(path.share)) for path in found[: len(known)]] == known
    assert known[0] == ((ROOT, UPPER, "x@1"), pytest.approx(0.375))
    followed = [node.model_copy(update={"followed": node.followed or node.id == LOWER}) for node in answer.nodes]
    assert strongest_paths(answer.model_copy(update={"nodes": followed})) == found, "one of which nothing is listed is an end"
    two = strongest_paths(answer, most=2)
    assert [path.ids for path in two] == [known[0][0], known[1][0], (ROOT, UPPER, LOWER)]


def test_one_sae_of_each_layer_is_gone_through_and_first_the_one_asked_about() -> None:
    def choice(name: str, layer: int, *, harvested: bool = True) -> SaeChoice:
        return SaeChoice(name, layer, 16, harvested)

    model = ModelChoice("m", (choice("a", 3, harvested=False), choice("b", 3), choice("c", 3), choice("d", 9)))
    assert through([model], "model:m", None) == ["b", "d"]
    assert through([model], "sae:c", None) == ["c", "d"]
    assert through([model], "model:m", "a") == ["a", "d"]
    with pytest.raises(NotFound, match="called 'x'"):
        through([model], "model:x", None)
    with pytest.raises(NotFound, match="not shared with you"):
        through([model], "sae:", None)


# ---- the page ----


def test_an_examples_graph_has_an_address_and_every_step_leads_to_one(client: TestClient, asked: list[CircuitQuestion]) -> None:
    page = client.get(HERE)
    assert page.status_code == 200
    root = asked[0].root
    assert isinstance(root, FeatureRoot)
    assert (root.sae, root.index, asked[0].text, asked[0].share) == (SAE, 3, None, 0.005)
    assert asked[0].tokens is not None
    nodes = table_rows(page.text, "circuit-edges")
    assert [row[0] for row in nodes] == ["11.5", "MLP 2", "SAE bias"]
    assert [row[3] for row in nodes] == ["+1.00", "+0.600", "−0.200"]
    assert "1.40 + 0.60 from 7 smaller parts = 2.00" in re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page.text))
    assert page.text.count('data-node="') == 2 * 7, "in the drawing and in the table"
    address = re.search(rf'href="({re.escape(HERE)}[^"]*pick={re.escape("f11.5%401")}[^"]*)"', page.text)
    assert address is not None
    picked = client.get(address[1].replace("&amp;", "&"))
    assert [row[0] for row in table_rows(picked.text, "circuit-edges")] == ["embedding", "8.2", "error 8"]
    assert 'aria-current="true"' in picked.text
    part = client.get(address[1].replace("&amp;", "&"), headers=PART)
    assert "<html" not in part.text
    told = client.get(f"{HERE}.json?rank=0&depth=2").json()
    assert (told["view"]["depth"], told["answer"]["root"]) == (2, ROOT)
    assert asked[-1].depth == 2
    assert told["paths"][0]["ids"] == [ROOT, UPPER, "x@1"]


def test_an_edge_is_opened_by_head_with_the_score_behind_it(client: TestClient, asked: list[CircuitQuestion]) -> None:
    page = client.get(HERE, params={"pick": ROOT, "edge": UPPER, "lead": "1"})
    assert asked[-1].score == ScoreAt(layer=17, head=None, dest=3, src=1, against_mean=True)
    rows = table_rows(page.text, "heads")
    assert [row[0] for row in rows[:2]] == ["0", "1"]
    assert rows[0][2:] == ["+1.25", "50 %", "+1.25", "+1.00"]
    assert "Why head 17.0 looked from" in page.text
    client.get(HERE, params={"pick": ROOT, "edge": UPPER, "head": 1})
    assert asked[-1].score is not None
    assert asked[-1].score.head == 1
    client.get(HERE, params={"pick": ROOT, "edge": "b:SAE-bias"})
    assert asked[-1].score is None, "no head carried a bias"


@pytest.fixture
def with_mlps(monkeypatch: pytest.MonkeyPatch, asked: list[CircuitQuestion]) -> None:
    """The model has a transcoder of layer 2, and the engine goes through it where it is asked to."""
    there = TranscoderRecord("smollm2-135m", 2, 16, {}, "transcoders/x.safetensors", "0" * 64)
    monkeypatch.setattr(transcoders, "of_model", lambda _, model: [there] if model == "smollm2-135m" else [])

    def answered(question: CircuitQuestion) -> LiveCircuit:
        asked.append(question)
        return through_mlps(question) if question.transcoders else circuit_of(question)

    def leave(_: Live, ticket: str, question: CircuitQuestion, __: float) -> InLine:
        return InLine(ticket=ticket, place=None, answer=None, circuit=answered(question))

    monkeypatch.setattr(Live, "circuit", lambda _, question: answered(question))
    monkeypatch.setattr(Live, "leave_circuit", leave)


@pytest.mark.usefixtures("with_mlps")
def test_features_of_mlps_are_nodes_like_others_and_can_be_left_whole(client: TestClient, asked: list[CircuitQuestion]) -> None:
    page = client.get(HERE).text
    assert asked[-1].transcoders
    assert [row[0] for row in table_rows(page, "circuit-edges")] == ["11.5", "SAE bias", "MLP 2.4", "MLP error 2"]
    assert "and 1 transcoder (2)" in page
    assert page.count("feature of an MLP") == 1, "the key has its form"
    drawn_one = re.search(rf'<a class="([^"]*)"[^>]*data-node="{OF_MLP}"', page)
    assert drawn_one is not None
    assert {"MLP-feature", "followed"} <= set(drawn_one[1].split())
    assert re.search(r"<title>feature 4 of MLP 2 at 2 [^<]*tide[^<]*: 25[^<]* of the root</title>", page)
    picked = client.get(HERE, params={"pick": OF_MLP, "pins": OF_MLP, "groups": f"tides:{UPPER},u2@2"}).text
    assert [row[0] for row in table_rows(picked, "circuit-edges")] == ["embedding"]
    assert "1.20 + 0.30 from 7 smaller parts = 1.50" in re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", picked))
    assert "begin here" not in picked.split('id="picked"')[1].split("</section>")[0]
    assert "group tides of 2 nodes" in picked
    assert (ROOT, OF_MLP, "x@2") in [path.ids for path in strongest_paths(through_mlps(QUESTION))]
    choice = re.search(r'<select name="mlps">.*?</select>', page)
    assert choice is not None
    assert '<option value="1" selected>' in choice[0]
    whole = client.get(HERE, params={"mlps": "0"}).text
    assert not asked[-1].transcoders
    assert [row[0] for row in table_rows(whole, "circuit-edges")] == ["11.5", "MLP 2", "SAE bias"]
    assert '<option value="0" selected>' in whole
    assert "mlps=0" in whole, "every step keeps it"
    assert "whole, as was asked" in client.get(HERE, params={"mlps": "0", "pick": "m2@2"}).text


def test_without_transcoders_nothing_is_said_of_them(client: TestClient, asked: list[CircuitQuestion]) -> None:
    page = client.get(HERE).text
    assert 'name="mlps"' not in page
    assert "feature of an MLP" not in page
    assert "there is no transcoder of this one" in client.get(HERE, params={"pick": "m2@2"}).text
    assert asked[-1].transcoders


def test_naming_a_group_leads_to_its_permalink(client: TestClient, asked: list[CircuitQuestion]) -> None:
    answer = client.get(HERE, params={"do": "group", "name": "tides", "at": UPPER, "share": "0.01"}, follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"] == f"{HERE}?band=0&rank=0&share=0.01&groups=tides%3Af11.5%401"
    page = client.get(answer.headers["location"])
    assert "group tides" in page.text
    answer = client.get(HERE, params={"do": "logit", "after": "2", "token": " in", "pick": UPPER}, follow_redirects=False)
    client.get(answer.headers["location"])
    assert asked[-1].root == LogitRoot(kind="logit", dest=2, text=" in")


def test_typed_text_goes_by_post_and_is_stored_only_when_it_is_shared(
    maren: TestClient, asked: list[CircuitQuestion], peopled: Settings
) -> None:
    def stored() -> int:
        with database_of(peopled) as db, db.read() as session:
            return session.scalar(sa.select(sa.func.count()).select_from(Prompt)) or 0

    page = maren.post("/circuit", data=TYPED)
    assert (asked[-1].text, asked[-1].root) == (TYPED["text"], FeatureRoot(sae=SAE, index=3, dest=3))
    assert f'name="go" value="root={"3%403%40" + SAE}&amp;pick={"f11.5%401"}"' in page.text
    assert "tide+came" not in page.text
    assert "tide%20came" not in page.text, "a text is in no address"
    step = maren.post("/circuit", data={**TYPED, "go": f"root=3%403%40{SAE}&pick=f11.5%401"})
    assert [row[0] for row in table_rows(step.text, "circuit-edges")] == ["embedding", "8.2", "error 8"]
    assert stored() == 0
    answer = maren.post("/circuit/share", data={**TYPED, "pick": UPPER, "days": "7"})
    assert (answer.status_code, stored()) == (303, 1)
    address = answer.headers["location"]
    assert re.fullmatch(r"/prompts/[A-Za-z0-9_-]{20,}/circuit\?root=3%403%40smollm2-l17&pick=f11.5%401", address)
    page = maren.get(address)
    assert page.status_code == 200
    assert asked[-1].text == TYPED["text"]
    maren.post(address.partition("/circuit")[0] + "/delete")
    assert maren.get(address).status_code == 404


def test_typed_text_is_in_no_log(filled: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """With every logger at its most talkative, whether the question is answered, refused or meets no engine."""
    caplog.set_level(logging.DEBUG)
    secret = "quixotic"  # pragma: allowlist secret
    app = create_app(filled)
    with TestClient(app, base_url="http://127.0.0.1:8000", follow_redirects=False) as client:
        for path, data in (
            ("/circuit", {**TYPED, "text": f"The {secret} tide"}),
            ("/circuit", {**TYPED, "text": f"The {secret} tide", "root": f"{secret}@x"}),
            ("/circuit", {**TYPED, "text": secret * 20_000}),
            ("/circuit", {**TYPED, "text": f"The {secret} tide", "share": secret}),
            ("/circuit/look", {**TYPED, "text": f"The {secret} tide", "ticket": secret}),
            ("/prompt", {"text": f"The {secret} tide", "saes": f"sae:{SAE}"}),
            ("/interventions", {"text": f"The {secret} tide", "f.0.sae": SAE, "f.0.index": "3", "f.0.value": secret}),
        ):
            assert client.post(path, data=data).status_code in (200, 422, 503), path
        question = {"saes": [SAE], "text": f"The {secret} tide", "root": {"sae": SAE, "index": 3, "dest": secret}}
        assert client.post("/api/v1/live/circuit", json=question).status_code == 422
    assert any(record.name.startswith("headscope") for record in caplog.records)
    told = [f"{record.getMessage()} {record.exc_text or ''} {vars(record)}" for record in caplog.records]
    assert [one for one in told if secret in one] == []


def test_while_it_waits_the_page_says_its_place_and_offers_to_cancel(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    tickets: list[str] = []
    cancelled: list[str] = []

    def leave(_: Live, ticket: str, *__: object) -> InLine:
        tickets.append(ticket)
        return InLine(ticket=ticket, place=2, answer=None)

    monkeypatch.setattr(Live, "leave_circuit", leave)
    monkeypatch.setattr(
        Live, "look", lambda _, ticket, __: InLine(ticket=ticket, place=None, answer=None, circuit=circuit_of(QUESTION))
    )
    monkeypatch.setattr(Live, "cancel", lambda _, ticket: cancelled.append(ticket))
    waiting = [client.post("/circuit", data=TYPED), client.get(f"{HERE}?share=0.01")]
    for page, ticket in zip(waiting, tickets, strict=True):
        assert "<b>2</b> questions before yours" in page.text
        assert page.text.split('name="ticket" value="')[1].split('"')[0] == ticket
    assert 'id="nodes"' in client.post("/circuit/look", data={**TYPED, "ticket": tickets[0]}).text
    # Where there is an address, what comes has it: the engine keeps the answer for the moment that this takes.
    there = {"sae": SAE, "index": "3", "band": "0", "rank": "0", "share": "0.01", "ticket": tickets[1]}
    found = client.post("/circuit/look", data=there)
    assert (found.status_code, found.headers["location"]) == (303, f"{HERE}?band=0&rank=0&share=0.01")
    page = client.post("/circuit/look", data={**TYPED, "ticket": tickets[0], "do": "cancel"})
    assert cancelled == tickets[:1]
    assert "Cancelled. The text is still here." in page.text
    assert TYPED["text"] in page.text
    # One that was dropped is a sentence beside the form, and a question of another kind is none of ours.
    monkeypatch.setattr(Live, "look", lambda _, ticket, __: InLine(ticket=ticket, place=None, answer=None))
    page = client.post("/circuit/look", data=there)
    assert (page.status_code, "another kind of question" in page.text, "Trace again" in page.text) == (422, True, True)


def test_enter_does_what_the_field_is_for(client: TestClient, asked: list[CircuitQuestion]) -> None:
    root = {"root": f"3@3@{SAE}", "do": "show"}
    told = [client.get(HERE, params={**root, **typed}).headers["location"] for typed in (
        {"after": "2"}, {"token": " sea"}, {"name": "tides", "at": UPPER}, {"share": "0.02"},
    )]  # fmt: skip
    roots = [root for one in told for root in re.findall(r"root=([^&]*)", one)]
    assert roots == ["next%402", "next%40", f"3%403%40{SAE}", f"3%403%40{SAE}"]
    assert "token=+sea" in told[1]
    assert "groups=tides" in told[2]
    assert asked == []


@pytest.mark.usefixtures("asked")
def test_the_drawing_has_files_where_its_page_has_an_address(client: TestClient) -> None:
    page = client.get(f"{HERE}?share=0.01").text
    files = [html.unescape(one) for one in re.findall(r'href="(\?[^"]*figure=[^"]*)"', page)]
    assert [one.rpartition(".")[2] for one in files] == ["svg", "csv"]
    for one in files:
        assert "share=0.01" in one
        assert client.get(HERE + one).status_code == 200
    assert "figure=" not in client.post("/circuit", data=TYPED).text
    assert "this page as JSON" not in client.post("/circuit", data=TYPED).text
    assert f'{HERE}.json?band=0&amp;rank=0&amp;share=0.01"' in page


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"text": " "}, "Type some text first"),
        ({"text": "x" * 40_001}, "at most 40000"),
        ({"saes": "model:gone", "root": "next@"}, "no SAE or model called &#39;gone&#39;"),
        ({"root": "x@y"}, "is no place to begin at"),
        ({"root": f"99999@3@{SAE}"}, "Feature 99999 does not exist"),
        ({"root": "3@3@gone"}, "There is no SAE called &#39;gone&#39;"),
        ({"share": "7"}, "share: Input should be less than or equal to 1"),
        ({"do": "logit", "after": "x"}, "is no token position"),
        ({"do": "logit", "after": "9" * 400}, "is no token position"),
        ({"do": "group", "name": "n" * 40, "at": "x" * 4000}, "groups: String should have at most 4000 characters"),
    ],
)
@pytest.mark.usefixtures("asked")
def test_what_cannot_be_asked_gets_a_sentence(client: TestClient, form: dict[str, str], says: str) -> None:
    page = client.post("/circuit", data={**TYPED, **form})
    assert page.status_code == 422
    assert says in page.text


def test_an_engine_that_is_away_says_so(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> InLine:
        raise EngineAway("The engine does not answer; start it with `headscope engine`, or `headscope up`.")

    monkeypatch.setattr(Live, "leave_circuit", away)
    monkeypatch.setattr(Live, "circuit", away)
    page, twin = client.get(HERE), client.get(f"/saes/{SAE}/features/3/circuit.json")
    assert "The engine does not answer; start it with <code>headscope engine</code>" in page.text
    assert (page.status_code, twin.status_code, twin.json()["error"]["code"]) == (503, 503, "engine_away")
    assert int(page.headers["Retry-After"]) > 0 < int(twin.headers["Retry-After"])
    assert client.get(f"/saes/{SAE}/features/3/circuit?rank=999").status_code == 404


def test_the_pages_with_a_feature_in_a_text_lead_to_its_circuit(client: TestClient) -> None:
    page = client.get(f"/saes/{SAE}/features/3/examples/0/0")
    assert f'href="{HERE}?band=0&amp;rank=0"' in page.text


# ---- circuit-tracer's form ----


class Metadata(BaseModel):
    """Fields and types as circuit-tracer 0.5's `graph_models.py` declares them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    slug: str
    scan: str
    transcoder_list: list[str]
    prompt_tokens: list[str]
    prompt: str
    node_threshold: float | None
    schema_version: int | None


class QParams(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    pinnedIds: list[str]
    supernodes: list[list[str]]
    linkType: str
    clickedId: str
    sg_pos: str


class Node(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    node_id: str
    feature: int
    layer: str
    ctx_idx: int
    feature_type: str
    token_prob: float
    is_target_logit: bool
    run_idx: int
    reverse_ctx_idx: int
    jsNodeId: str
    clerp: str
    influence: float | None
    activation: float | None


class Link(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    source: str
    target: str
    weight: float


class Graph(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    metadata: Metadata
    qParams: QParams
    nodes: list[Node]
    links: list[Link]


@pytest.mark.usefixtures("asked")
def test_the_export_is_what_circuit_tracers_viewer_reads(client: TestClient) -> None:
    answer = client.get(HERE, params={"as": "circuit-tracer", "pins": UPPER, "groups": f"tides:{LOWER},x@1"})
    assert re.search(r'filename="smollm2-135m-feature-3[^"]*\.json"', answer.headers["content-disposition"])
    graph = Graph.model_validate_json(answer.text)
    ids = [node.node_id for node in graph.nodes]
    assert len(ids) == len(set(ids)) == 7
    assert {link.source for link in graph.links} | {link.target for link in graph.links} <= set(ids)
    assert graph.qParams.pinnedIds == ["11_5_1"]
    assert graph.qParams.supernodes == [["tides", "8_2_0", "E_504_1"]]
    assert graph.qParams.clickedId == "17_3_3"
    assert graph.metadata.prompt_tokens == TEXTS
    by_id = {node.node_id: node for node in graph.nodes}
    assert (by_id["E_504_1"].layer, by_id["error_8_1"].feature_type) == ("E", "attention reconstruction error")
    # The viewer takes layer and index apart again: the inverse of Cantor's pairing.
    z = by_id["17_3_3"].feature
    w = int(((8 * z + 1) ** 0.5 - 1) // 2)
    assert (w - (z - w * (w + 1) // 2), z - w * (w + 1) // 2) == (17, 3)
    assert next(link.weight for link in graph.links if link.source == "E_504_1") == 3.0
    typed = client.post("/circuit", data={**TYPED, "do": "export"})
    assert Graph.model_validate_json(typed.text).metadata.prompt == " ".join(["The", "tide", "came", "back"])


def test_features_of_mlps_are_the_viewers_own_kind() -> None:
    graph = Graph.model_validate_json(json.dumps(as_tracer(through_mlps(QUESTION), View(pins=OF_MLP), slug="x", labels={})))
    by_id = {node.node_id: node for node in graph.nodes}
    assert len(by_id) == len(graph.nodes)
    assert (by_id["2_4_2"].feature_type, by_id["2_4_2"].feature, by_id["2_4_2"].layer) == ("cross layer transcoder", 25, "2")
    assert by_id["error_2_2"].feature_type == "mlp reconstruction error"
    assert by_id[ROOT].feature_type == "attention feature"
    assert graph.qParams.pinnedIds == ["2_4_2"]


def test_an_error_is_not_taken_for_a_feature_of_layer_0(answer: LiveCircuit) -> None:
    more = answer.model_copy(update={"nodes": [*answer.nodes, node("f0.8@1", 0.01)]})
    graph = Graph.model_validate_json(json.dumps(as_tracer(more, View(), slug="x", labels={})))
    ids = [one.node_id for one in graph.nodes]
    assert len(ids) == len(set(ids)) == 8
    assert {"0_8_1", "error_8_1"} <= set(ids)


def test_a_logits_node_has_its_probability_where_the_viewer_looks_for_it() -> None:
    answer = circuit_of(CircuitQuestion(saes=[SAE], text="The tide", root=LogitRoot(kind="logit")))
    graph = Graph.model_validate_json(json.dumps(as_tracer(answer, View(), slug="x", labels={})))
    logit = graph.nodes[0]
    assert (logit.layer, logit.is_target_logit, logit.token_prob) == ("31", True, 0.25)
    assert logit.clerp.split("(p=")[1].split(")")[0] == "0.250"
    assert {link.target for link in graph.links} >= {logit.node_id}
    assert all(a.layer == "E" or b.layer == "E" or int(a.layer) >= int(b.layer) for a, b in pairwise(graph.nodes[:3]))
