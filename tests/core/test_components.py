"""DFA by component: components add up to the DFA, and are what autograd finds on transformers' own modules."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sae_core import attribution
from sae_core.components import Components, by_component
from sae_core.errors import LayerOutOfRange, UnsupportedModel
from sae_core.lens import Lens
from tests.core.tiny_models import KINDS, STORED_LESS_ONE, tiny_model

TinyLens = Callable[[str], Lens]
POS, LAYER, DEST = 20, 2, 15
WITH_VALUE_BIAS = ("gpt2", "llama", "qwen2", "qwen3", "pythia")
WITH_NORM_BIAS = ("gpt2", "pythia")


class Parts(NamedTuple):
    """Where transformers' modules of one architecture are."""

    model: Any
    """The stack of blocks."""
    blocks: Any
    attention: str
    mlp: str
    norm: str
    position: str | None = None

    def values(self, layer: int, normed: Tensor, n_kv_heads: int) -> Tensor:
        """v [pos, n_kv_heads, d_head] of normed [pos, d_model]."""
        block = self.blocks[layer]
        if self.attention == "attn":  # GPT-2: queries, keys and values side by side
            out = block.attn.c_attn(normed).chunk(3, dim=-1)[2]
        elif self.attention == "attention":  # GPT-NeoX: side by side within each head
            return block.attention.query_key_value(normed).view(len(normed), n_kv_heads, -1).chunk(3, dim=-1)[2]
        else:
            out = block.self_attn.v_proj(normed)
        return out.view(len(normed), n_kv_heads, -1)


def parts_of(kind: str, model: Any) -> Parts:
    if kind == "gpt2":
        return Parts(model.transformer, model.transformer.h, "attn", "mlp", "ln_1", "wpe")
    if kind == "pythia":
        return Parts(model.gpt_neox, model.gpt_neox.layers, "attention", "mlp", "input_layernorm")
    if kind in STORED_LESS_ONE:  # what a block adds has passed the norms that follow attention and MLP
        attention, mlp = "post_attention_layernorm", "post_feedforward_layernorm"
        return Parts(model.model, model.model.layers, attention, mlp, "input_layernorm")
    return Parts(model.model, model.model.layers, "self_attn", "mlp", "input_layernorm")


def added(parts: Parts, model: Any, tokens: Tensor, layer: int) -> list[Tensor]:
    """What transformers' own modules add to the stream before `layer`, in order: [pos, d_model] each."""
    found: dict[str, Tensor] = {}
    hooks = []

    def keep(name: str) -> Callable[..., None]:
        def take(_: nn.Module, __: Any, out: Any) -> None:
            found[name] = (out[0] if isinstance(out, tuple) else out)[0]

        return take

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found["start"] = args[0][0]

    hooks.append(parts.blocks[0].register_forward_pre_hook(enter))
    if parts.position:
        hooks.append(getattr(parts.model, parts.position).register_forward_hook(keep("position")))
    for block in range(layer):
        hooks += [
            getattr(parts.blocks[block], name).register_forward_hook(keep(f"{kind} {block}"))
            for kind, name in (("attention", parts.attention), ("MLP", parts.mlp))
        ]
    with torch.no_grad():
        model(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    names = [f"{kind} {block}" for block in range(layer) for kind in ("attention", "MLP")]
    if parts.position:
        position = found["position"].view(-1, found["start"].shape[-1])
        return [found["start"] - position, position, *(found[name] for name in names)]
    return [found["start"], *(found[name] for name in names)]


def frozen(norm: nn.Module, x: Tensor, *, less_one: bool) -> Tensor:
    """The norm of x [pos, d_model], through whose scale no gradient passes."""
    gain = norm.weight + 1 if less_one else norm.weight
    if isinstance(norm, nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.detach().square().mean(-1, keepdim=True) + norm.eps).sqrt() * gain + norm.bias
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return x / (x.detach().square().mean(-1, keepdim=True) + eps).sqrt() * gain


def by_autograd(
    kind: str, model: Any, tokens: Tensor, layer: int, pattern: Tensor, w: Tensor, n_kv_heads: int
) -> tuple[Tensor, Tensor]:
    """Gradient x component through frozen norm, the model's own projection and the given pattern [n_heads, src]:
    [n_parts, n_heads, src], and what is left of the DFA, which the biases gave, [n_heads, src]. In fp64."""
    model = model.double()
    parts = parts_of(kind, model)
    leaves = [part.double().requires_grad_() for part in added(parts, model, tokens, layer)]
    stream = torch.stack(leaves).sum(0)
    normed = frozen(getattr(parts.blocks[layer], parts.norm), stream, less_one=kind in STORED_LESS_ONE)
    v = parts.values(layer, normed, n_kv_heads).repeat_interleave(len(w) // n_kv_heads, dim=1)  # [src, n_heads, d_head]
    given = torch.einsum("hs,shd,hd->hs", pattern.double(), v, w.double())
    found = []
    for head in range(len(w)):
        grads = torch.autograd.grad(given[head].sum(), leaves, retain_graph=True)
        found.append(torch.stack([(grad * leaf.detach()).sum(-1) for grad, leaf in zip(grads, leaves, strict=True)]))
    by_head = torch.stack(found, 1)
    return by_head, given.detach() - by_head.sum(0)


def split(lens: Lens, tokens: Tensor, layer: int, dest: int, seed: int = 0) -> tuple[Components, Tensor, Tensor]:
    """Components of a random feature; its direction and the pattern at the destination."""
    w = torch.randn(lens.info.n_heads, lens.info.d_head, generator=torch.Generator().manual_seed(seed))
    stream = lens.read_stream(tokens, layer)
    return by_component(stream, lens.value_map(layer), w, dest), w, stream.attention.pattern[0, :, dest]


def rows(lens: Lens) -> Tensor:
    return torch.randint(0, lens.info.d_vocab, (1, POS), generator=torch.Generator().manual_seed(1))


def close(found: Tensor, wanted: Tensor, sizes: Tensor) -> bool:
    """Within fp32's rounding of the largest that was summed."""
    return bool((found.double() - wanted).abs().max() <= 1e-5 * sizes.abs().max())


@pytest.mark.parametrize("kind", [*KINDS, "gpt_oss", "olmo2"])
@pytest.mark.parametrize("layer", [0, 1, LAYER, 3])
def test_components_sum_to_the_dfa_of_every_head_and_source(tiny_lens: TinyLens, kind: str, layer: int) -> None:
    lens = tiny_lens(kind)
    found, w, _ = split(lens, rows(lens), layer, DEST)
    read = lens.read_attention(rows(lens), layer)
    whole = attribution.dfa(read.v[0], read.pattern[0, :, DEST][None], w[None])[0]
    assert close(found.given.sum(0), whole.double(), found.given)
    assert close(found.dfa, whole.double(), found.given)
    assert found.gap < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_components_are_gradient_times_component_on_transformers_own_modules(tiny_lens: TinyLens, kind: str) -> None:
    lens = tiny_lens(kind)
    found, w, pattern = split(lens, rows(lens), LAYER, DEST)
    wanted, biases = by_autograd(kind, tiny_model(kind), rows(lens), LAYER, pattern, w, lens.info.n_kv_heads)
    n = len(wanted)
    assert n == 2 * LAYER + (2 if kind == "gpt2" else 1)
    assert close(found.given[:n], wanted, wanted)
    assert close(found.given[n:].sum(0), biases, wanted)
    assert (wanted.abs().amax((1, 2)) > 1e-3 * wanted.abs().max()).all(), "every component has a part, so none is unchecked"


@pytest.mark.parametrize("kind", KINDS)
def test_components_have_the_names_of_what_the_model_has(tiny_lens: TinyLens, kind: str) -> None:
    lens = tiny_lens(kind)
    found, *_ = split(lens, rows(lens), LAYER, DEST)
    position = ["position"] if kind == "gpt2" else []
    biases = [name for name, kinds in (("norm bias", WITH_NORM_BIAS), ("value bias", WITH_VALUE_BIAS)) if kind in kinds]
    assert list(found.names) == ["embedding", *position, "attention 0", "MLP 0", "attention 1", "MLP 1", *biases]
    assert found.given.shape == (len(found.names), lens.info.n_heads, POS)
    assert not found.given[..., DEST + 1 :].any()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_embedding_is_that_of_the_token(tiny_lens: TinyLens, kind: str) -> None:
    lens = tiny_lens(kind)
    stream = lens.read_stream(rows(lens), LAYER)
    assert torch.allclose(stream.parts[0, 0], tiny_model(kind).get_input_embeddings()(rows(lens))[0], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_streams_through_the_value_map(tiny_lens: TinyLens, kind: str) -> None:
    lens = tiny_lens(kind)
    stream, values = lens.read_stream(rows(lens), 3), lens.value_map(3)
    by_map = torch.einsum("sd,kde->ske", stream.parts[:, 0].sum(0) / stream.scale[0][:, None], values.matrix)
    assert torch.allclose(by_map + values.norm_bias + values.v_bias, stream.attention.v[0], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_bias_is_the_one_that_is_stored(tiny_lens: TinyLens, kind: str) -> None:
    lens, model = tiny_lens(kind), tiny_model(kind)
    found = lens.v_bias(LAYER)
    assert (found is not None) == (kind in WITH_VALUE_BIAS)
    if found is not None:
        parts = parts_of(kind, model)
        zeros = torch.zeros(1, lens.info.d_model)
        assert torch.allclose(found, parts.values(LAYER, zeros, lens.info.n_kv_heads)[0])


def test_a_value_bias_apart_is_less_where_a_sink_takes_part_of_the_pattern(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("gpt_oss")
    read, v_bias = lens.read_attention(rows(lens), LAYER), lens.v_bias(LAYER)
    assert v_bias is not None
    w = torch.randn(1, lens.info.n_heads, lens.info.d_head, generator=torch.Generator().manual_seed(2))
    pattern = read.pattern[0, :, DEST][None]
    assert pattern.sum(-1).min() < 0.95
    apart = attribution.split_value_bias(read.v[0], pattern, w, v_bias)
    z = (lens.read_z(rows(lens), [LAYER])[LAYER][0, DEST].double() * w.flatten().double()).sum()
    assert float(apart.dfa.sum() + apart.constant.sum()) == pytest.approx(float(z), abs=1e-4)
    full = (v_bias.repeat_interleave(2, 0) * w[0]).sum(1)  # what it would be if rows summed to 1
    assert torch.allclose(apart.constant[0], full * pattern[0].sum(-1), atol=1e-5)
    assert (apart.constant[0] - full).abs().max() > 1e-2


def test_a_block_that_adds_what_cannot_be_seen_is_refused(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("llama")
    hook = lens._model.model.layers[0].register_forward_hook(lambda _, __, out: out + 0.3)
    try:
        with pytest.raises(UnsupportedModel, match=r"llama cannot be split by component: .* misses the stream before layer 2 by"):
            lens.read_stream(rows(lens), LAYER)
    finally:
        hook.remove()
    assert lens.read_stream(rows(lens), LAYER).names[0] == "embedding"


def test_values_that_do_not_come_from_the_stream_through_the_norm_are_refused(
    tiny_lens: TinyLens, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = tiny_lens("llama")
    monkeypatch.setattr(Lens, "_first_norm", lambda *_: None)
    with pytest.raises(UnsupportedModel, match=r"its norm and W_V do not give the values of layer 2 \(off by"):
        lens.read_stream(rows(lens), LAYER)


def test_a_layer_that_is_not_there_has_no_components(tiny_lens: TinyLens) -> None:
    with pytest.raises(LayerOutOfRange):
        tiny_lens("llama").read_stream(torch.zeros(1, 4, dtype=torch.int64), 4)


def test_a_wrong_scale_shows_in_the_gap(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("llama")
    stream = lens.read_stream(rows(lens), LAYER)
    w = torch.randn(lens.info.n_heads, lens.info.d_head, generator=torch.Generator().manual_seed(0))
    off = by_component(stream._replace(scale=stream.scale * 1.1), lens.value_map(LAYER), w, DEST)
    assert off.gap > 1e-3


@pytest.mark.real
@pytest.mark.parametrize("layer", [0, 17, 29])
def test_smollm2_components_are_gradient_times_component_on_transformers_own_modules(smollm2_lens: Lens, layer: int) -> None:
    lens = smollm2_lens
    (ids,) = lens.encode(["The cat sat on the mat. The cat sat on the mat, and the dog sat on the cat."])
    tokens = torch.tensor([[lens.row_start, *ids]])
    found, w, pattern = split(lens, tokens, layer, len(ids))
    assert found.gap < 1e-4
    # A plain transformers model, which the bridge has not touched.
    model = copy.deepcopy(lens._fast)
    wanted, biases = by_autograd("llama", model, tokens, layer, pattern, w, lens.info.n_kv_heads)
    assert len(found.names) == len(wanted) == 2 * layer + 1
    assert (found.given.double() - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert biases.abs().max() <= 1e-8 * wanted.abs().max()
