"""Recursive DFA: at every node the parts sum to a value computed on its own, on every architecture and on SmolLM2."""

from collections.abc import Callable, Sequence

import pytest
import torch

from sae_core import circuits
from sae_core.circuits import Circuit, FeatureRoot, LogitRoot, trace
from sae_core.config import SAEConfig, Site
from sae_core.errors import Cancelled, NotFound, UsageError
from sae_core.lens import Lens
from sae_core.saes import ARCHITECTURES, SAE

TOKENS = [0, 5, 17, 30, 5, 17, 44, 12, 9, 5]


def random_sae(lens: Lens, layer: int, d_sae: int = 96, *, rate: float = 0.1, seed: int = 0, norm: str = "none") -> SAE:
    """Directions drawn at random that fire on about `rate` of the tokens; every bias is drawn too."""
    generator = torch.Generator().manual_seed(seed + layer)
    info = lens.info
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, info.d_in, generator=generator), dim=1)
    cfg = SAEConfig(
        arch="jumprelu", d_in=info.d_in, d_sae=d_sae, k=4, n_heads=info.n_heads, d_head=info.d_head, site=Site(layer=layer),
        model=info.name, model_fingerprint=info.fingerprint, processing=info.processing, scale=1.0, max_norm=None, context=32,
        input_norm=norm,
    )  # fmt: skip
    tensors = {
        "W_dec": W_dec, "W_enc": W_dec.T + 0.1 * torch.randn(info.d_in, d_sae, generator=generator) / info.d_in**0.5,
        "b_enc": 0.1 * torch.randn(d_sae, generator=generator), "b_dec": 0.1 * torch.randn(info.d_in, generator=generator),
        "threshold": torch.zeros(d_sae),
    }  # fmt: skip
    sae = ARCHITECTURES["jumprelu"](cfg, tensors).to(lens.device)
    z = lens.read_z(torch.randint(1, min(info.d_vocab, 250), (8, 16), generator=generator), [layer])[layer]
    sae.threshold = sae.preacts(z).flatten(0, 1).quantile(1 - rate, dim=0).clamp_min(1e-3)
    return sae


def every_sae(lens: Lens, layers: Sequence[int]) -> dict[int, SAE]:
    return {layer: random_sae(lens, layer) for layer in layers}


def firing(lens: Lens, sae: SAE, tokens: Sequence[int]) -> FeatureRoot:
    """The strongest firing of a layer at one of the last positions."""
    layer = sae.cfg.site.layer
    acts = sae.encode(lens.read_z(torch.tensor([list(tokens)]), [layer])[layer][0])[-4:]
    dest, index = divmod(int(acts.argmax()), acts.shape[1])
    return FeatureRoot(layer, index, len(tokens) - 4 + dest)


def adds_up(circuit: Circuit, within: float) -> None:
    """Each node's edges and remainder sum to its value, effects are those of its readers, and leaves sum to the root."""
    assert circuit.gap <= within
    readers: dict[circuits.Place, float] = {}
    for node in circuit.nodes.values():
        size = sum(abs(edge.value) for edge in node.edges) + abs(node.rest)
        assert sum(edge.value for edge in node.edges) + node.rest == pytest.approx(node.value, abs=10 * within * size)
        for edge in node.edges:
            if edge.heads:
                assert sum(edge.heads) == pytest.approx(edge.value, abs=10 * within * size)
            else:
                assert edge.source.kind == "bias" or node.place.kind != "feature"
            readers[edge.source] = readers.get(edge.source, 0.0) + edge.value * node.effect / node.value
    root = circuit.nodes[circuit.root]
    size = sum(map(abs, circuit.effects.values()))
    for place, effect in readers.items():
        assert circuit.effects[place] == pytest.approx(effect, abs=1e-9 * size)
    left = sum(effect for place, effect in circuit.effects.items() if place not in circuit.nodes)
    left += sum(node.rest * node.effect / node.value for node in circuit.nodes.values())
    assert left == pytest.approx(root.value, abs=100 * within * size), "what is not followed further sums to the root"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gemma3", "qwen2", "qwen3", "pythia", "mistral", "gpt_oss", "olmo2"])
def test_parts_sum_to_every_nodes_own_value(tiny_lens: Callable[[str], Lens], kind: str) -> None:
    lens = tiny_lens(kind)
    saes = every_sae(lens, range(lens.info.n_layers))
    for root in (firing(lens, saes[3], TOKENS), LogitRoot(17, 8), LogitRoot(17, 8, against=44)):
        found = trace(lens, TOKENS, saes, root, share=0.01, most=60)
        assert len(found.nodes) > 3, "something was followed"
        adds_up(found, 1e-5)


def test_a_logit_is_the_models_own(tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("gpt2")
    logits = lens.read_ending(torch.tensor([TOKENS]), 0).logits[0, 8]
    found = trace(lens, TOKENS, every_sae(lens, [1, 2]), LogitRoot(17, 8))
    assert found.nodes[found.root].value == pytest.approx(float(logits[17] - logits.mean()), rel=1e-4)
    found = trace(lens, TOKENS, every_sae(lens, [1, 2]), LogitRoot(17, 8, against=44))
    assert found.nodes[found.root].value == pytest.approx(float(logits[17] - logits[44]), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_edge_is_what_the_layers_own_modules_make_of_the_feature(tiny_lens: Callable[[str], Lens], kind: str) -> None:
    """With no use of the folded maps: the stream with and without what the feature wrote, normed by hand with one scale, through
    the value projection itself."""
    lens = tiny_lens(kind)
    saes = every_sae(lens, [0, 1, 2, 3])
    root = firing(lens, saes[3], TOKENS)
    found = trace(lens, TOKENS, saes, root, share=0.001)
    read = lens.read_attention(torch.tensor([TOKENS]), 3)
    block = lens._bridge.blocks[3]
    norm, project = block.ln1.original_component, block.attn.v.original_component
    stream = lens.read_streams(torch.tensor([TOKENS]), [3])[3].stream[0]
    centred = stream - stream.mean(-1, keepdim=True) if kind == "gpt2" else stream
    eps = norm.eps if kind == "gpt2" else norm.variance_epsilon
    scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    w = saes[3].W_enc[:, root.index].view(lens.info.n_heads, -1)
    checked = 0
    for edge in found.nodes[found.root].edges:
        if edge.source.kind != "feature":
            continue
        sae, place = saes[edge.source.layer], edge.source
        act = found.activations[place]
        written = act * sae.W_dec[place.index] @ lens.W_O(place.layer).flatten(0, 1)
        if kind == "gpt2":
            written = written - written.mean()
        given = project((written / scale[place.position] * norm.weight)[None, None])[0, 0]
        given = given - project(torch.zeros_like(written)[None, None])[0, 0]
        v = given.view(lens.info.n_kv_heads, -1).repeat_interleave(lens.info.n_heads // lens.info.n_kv_heads, dim=0)
        expected = float((read.pattern[0, :, root.dest, place.position] * (v.detach() * w).sum(1)).sum())
        assert edge.value == pytest.approx(expected, rel=1e-3, abs=1e-6)
        checked += 1
    assert checked > 5


def test_an_sae_that_norms_tokens_adds_up_too(tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("llama")
    saes = {layer: random_sae(lens, layer, norm="token") for layer in (1, 2, 3)}
    found = trace(lens, TOKENS, saes, firing(lens, saes[3], TOKENS), share=0.01)
    assert len(found.nodes) > 1
    adds_up(found, 1e-5)


def test_thresholds_move_parts_into_the_remainder_and_lose_nothing(tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("llama")
    saes = every_sae(lens, [0, 1, 2])
    few, many = (trace(lens, TOKENS, saes, LogitRoot(17, 8), share=share) for share in (0.2, 0.005))
    assert few.root == many.root
    assert len(few.nodes) < len(many.nodes)
    assert few.nodes[few.root].n_rest > many.nodes[many.root].n_rest
    for circuit in (few, many):
        adds_up(circuit, 1e-5)
    assert len(trace(lens, TOKENS, saes, LogitRoot(17, 8), share=0.005, most=4).nodes) == 4


def test_depth_and_width_bound_the_graph_and_lose_nothing(tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("llama")
    saes = every_sae(lens, [0, 1, 2])
    root = LogitRoot(17, 8)
    whole = trace(lens, TOKENS, saes, root, share=0.005)
    alone, one = (trace(lens, TOKENS, saes, root, share=0.005, depth=depth) for depth in (0, 1))
    assert list(alone.nodes) == [alone.root]
    followed = {edge.source for edge in alone.nodes[alone.root].edges}
    assert set(one.nodes) - {one.root} <= followed
    assert len(alone.nodes) < len(one.nodes) <= len(whole.nodes)
    narrow = trace(lens, TOKENS, saes, root, share=0.005, widest=5)
    for fires in (True, False):
        kept, every = (
            [edge.source for edge in one.nodes[one.root].edges if (edge.source.kind == "feature") == fires]
            for one in (narrow, whole)
        )
        assert kept == every[:5]
        assert len(kept) == 5
    for circuit in (alone, one, narrow):
        adds_up(circuit, 1e-5)


def test_it_ends_where_the_check_raises(tiny_lens: Callable[[str], Lens]) -> None:
    lens, calls = tiny_lens("llama"), 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Cancelled("The question was cancelled.")

    with pytest.raises(Cancelled):
        trace(lens, TOKENS, every_sae(lens, [0, 1, 2]), LogitRoot(17, 8), share=0.001, check=check)


def test_row_starts_have_no_features_and_their_z_is_error(tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("llama")
    found = trace(lens, TOKENS, every_sae(lens, [0, 1, 2]), LogitRoot(17, 8), share=0.001)
    at_start = {place.kind for place in found.effects if place.position == 0}
    assert "feature" not in at_start
    assert {"error", "embedding", "MLP"} <= at_start


# ---- broken variants must fail ----


@pytest.mark.parametrize("broken", ["transposed pattern", "shifted scale", "error left out", "wrong heads"])
def test_broken_variants_miss_the_value(tiny_lens: Callable[[str], Lens], monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    lens = tiny_lens("llama")
    saes = every_sae(lens, [0, 1, 2, 3])
    root = firing(lens, saes[3], TOKENS)
    assert trace(lens, TOKENS, saes, root).gap <= 1e-5
    real_read, real_layer = Lens.read_whole, circuits._read

    def read(self: Lens, tokens: torch.Tensor, layers: Sequence[int], mlps: Sequence[int] = ()) -> object:
        whole = real_read(self, tokens, layers, mlps)
        if broken == "shifted scale":
            return whole._replace(scale={layer: one.roll(1) for layer, one in whole.scale.items()})
        turn = {
            "transposed pattern": lambda pattern: pattern.transpose(2, 3),
            "wrong heads": lambda pattern: pattern.flip(1),
        }.get(broken, lambda pattern: pattern)
        attention = {layer: one._replace(pattern=turn(one.pattern)) for layer, one in whole.attention.items()}
        return whole._replace(attention=attention)

    def layer_of(*given: object) -> circuits.LayerRead:
        found = real_layer(*given)  # type: ignore[arg-type]
        if broken == "error left out":
            found.error = torch.zeros_like(found.error)
        return found

    monkeypatch.setattr(Lens, "read_whole", read)
    monkeypatch.setattr(circuits, "_read", layer_of)
    assert trace(lens, TOKENS, saes, root).gap > 1e-2


@pytest.mark.parametrize(
    ("root", "error", "says"),
    [
        (FeatureRoot(3, 0, 4), NotFound, "No SAE of layer 3"),
        (FeatureRoot(1, 96, 4), NotFound, "features 0 to 95"),
        (FeatureRoot(1, 0, 10), UsageError, "positions 0 to 9"),
        (LogitRoot(10**6, 4), UsageError, "has the tokens 0 to"),
    ],
)
def test_a_root_that_is_not_there_gets_a_sentence(
    tiny_lens: Callable[[str], Lens], root: FeatureRoot | LogitRoot, error: type[Exception], says: str
) -> None:
    lens = tiny_lens("llama")
    with pytest.raises(error, match=says):
        trace(lens, TOKENS, every_sae(lens, [1]), root)


@pytest.mark.real
def test_on_smollm2_every_nodes_parts_sum_to_its_value(smollm2_lens: Lens) -> None:
    lens = smollm2_lens
    text = "When Mary and John went to the store, John gave a bottle of milk to"
    tokens = [lens.row_start, *lens.encode([text])[0]]
    saes = {layer: random_sae(lens, layer, 1152, rate=0.02) for layer in (3, 9, 14, 17, 24, 29)}
    mary, john = (lens.encode([word])[0][0] for word in (" Mary", " John"))
    for root in (LogitRoot(mary, len(tokens) - 1, against=john), firing(lens, saes[17], tokens)):
        found = trace(lens, tokens, saes, root, share=0.001, most=80)
        assert len(found.nodes) > 5
        adds_up(found, 1e-3)
        assert found.gap < 1e-5
