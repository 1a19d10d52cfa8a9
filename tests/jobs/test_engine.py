"""Live questions: the engine's answers, its door, and the web's client."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient

from sae_core.config import SAEConfig, Site
from sae_core.errors import EngineAway, NotFound, SAEMismatch, UsageError
from sae_core.saes import ARCHITECTURES, save_sae
from sae_core.saes.base import shapes
from server.app import create_app
from server.engine import Engine, answer, answer_components, create_engine
from server.live import (
    SECRET_HEADER,
    ComponentsQuestion,
    FiringQuestion,
    Live,
    LiveQuestion,
    SourcesQuestion,
    TextQuestion,
)
from server.settings import Settings
from server.store import registry
from tests.jobs.conftest import Home
from tests.web.conftest import listened
from tests.web.peer import client_finds

QUESTION = LiveQuestion(sae="hand", index=3, text="the cat sat on the mat")


@pytest.fixture
def engine(home: Home) -> Engine:
    """An engine on the tiny model with an SAE drawn at random."""
    from sae_core.lens import load_lens

    with home.db.read() as session:
        model = registry.model(session, "tiny")
    lens = load_lens(model.source, name="tiny", device="cpu", cache=home.settings.cache)
    cfg = SAEConfig(
        arch="batchtopk", d_in=lens.info.d_in, d_sae=16, k=4, n_heads=lens.info.n_heads, d_head=lens.info.d_head,
        site=Site(layer=1), model="tiny", model_fingerprint=lens.info.fingerprint, processing=lens.info.processing,
        scale=1.0, max_norm=None, context=32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes(cfg).items()}
    folder = home.settings.data / "saes" / "hand"
    sha256 = save_sae(ARCHITECTURES["batchtopk"](cfg, tensors), folder)
    with home.db.write() as session:
        registry.upsert_sae(
            session, job_id="j", name="hand", model_id=model.id, config=cfg, metrics={}, folder="saes/hand", sha256=sha256
        )
    return Engine(home.settings.model_copy(update={"device": "cpu"}), home.db)


def test_an_answer_accounts_for_its_own_pre_activation(engine: Engine) -> None:
    answer = engine.attribute(QUESTION)
    total = sum(map(sum, answer.dfa)) + answer.bias
    size = sum(abs(value) for row in answer.dfa for value in row) + abs(answer.bias)
    assert abs(total - answer.preacts[answer.dest]) <= 1e-4 * size
    assert answer.gap <= 1e-4
    assert (len(answer.dfa), len(answer.dfa[0])) == (4, len(answer.tokens))
    assert "".join(answer.texts[1:]) == QUESTION.text
    assert all(value == 0 for row in answer.dfa for value in row[answer.dest + 1 :]), "nothing comes from later tokens"


def test_what_fires_is_what_each_feature_answers_on_its_own(engine: Engine) -> None:
    found = engine.firings(FiringQuestion(sae="hand", text=QUESTION.text, features=list(range(16)), top=3))
    alone = {index: engine.attribute(QUESTION.model_copy(update={"index": index})) for index in range(16)}
    for one in found.features:
        assert one.activations == pytest.approx(alone[one.index].activations, rel=1e-5, abs=1e-5)
    assert found.excluded == alone[0].excluded
    assert found.by_position[0] == []
    for position, strongest in enumerate(found.by_position):
        acts = sorted((alone[index].activations[position] for index in range(16)), reverse=True)
        assert [one.activation for one in strongest] == pytest.approx([act for act in acts[:3] if act > 0], rel=1e-5, abs=1e-5)
    best = sorted((max(answer.activations) for answer in alone.values()), reverse=True)[:3]
    assert [one.activation for one in found.strongest] == pytest.approx(best, rel=1e-5, abs=1e-5)
    assert len({one.index for one in found.strongest}) == 3
    with pytest.raises(NotFound, match="features 0 to 15"):
        engine.firings(FiringQuestion(sae="hand", text=QUESTION.text, features=[16]))


def test_the_destination_is_the_strongest_allowed_one_unless_given(engine: Engine) -> None:
    answer = engine.attribute(QUESTION)
    allowed = [value for value, excluded in zip(answer.preacts, answer.excluded, strict=True) if not excluded]
    assert answer.preacts[answer.dest] == max(allowed)
    assert answer.excluded[0]
    assert engine.attribute(QUESTION.model_copy(update={"dest": 2})).dest == 2


def test_a_row_start_within_the_text_is_no_destination(engine: Engine) -> None:
    tokens = engine.attribute(QUESTION).tokens
    packed = [*tokens[:3], tokens[0], *tokens[3:]]
    answer = engine.attribute(LiveQuestion(sae="hand", index=3, tokens=packed))
    assert [position for position, excluded in enumerate(answer.excluded) if excluded] == [0, 3]
    assert answer.activations[3] == 0
    assert answer.dest != 3


def test_tokens_and_text_give_the_same_answer(engine: Engine) -> None:
    answer = engine.attribute(QUESTION)
    tokens = LiveQuestion(sae="hand", index=3, tokens=answer.tokens)
    assert engine.attribute(tokens) == answer


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"text": "word " * 2000}, UsageError, "at most"),
        ({"text": ""}, UsageError, "no text"),
        ({"index": 16}, NotFound, "features 0 to 15"),
        ({"dest": 99}, UsageError, "no 99"),
        ({"sae": "nix"}, NotFound, "no SAE nix"),
        ({"text": None, "tokens": [0, 10**6]}, UsageError, "tokens 0 to"),
    ],
)
def test_what_cannot_be_asked_gets_a_sentence(
    engine: Engine, change: dict[str, object], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        engine.attribute(QUESTION.model_copy(update=change))


def test_it_lets_go_of_its_model_when_nobody_asks_and_loads_it_again(engine: Engine) -> None:
    assert engine.loaded is None
    first = engine.attribute(QUESTION)
    assert engine.loaded == "tiny"
    assert not engine.rest()
    engine.settings.engine_idle_seconds = 0.0
    assert engine.rest()
    assert engine.loaded is None
    assert engine.attribute(QUESTION) == first


def test_an_sae_whose_model_has_changed_is_refused(engine: Engine, home: Home, tmp_path: Path) -> None:
    from tests.core.tiny_models import save_tiny

    other = save_tiny("llama", tmp_path / "other", seed=9)
    with home.db.write() as session:
        other_id = registry.add_model(session, "other", registry.ModelSource(location=str(other))).id
        sae = registry.sae(session, "hand")
        registry.upsert_sae(
            session,
            job_id="j",
            name="hand",
            model_id=other_id,
            config=sae.config,
            metrics={},
            folder=sae.folder,
            sha256=sae.sha256,
        )
    with pytest.raises(SAEMismatch, match="other weights"):
        engine.attribute(QUESTION)


# ---- over the wire ----


def test_only_who_knows_the_secret_is_answered(engine: Engine) -> None:
    with TestClient(create_engine(engine.settings, engine.db)) as client:
        assert client.get("/health").status_code == 403
        assert client.get("/health", headers={SECRET_HEADER: "guess"}).status_code == 403
        assert client.get("/health", headers={SECRET_HEADER: engine.settings.secret}).json() == {"model": None}


@pytest.fixture
def served(engine: Engine) -> Iterator[Settings]:
    """The engine on a real port."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    settings = engine.settings.model_copy(update={"engine_port": listening.getsockname()[1]})
    server = uvicorn.Server(uvicorn.Config(create_engine(settings, engine.db), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield settings
    server.should_exit = True
    thread.join()
    listening.close()


def test_the_web_gets_typed_answers_and_the_very_errors(engine: Engine, served: Settings) -> None:
    live = Live(served)
    assert live.loaded() is None
    assert live.attribute(QUESTION) == engine.attribute(QUESTION)
    assert live.loaded() == "tiny"
    asked = ComponentsQuestion(sae="hand", index=3, text=QUESTION.text, head=2)
    assert live.components(asked) == engine.components(asked)
    with pytest.raises(NotFound, match="features 0 to 15") as caught:
        live.attribute(QUESTION.model_copy(update={"index": 99}))
    assert (caught.value.field, caught.value.status) == ("index", 404)
    live.close()


def test_an_engine_that_is_away_is_said_to_be_away(settings: Settings) -> None:
    live = Live(settings.model_copy(update={"engine_port": 1}))
    with pytest.raises(EngineAway, match="headscope engine"):
        live.attribute(QUESTION)
    live.close()


# ---- the value bias apart ----


def test_the_value_bias_apart_leaves_the_sum_as_it_was(engine: Engine) -> None:
    # The tiny Llama has a bias on its values; what it gave is no merit of any source.
    whole, apart = engine.attribute(QUESTION), engine.attribute(QUESTION.model_copy(update={"split_bias": True}))
    assert whole.value_bias is None
    assert apart.value_bias is not None
    assert min(abs(value) for value in apart.value_bias) > 1e-4
    for head, (before, after, constant) in enumerate(zip(whole.dfa, apart.dfa, apart.value_bias, strict=True)):
        assert sum(after) + constant == pytest.approx(sum(before), abs=1e-4), head
        assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-4
    assert apart.gap <= 1e-4


# ---- components ----


def test_components_account_for_the_pre_activation_and_for_every_sources_dfa(engine: Engine) -> None:
    question = ComponentsQuestion(sae="hand", index=3, text=QUESTION.text)
    parts, whole = engine.components(question), engine.attribute(QUESTION)
    assert parts.names == ["embedding", "attention 0", "MLP 0", "value bias"]
    assert (parts.dest, parts.texts) == (whole.dest, whole.texts)
    assert parts.preact == pytest.approx(whole.preacts[whole.dest], rel=1e-4)
    size = sum(abs(value) for row in parts.given for value in row) + abs(parts.bias)
    assert abs(sum(map(sum, parts.given)) + parts.bias - parts.preact) <= 1e-4 * size
    assert parts.gap <= 1e-4
    for source in range(len(parts.texts)):
        given = sum(row[source] for row in parts.given)
        assert given == pytest.approx(sum(row[source] for row in whole.dfa), abs=1e-4 * size)
        assert given == pytest.approx(parts.dfa[source], abs=1e-4 * size)
    for row, by_head in zip(parts.given, parts.by_head, strict=True):
        assert sum(by_head) == pytest.approx(sum(row), abs=1e-4 * size)


def test_components_of_one_head_sum_to_its_dfa(engine: Engine) -> None:
    whole = engine.attribute(QUESTION)
    for head in range(4):
        parts = engine.components(ComponentsQuestion(sae="hand", index=3, text=QUESTION.text, head=head))
        assert parts.dfa == pytest.approx(whole.dfa[head], abs=1e-4)
        assert [sum(given) for given in zip(*parts.given, strict=True)] == pytest.approx(whole.dfa[head], abs=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"head": 4}, UsageError, "heads 0 to 3; there is no 4"),
        ({"dest": 99}, UsageError, "no 99"),
        ({"index": 16}, NotFound, "15"),
    ],
)
def test_components_that_cannot_be_had_get_a_sentence(
    engine: Engine, change: dict[str, object], error: type[Exception], said: str
) -> None:
    question = ComponentsQuestion(sae="hand", index=3, text=QUESTION.text)
    with pytest.raises(error, match=said):
        engine.components(question.model_copy(update=change))


def test_an_sae_that_norms_tokens_adds_up_in_live_answers(engine: Engine, home: Home) -> None:
    with home.db.read() as session:
        record = registry.sae(session, "hand")
    lens, sae = engine._open("hand")
    normed = ARCHITECTURES["relu"](
        record.config.model_copy(update={"arch": "relu", "input_norm": "token"}),
        {name: getattr(sae, name) for name in shapes(sae.cfg)},
    )
    question = ComponentsQuestion(sae="hand", index=3, text=QUESTION.text)
    tokens = engine._tokens(lens, question.text, None, "text")
    given, parts = answer(lens, normed, tokens, question), answer_components(lens, normed, tokens, question)
    z = lens.read_z(torch.tensor([tokens]), [1])[1][0]
    assert given.preacts == pytest.approx(normed.preacts(z)[:, 3].tolist(), abs=1e-3)
    assert given.preacts != pytest.approx(sae.preacts(z)[:, 3].tolist(), abs=1e-1)
    assert max(given.gap, parts.gap) <= 1e-4


# ---- all that fires, and the sources of many features ----


def test_codes_are_what_each_feature_is_asked_to_do_alone(engine: Engine) -> None:
    codes = engine.codes(TextQuestion(sae="hand", text=QUESTION.text))
    fires = dict(zip(zip(codes.positions, codes.features, strict=True), codes.activations, strict=True))
    assert len(fires) == len(codes.positions) > 5
    for index in range(16):
        alone = engine.attribute(QUESTION.model_copy(update={"index": index}))
        assert (alone.tokens, alone.texts, alone.excluded) == (codes.tokens, codes.texts, codes.excluded)
        shown = [fires.get((position, index), 0.0) for position in range(len(codes.tokens))]
        assert shown == pytest.approx(alone.activations, abs=1e-4)


def test_sources_of_many_features_are_each_ones_own(engine: Engine) -> None:
    features, dests = [3, 0, 3, 15], [4, 2, 1, 6]
    given = engine.sources(SourcesQuestion(sae="hand", text=QUESTION.text, features=features, dests=dests)).given
    for index, dest, row in zip(features, dests, given, strict=True):
        alone = engine.attribute(QUESTION.model_copy(update={"index": index, "dest": dest}))
        assert row == pytest.approx([sum(column) for column in zip(*alone.dfa, strict=True)], abs=1e-5)
        assert not any(row[dest + 1 :])


@pytest.mark.parametrize(("at", "says"), [([16, 1], "features 0 to 15"), ([1, 99], "there is no 99")])
def test_sources_that_cannot_be_get_a_sentence(engine: Engine, at: list[int], says: str) -> None:
    with pytest.raises((NotFound, UsageError), match=says):
        engine.sources(SourcesQuestion(sae="hand", text=QUESTION.text, features=at[:1], dests=at[1:]))


# ---- as Neuronpedia's scripts ask ----


def test_neuronpedias_client_asks_about_typed_text(engine: Engine, served: Settings, tmp_path: Path) -> None:
    for base in listened(served):
        found = client_finds(base, "live", tmp_path, ("tiny", "1-hand", 3))
    alone = engine.attribute(LiveQuestion(sae="hand", index=3, text="Hello world"))
    codes = engine.codes(TextQuestion(sae="hand", text="Hello world"))
    assert found["one"]["tokens"] == alone.texts
    assert found["one"]["values"] == pytest.approx(alone.activations)
    assert [one["tokens"] for one in found["many"]] == [one["tokens"] for one in found["all"]]

    active = found["all"][0]["activeFeatures"]
    told = {(int(position), int(index)): value for index, places in active.items() for position, value in places}
    fires = dict(zip(zip(codes.positions, codes.features, strict=True), codes.activations, strict=True))
    assert told == pytest.approx(fires)

    strongest = [max(one["values"]) for one in found["top"]]
    assert strongest == sorted(strongest, reverse=True)
    assert {int(one["index"]) for one in found["top"]} == set(codes.features)
    assert found["tops"][0][0]["index"] == found["top"][0]["index"]
    for one in found["by_token"]:
        values = [feature["activationValue"] for feature in one["topFeatures"]]
        assert values == pytest.approx(sorted((fires[key] for key in fires if key[0] == one["position"]), reverse=True)[:5])
    assert [one["position"] for one in found["by_token"]] == list(range(1, len(codes.tokens))), "the row start is left out"
    assert [len(text) for text in found["by_tokens"]] == [len(one["tokens"]) - 1 for one in found["many"]]


def test_dfa_of_typed_text_is_the_engines_own_and_its_target_the_destination(engine: Engine, served: Settings) -> None:
    with TestClient(create_app(served), base_url="http://127.0.0.1:8000") as client:
        asked = {"modelId": "tiny", "sourceSet": "hand", "text": QUESTION.text, "sortIndexes": [], "selectedLayers": []}
        whole = client.post("/api/search-all", json=asked).json()
        for row in whole["result"]:
            alone = engine.attribute(QUESTION.model_copy(update={"index": int(row["index"]), "dest": row["maxValueIndex"]}))
            assert row["dfaTargetIndex"] == row["maxValueIndex"]
            assert row["dfaValues"] == pytest.approx([sum(column) for column in zip(*alone.dfa, strict=True)], abs=1e-5)
            assert row["values"] == pytest.approx(alone.activations, abs=1e-4)
        at = client.post("/api/search-all", json={**asked, "sortIndexes": [2, 4], "numResults": 3}).json()["result"]
        sums = [row["values"][2] + row["values"][4] for row in whole["result"]]
        assert [row["values"][2] + row["values"][4] for row in at] == pytest.approx(sorted(sums, reverse=True)[:3])

        feature = {"modelId": "tiny", "source": "1-hand", "index": "3"}
        new = {"feature": feature, "customText": QUESTION.text}
        row = client.post("/api/activation/new", json=new).json()
        short = client.post("/api/activation/new", json={**new, "ignoreBos": True}).json()
        alone = engine.attribute(QUESTION)
        assert (row["dfaTargetIndex"], short["dfaTargetIndex"]) == (alone.dest, alone.dest - 1)
        assert short["tokens"] == row["tokens"][1:] == alone.texts[1:]
        assert (short["values"], short["dfaValues"]) == (row["values"][1:], row["dfaValues"][1:])
        assert sum(row["dfaValues"]) + alone.bias == pytest.approx(alone.preacts[alone.dest], abs=1e-4)
        assert (
            client.post("/api/activation/new", json={"neuron": feature, "customText": [QUESTION.text]}).json()[0]["index"] == "3"
        )

        for body, says in (
            ({**asked, "sortIndexes": [99]}, "no 99"), ({**asked, "numResults": 101}, "numResults"),
            ({**asked, "densityThreshold": 2}, "densityThreshold"), ({**asked, "text": ""}, "text"),
            ({**asked, "text": []}, "text"),
        ):  # fmt: skip
            refused = client.post("/api/search-all/", json=body)
            assert (refused.status_code, says in refused.json()["error"]) == (400, True), refused.text
