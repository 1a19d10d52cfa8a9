"""Circuits asked of the engine: its answers against `sae_core`'s own, the line, the bounds, and the sentences."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import astuple
from typing import Any

import pytest
import torch

from sae_core import circuits, scores
from sae_core.config import SAEConfig, Site
from sae_core.errors import Cancelled, NotFound, UnreadableSAE, UsageError
from sae_core.lens import load_lens
from sae_core.transcoders import save_transcoder
from server import engine_circuits
from server.circuits.asked import CircuitQuestion, FeatureRoot, LiveCircuit, LogitRoot, ScoreAt, place_id
from server.engine import Engine
from server.engine_circuits import needs
from server.live import Live, TextQuestion
from server.store import registry, transcoders
from tests.core.test_transcoders import random_transcoder
from tests.jobs.conftest import Home
from tests.jobs.test_engine import add_sae, on_a_port

TEXT = "the cat sat on the mat"
LOGIT = CircuitQuestion(saes=["hand", "upper"], text=TEXT, root=LogitRoot(kind="logit"), share=0.001)


@pytest.fixture
def engine(home: Home) -> Engine:
    """An engine on the tiny model with SAEs of two layers, and two more of the upper one's."""
    with home.db.read() as session:
        model = registry.model(session, "tiny")
    lens = load_lens(model.source, name="tiny", device="cpu", cache=home.settings.cache)
    for name, layer in (("hand", 1), ("upper", 3), ("second", 3)):
        cfg = SAEConfig(
            arch="batchtopk", d_in=lens.info.d_in, d_sae=16, k=4, n_heads=lens.info.n_heads, d_head=lens.info.d_head,
            site=Site(layer=layer), model="tiny", model_fingerprint=lens.info.fingerprint, processing=lens.info.processing,
            scale=1.0, max_norm=None, context=32,
        )  # fmt: skip
        add_sae(home, lens, name, cfg)
    return Engine(home.settings.model_copy(update={"device": "cpu"}), home.db)


def adds_up(answer: LiveCircuit) -> None:
    """Every node that is taken apart is the sum of its edges and rest; effects are sums over their readers."""
    nodes, into = {node.id: node for node in answer.nodes}, {}
    effects: dict[str, float] = {}
    for edge in answer.edges:
        into.setdefault(edge.target, []).append(edge)
        effects[edge.source] = effects.get(edge.source, 0.0) + edge.effect
    whole = nodes[answer.root]
    assert answer.nodes[0] == whole
    assert whole.value == whole.effect
    for node in answer.nodes:
        if node.followed:
            assert node.value is not None
            size = sum(abs(edge.value) for edge in into[node.id]) + abs(node.rest)
            assert sum(edge.value for edge in into[node.id]) + node.rest == pytest.approx(node.value, abs=1e-4 * size)
        if node.id != answer.root:
            assert node.effect == pytest.approx(effects[node.id], rel=1e-6, abs=1e-9)
            assert node.share == pytest.approx(node.effect / whole.effect)
    for edge in answer.edges:
        if edge.heads:
            assert sum(edge.heads) == pytest.approx(edge.value, abs=1e-5 * sum(map(abs, edge.heads)))


def test_an_answer_is_the_circuit_itself_and_adds_up(engine: Engine) -> None:
    answer = engine.circuit(LOGIT)
    adds_up(answer)
    assert len([node for node in answer.nodes if node.followed]) > 2
    assert {one.sae: one.layer for one in answer.saes} == {"hand": 1, "upper": 3}
    assert answer.likely[0].probability == max(one.probability for one in answer.likely)
    lens, hand = engine._open("hand")
    _, upper = engine._open("upper")
    token, dest = answer.likely[0].id, len(answer.tokens) - 1
    own = circuits.trace(
        lens, answer.tokens, {1: hand, 3: upper}, circuits.LogitRoot(token, dest), share=0.001, most=40, widest=25
    )
    assert answer.nodes[0].value == pytest.approx(own.nodes[own.root].value)
    told = {(edge.source, edge.target): (edge.value, edge.heads) for edge in answer.edges}
    known = {
        (place_id(*astuple(edge.source)), place_id(*astuple(node.place))): (edge.value, list(edge.heads))
        for node in own.nodes.values()
        for edge in node.edges
    }
    assert len(told) == len(answer.edges) > 20
    assert told == known
    assert answer.gap == own.gap


def test_a_difference_and_a_feature_are_roots_too(engine: Engine) -> None:
    both = engine.circuit(LOGIT.model_copy(update={"root": LogitRoot(kind="logit", text=" the", against_text=" cat", dest=3)}))
    alone = [
        engine.circuit(LOGIT.model_copy(update={"root": LogitRoot(kind="logit", text=text, dest=3)})).nodes[0].value or 0.0
        for text in (" the", " cat")
    ]
    assert both.nodes[0].value == pytest.approx(alone[0] - alone[1], abs=1e-4)
    assert [one.id for one in both.likely[:2]] == [both.nodes[0].index, int(both.nodes[0].name)]
    adds_up(both)
    answer = engine.circuit(LOGIT.model_copy(update={"root": FeatureRoot(sae="upper", index=3, dest=4)}))
    assert answer.root == "f3.3@4"
    adds_up(answer)


def test_a_score_comes_with_it_and_adds_up(engine: Engine) -> None:
    at = ScoreAt(layer=3, head=2, dest=5, src=3, most=5)
    score = engine.circuit(LOGIT.model_copy(update={"score": at})).score
    assert score is not None
    assert sum(pair.value for pair in score.pairs) + score.rest == pytest.approx(score.value, abs=1e-3)
    assert sum(part.value for part in score.queries) + score.query_rest == pytest.approx(score.value, abs=1e-3)
    assert sum(part.value for part in score.keys) + score.key_rest == pytest.approx(score.value, abs=1e-3)
    assert score.value == score.scores[2]
    lead = engine.circuit(LOGIT.model_copy(update={"score": at.model_copy(update={"against_mean": True})})).score
    assert lead is not None
    assert lead.value == pytest.approx(score.scores[2] - score.means[2], abs=1e-5)
    most = engine.circuit(LOGIT.model_copy(update={"score": at.model_copy(update={"head": None})})).score
    assert most is not None
    assert most.patterns[most.head] == max(most.patterns)


def test_the_same_graph_is_traced_once_and_forgotten_when_the_engine_rests(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = []
    real = circuits.trace

    def trace(*given: Any, **options: Any) -> circuits.Circuit:
        traced.append(1)
        return real(*given, **options)

    monkeypatch.setattr(circuits, "trace", trace)
    first = engine.circuit(LOGIT)
    assert engine.circuit(LOGIT.model_copy(update={"score": ScoreAt(layer=3, dest=5, src=3)})).edges == first.edges
    assert len(traced) == 1
    engine.circuit(LOGIT.model_copy(update={"text": "the cat sat on the rat"}))
    engine.circuit(LOGIT.model_copy(update={"share": 0.002}))
    assert len(traced) == 3
    engine.codes(TextQuestion(sae="second", text=TEXT))
    assert engine.circuit(LOGIT) == first
    assert len(traced) == 3, "that another SAE was loaded changes nothing"
    engine.settings.engine_idle_seconds = 0.0
    assert engine.rest()
    assert not engine._circuits._answers, "no text stays"


def test_another_sae_of_that_name_is_traced_anew(engine: Engine, home: Home) -> None:
    first = engine.circuit(LOGIT)
    lens, upper = engine._open("upper")
    add_sae(home, lens, "upper", upper.cfg, seed=1)
    second = engine.circuit(LOGIT)
    assert (second.saes, second.tokens) == (first.saes, first.tokens)
    assert second.edges != first.edges
    assert second == Engine(engine.settings, home.db).circuit(LOGIT)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"saes": ["hand", "nix"]}, NotFound, "no SAE nix"),
        ({"saes": ["upper", "second"]}, UsageError, "upper and second both read layer 3; name one SAE of each layer"),
        ({"text": "word " * 2000}, UsageError, "at most"),
        ({"root": FeatureRoot(sae="hand", index=16, dest=2)}, NotFound, "features 0 to 15"),
        ({"root": FeatureRoot(sae="hand", index=1, dest=99)}, UsageError, "there is no 99"),
        ({"root": LogitRoot(kind="logit", token=10**6)}, UsageError, "tokens 0 to"),
        ({"root": LogitRoot(kind="logit", text=" cat", against_text=" cat")}, UsageError, "are the same"),
        ({"score": ScoreAt(layer=3, head=2, dest=2, src=3)}, UsageError, "does not let position 2 look at 3"),
    ],
)
def test_what_cannot_be_asked_gets_a_sentence(
    engine: Engine, change: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        engine.circuit(LOGIT.model_copy(update=change))


def test_more_than_there_is_memory_for_is_refused_before_it_is_tried(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    lens, upper = engine._open("upper")
    tokens, score = engine._tokens(lens, TEXT, None, "text"), ScoreAt(layer=3, dest=5, src=3)
    least, more = (needs(lens, len(tokens), {1: upper, 3: upper}, layer) for layer in (None, 3))
    read = lens.read_scores(torch.tensor([tokens]), 3)
    held = [read.parts, read.turn, read.scores, read.queries.own_scale, read.keys.own_scale, *read.attention]
    assert more - least >= sum(part.nbytes for part in held), "what is held beside a second reading of the SAEs"
    monkeypatch.setattr(engine_circuits, "LARGEST", (least + more) / 2)
    engine.circuit(LOGIT)
    for bound, asked in (((least + more) / 2, LOGIT.model_copy(update={"score": score})), (least - 1, LOGIT)):
        monkeypatch.setattr(engine_circuits, "LARGEST", bound)
        with pytest.raises(UsageError, match=r"through 2 SAEs needs about .* GB; at most 0 are taken"):
            engine.circuit(asked)


@pytest.mark.parametrize(("inside", "calls"), [("trace", 1), ("trace", 4), ("explain", 1), ("explain", 6)])
def test_a_circuit_is_cancelled_between_its_steps(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, inside: str, calls: int
) -> None:
    asked = LOGIT.model_copy(update={"score": ScoreAt(layer=3, head=2, dest=5, src=3, against_mean=True)})
    module = circuits if inside == "trace" else scores
    real, entered, heard = getattr(module, inside), [], []

    def enter(*given: Any, **options: Any) -> Any:
        entered.append(inside)
        return real(*given, **options)

    def check() -> None:
        if entered:
            heard.append(1)
            if len(heard) == calls:
                raise Cancelled("The question was cancelled.")

    with monkeypatch.context() as patched:
        patched.setattr(module, inside, enter)
        patched.setattr(engine.line, "check", check)
        with pytest.raises(Cancelled):
            engine.circuit(asked)
        assert (entered, len(heard)) == ([inside], calls)
    assert len(engine._circuits._answers) == (inside == "explain"), "half a graph is not kept"
    assert engine.circuit(asked).score is not None


def test_a_circuit_waits_in_the_line(engine: Engine) -> None:
    with on_a_port(engine) as settings, closing(Live(settings)) as live:
        found = live.leave_circuit("a-ticket-of-the-test", LOGIT, 60.0)
        assert found.circuit is not None
        assert found.answer is None
        assert found.circuit.edges == live.circuit(LOGIT).edges == engine.circuit(LOGIT).edges
        with pytest.raises(NotFound, match="features 0 to 15"):
            live.circuit(LOGIT.model_copy(update={"root": FeatureRoot(sae="hand", index=99, dest=2)}))


# ---- through MLPs ----


def give(home: Home, layers: Sequence[int]) -> None:
    """Transcoders drawn at random, as an import leaves them."""
    for layer in layers:
        lens = load_lens(tiny(home).source, name="tiny", device="cpu", cache=home.settings.cache)
        made, file = random_transcoder(lens, layer, rate=0.2), f"{transcoders.HOME}/tiny-l{layer}.safetensors"
        sha256 = save_transcoder(made, home.settings.data / file)
        new = transcoders.TranscoderRecord("tiny", layer, made.n_features, made.cfg.model_dump(), file, sha256)
        with home.db.write() as session:
            transcoders.put(session, new, replace=True)


def tiny(home: Home) -> registry.ModelRecord:
    with home.db.read() as session:
        return registry.model(session, "tiny")


def test_mlps_are_gone_through_where_there_are_transcoders_and_it_is_asked(home: Home, engine: Engine) -> None:
    whole = engine.circuit(LOGIT)
    assert whole.transcoders == []
    give(home, [0, 2])
    answer = engine.circuit(LOGIT)
    adds_up(answer)
    assert [(one.layer, one.n_features) for one in answer.transcoders] == [(0, 48), (2, 48)]
    kinds = {node.kind for node in answer.nodes}
    assert {"MLP feature", "MLP error", "MLP"} <= kinds
    followed = [node for node in answer.nodes if node.followed and node.kind == "MLP feature"]
    assert followed
    assert all(node.id == f"t{node.layer}.{node.index}@{node.position}" for node in followed)
    assert {node.layer for node in answer.nodes if node.kind == "MLP"} <= {1, 3}
    assert engine.circuit(LOGIT.model_copy(update={"transcoders": False})) == whole
    lower = engine.circuit(LOGIT.model_copy(update={"root": FeatureRoot(sae="hand", index=3, dest=4)}))
    assert [one.layer for one in lower.transcoders] == [0], "those below the root"


def test_transcoders_are_weights_that_are_held_and_let_go(home: Home, engine: Engine) -> None:
    engine.circuit(LOGIT)
    before = engine.nbytes
    give(home, [0, 2])
    first = engine.circuit(LOGIT)
    warm = next(iter(engine._warm.values()))
    assert engine.nbytes - before == sum(one.nbytes for one in warm.transcoders.values()) > 0
    give(home, [2])  # another one in its place
    with home.db.write() as session:
        file = transcoders.delete(session, "tiny", 0)
    (home.settings.data / file).unlink()
    assert [one.layer for one in engine.circuit(LOGIT).transcoders] == [2]
    assert engine.circuit(LOGIT) != first, "what was kept of the old ones is not told again"
    engine.settings.engine_memory_gb = 1e-9
    engine.circuit(LOGIT)
    assert len(warm.transcoders) == 1, "what the question needs stays, whatever it needs"
    engine._let_go(0)
    assert engine.nbytes == 0
    (home.settings.data / transcoders.HOME / "tiny-l2.safetensors").unlink()
    with pytest.raises(UnreadableSAE, match="is missing; import the transcoder again"):
        engine.circuit(LOGIT)


def test_transcoders_count_as_memory(home: Home, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    give(home, [0, 2])
    monkeypatch.setattr(engine_circuits, "LARGEST", 1e5)
    with pytest.raises(UsageError, match="through 2 SAEs and 2 transcoders needs about"):
        engine.circuit(LOGIT)
