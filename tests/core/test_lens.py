"""The lens: what it reads is what the model computes, and what it cannot read rightly it refuses."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_core import lens as lens_module
from sae_core import machine, vocabulary, weights
from sae_core.config import ModelSource
from sae_core.errors import LayerOutOfRange, UnknownModel, UnreadableModel, UnsupportedModel, UsageError
from sae_core.lens import Lens, Out, load_lens
from sae_core.machine import resolve_dtype
from tests.core.tiny_models import D_VOCAB, END, KINDS, SOFT_CAP, WINDOW, save_gguf, save_tiny, tiny_model, tiny_tokenizer

TinyLens = Callable[[str], Lens]
POS = 20
FAST = [kind for kind in KINDS if kind != "gemma2"]


def rows(n: int = 3, pos: int = POS, d_vocab: int = D_VOCAB, seed: int = 1) -> Tensor:
    return torch.randint(0, d_vocab, (n, pos), generator=torch.Generator().manual_seed(seed))


def load(folder: Path, name: str = "tiny") -> Lens:
    return load_lens(ModelSource(location=str(folder)), name=name, cache=folder.parent / "cache")


def output_projections(model: Any) -> list[torch.nn.Module]:
    """W_O of each layer, found by the name each architecture gives it."""
    ends = ("attn.c_proj", "self_attn.o_proj", "attention.dense")
    return [module for path, module in model.named_modules() if path.endswith(ends)]


def own_z(kind: str, tokens: Tensor) -> list[Tensor]:
    """z of every layer from transformers alone, eager attention, no bridge."""
    model, found = tiny_model(kind), []
    for module in output_projections(model):
        module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(input_ids=tokens)
    return found


def close(found: Tensor, expected: Tensor, share: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= share * expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_z_is_what_transformers_computes_without_the_bridge(tiny_lens: TinyLens, kind: str) -> None:
    lens, expected = tiny_lens(kind), own_z(kind, rows())
    for layer in range(lens.info.n_layers):
        assert close(lens.read_z(rows(), [layer])[layer], expected[layer])
        assert close(lens.read_attention(rows(), layer).z, expected[layer])


@pytest.mark.parametrize("kind", KINDS)
def test_attention_shapes_follow_info(tiny_lens: TinyLens, kind: str) -> None:
    lens = tiny_lens(kind)
    info = lens.info
    z, v, pattern = lens.read_attention(rows(), 2)
    assert z.shape == (3, POS, info.n_heads * info.d_head) == (3, POS, info.d_in)
    assert v.shape == (3, POS, info.n_kv_heads, info.d_head)
    assert pattern.shape == (3, info.n_heads, POS, POS)
    assert z.dtype == v.dtype == pattern.dtype == torch.float32
    assert lens.W_O(2).shape == (info.n_heads, info.d_head, info.d_model)
    assert not pattern.triu(1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_pattern_times_v_is_transformers_z(tiny_lens: TinyLens, kind: str) -> None:
    lens, expected = tiny_lens(kind), own_z(kind, rows())
    group = lens.info.n_heads // lens.info.n_kv_heads
    for layer in range(lens.info.n_layers):
        _, v, pattern = lens.read_attention(rows(), layer)
        for head in range(lens.info.n_heads):
            found = pattern[:, head] @ v[:, :, head // group]
            own = expected[layer][..., head * lens.info.d_head : (head + 1) * lens.info.d_head]
            assert close(found, own)


@pytest.mark.parametrize("kind", KINDS)
def test_z_through_w_o_and_b_o_is_what_transformers_attention_gives(tiny_lens: TinyLens, kind: str) -> None:
    lens, model, expected = tiny_lens(kind), tiny_model(kind), []
    for module in output_projections(model):
        module.register_forward_hook(lambda _, __, out: expected.append(out))
    with torch.no_grad():
        model(input_ids=rows())
    for layer, z in lens.read_z(rows(), range(lens.info.n_layers)).items():
        b_O = lens.b_O(layer)
        assert (b_O is not None) == (kind in ("gpt2", "pythia", "llama", "qwen3"))
        found = z @ lens.W_O(layer).flatten(0, 1)
        assert close(found if b_O is None else found + b_O, expected[layer])


def test_scores_reach_past_gemmas_soft_cap(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("gemma2")
    scores: list[Tensor] = []
    with lens._bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_attn_scores", lambda value, **_: scores.append(value))]):
        lens._model(input_ids=rows())
    visible = scores[0][scores[0] > -1e6]
    # cap * tanh(s / cap) passes cap * tanh(1) only where the score s itself passes the cap.
    beyond = (visible.abs() > SOFT_CAP * torch.tanh(torch.tensor(1.0))).float().mean()
    assert beyond > 0.2
    assert visible.abs().max() <= SOFT_CAP


@pytest.mark.parametrize(
    ("kind", "sliding"),
    [("gemma2", [True, False, True, False]), ("gemma3", [True, True, False, True]), ("mistral", [True] * 4)],
)
def test_window_cuts_what_lies_before_it(tiny_lens: TinyLens, kind: str, sliding: list[bool]) -> None:
    lens = tiny_lens(kind)
    too_far = torch.ones(POS, POS).tril(-WINDOW).bool()
    for layer, cuts in enumerate(sliding):
        pattern = lens.read_attention(rows(), layer).pattern
        assert bool((pattern[..., too_far] == 0).all()) == cuts
        assert (pattern[..., torch.ones(POS, POS).tril().bool() & ~too_far] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_fast_handle_serves_all_but_soft_capped_models(tiny_lens: TinyLens, kind: str) -> None:
    assert tiny_lens(kind).fast == (kind in FAST)


@pytest.mark.parametrize("kind", FAST)
def test_fast_handle_gives_the_bridges_z(tiny_lens: TinyLens, kind: str) -> None:
    lens = tiny_lens(kind)
    for layer, z in lens.read_z(rows(), range(lens.info.n_layers)).items():
        assert close(z, lens.read_attention(rows(), layer).z)


def test_fast_handle_shares_the_weights(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("llama")
    owned = {p.data_ptr() for p in lens._model.parameters()}
    assert {p.data_ptr() for p in lens._fast.parameters()} == owned


def test_fast_handle_that_disagrees_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    make = lens_module._fast_handle

    def scaled(*args: Any) -> Any:
        handle = make(*args)
        handle.model.layers[2].self_attn.scaling *= 1.1
        return handle

    monkeypatch.setattr(lens_module, "_fast_handle", scaled)
    lens = load(folder)
    assert not lens.fast
    assert close(lens.read_z(rows(), [3])[3], lens.read_attention(rows(), 3).z)


def test_long_window_leaves_rows_beyond_it_to_the_bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lens_module, "CHECK_WINDOW", WINDOW)  # so that a window of WINDOW counts as long
    lens = load(save_tiny("mistral", tmp_path / "model"))
    assert lens.fast
    assert lens._fast_reads(WINDOW)
    assert not lens._fast_reads(WINDOW + 1)


@pytest.mark.parametrize("kind", FAST)
def test_bfloat16_is_close(tiny_lens: TinyLens, kind: str) -> None:
    lens = tiny_lens(kind)
    exact, half = lens.read_z(rows(), [0])[0], lens.read_z(rows(), [0], torch.bfloat16)[0]
    assert half.dtype == torch.bfloat16
    assert 0 < (half.float() - exact).norm() / exact.norm() < 0.05


def test_bfloat16_without_a_fast_handle_is_the_bridges_z_rounded(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("gemma2")
    assert lens.read_z(rows(), [1], torch.bfloat16)[1].equal(lens.read_z(rows(), [1])[1].to(torch.bfloat16))


def test_half_handle_keeps_rotary_frequencies_exact(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("llama")
    half = lens._half(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.model.rotary_emb.inv_freq.equal(lens._fast.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_layers_equal_one_at_a_time(tiny_lens: TinyLens, kind: str, dtype: torch.dtype) -> None:
    lens = tiny_lens(kind)
    together = lens.read_z(rows(), [3, 0, 2], dtype)
    assert list(together) == [3, 0, 2]
    for layer, z in together.items():
        assert z.equal(lens.read_z(rows(), [layer], dtype)[layer])


def test_no_layers_give_nothing(tiny_lens: TinyLens) -> None:
    assert tiny_lens("llama").read_z(rows(), []) == {}


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_pass_stops_at_the_last_z(tiny_lens: TinyLens, kind: str) -> None:
    lens = tiny_lens(kind)

    def never(*_: Any) -> None:
        raise AssertionError("the pass went on")

    handle = lens._fast or lens._model
    hook = handle.model.layers[1].mlp.register_forward_pre_hook(never)
    bridge_hook = lens._model.model.layers[1].mlp.register_forward_pre_hook(never)
    try:
        lens.read_z(rows(), [0, 1])
        lens.read_attention(rows(), 1)
        with pytest.raises(AssertionError, match="went on"):
            lens.read_z(rows(), [2])
    finally:
        hook.remove()
        bridge_hook.remove()


def test_reads_leave_no_hook_behind(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("pythia")
    before = lens.token_losses(rows())
    first = lens.read_attention(rows(), 1)
    lens.read_z(rows(), [0, 2])
    lens.token_losses(rows(), 1, torch.zeros_like)
    again = lens.read_attention(rows(), 1)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert lens.token_losses(rows()).equal(before)


def test_threads_share_a_lens(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("llama")
    expected = {seed: lens.read_attention(rows(seed=seed), seed).z for seed in range(4)}
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda s=seed: found.update({s: lens.read_attention(rows(seed=s), s).z})) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[seed].equal(z) for seed, z in expected.items())


def test_what_is_read_can_be_trained_on(tiny_lens: TinyLens) -> None:
    z = tiny_lens("llama").read_z(rows(), [1])[1]
    w = torch.zeros(z.shape[-1], requires_grad=True)
    (z @ w).sum().backward()
    assert w.grad is not None
    assert w.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_models_own(tiny_lens: TinyLens, kind: str) -> None:
    with torch.no_grad():
        logits = tiny_model(kind)(input_ids=rows()).logits
    expected = -logits[:, :-1].log_softmax(-1).gather(-1, rows()[:, 1:, None])[..., 0]
    found = tiny_lens(kind).token_losses(rows())
    assert found.shape == (3, POS - 1)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_next_logits_are_the_models_own_and_made_of_no_other_position(tiny_lens: TinyLens, kind: str) -> None:
    lens, tokens, seen = tiny_lens(kind), rows(2, 9), []
    with torch.no_grad():
        expected = tiny_model(kind)(input_ids=tokens).logits[:, -1]
    head = (lens._model if lens._fast is None else lens._fast).get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    found = lens.next_logits(tokens)
    handle.remove()
    assert close(found, expected, 1e-4)
    assert seen == [1]
    with pytest.raises(UsageError):
        lens.next_logits(tokens + D_VOCAB)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_with_a_replaced_z_are_those_of_a_model_whose_z_is_replaced(tiny_lens: TinyLens, kind: str) -> None:
    lens, model = tiny_lens(kind), tiny_model(kind)

    def swap(z: Tensor) -> Tensor:
        return 0.5 * z.flip(-1) + 1

    output_projections(model)[2].register_forward_pre_hook(lambda _, args: (swap(args[0]),))
    with torch.no_grad():
        logits = model(input_ids=rows()).logits
    expected = -logits[:, :-1].log_softmax(-1).gather(-1, rows()[:, 1:, None])[..., 0]
    found = lens.token_losses(rows(), 2, swap)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, lens.token_losses(rows()), atol=1e-2)
    assert torch.allclose(lens.token_losses(rows(), 2, lambda z: z), lens.token_losses(rows()), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_losses_do_not_depend_on_how_rows_are_split(tiny_lens: TinyLens, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = tiny_lens(kind)
    whole = lens.token_losses(rows(5), 1, torch.zeros_like)
    monkeypatch.setattr(lens_module, "LOGITS_AT_ONCE", 2 * POS * D_VOCAB)
    assert torch.allclose(lens.token_losses(rows(5), 1, torch.zeros_like), whole, atol=1e-5)


def swaps() -> list[Callable[[Tensor], Tensor] | Out | None]:
    return [None, torch.zeros_like, lambda z: 0.5 * z.flip(-1) + 1, Out(torch.ones_like), Out(lambda out: out.flip(1) - 0.5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_losses_of_several_replacements_are_those_of_one_at_a_time(tiny_lens: TinyLens, kind: str, layer: int) -> None:
    lens = tiny_lens(kind)
    together = lens.losses_with(rows(), layer, swaps())
    alone = [lens.token_losses(rows(), layer, swap) if swap else lens.token_losses(rows()) for swap in swaps()]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(together, alone, strict=True))
    assert min((a - b).abs().max() for i, a in enumerate(together) for b in together[:i]) > 1e-2  # each is another one


@pytest.mark.parametrize("kind", KINDS)
def test_losses_with_a_replaced_output_are_those_of_a_model_whose_output_is_replaced(tiny_lens: TinyLens, kind: str) -> None:
    lens, model = tiny_lens(kind), tiny_model(kind)

    def swap(out: Tensor) -> Tensor:
        return 0.5 * out.flip(-1) + 1

    # The projection is the last thing that these models' attention does, dropout aside.
    output_projections(model)[2].register_forward_hook(lambda _, __, out: swap(out))
    with torch.no_grad():
        logits = model(input_ids=rows()).logits
    expected = -logits[:, :-1].log_softmax(-1).gather(-1, rows()[:, 1:, None])[..., 0]
    assert torch.allclose(lens.losses_with(rows(), 2, [Out(swap)])[0], expected, atol=1e-4)


@pytest.mark.parametrize("kind", FAST)
def test_blocks_before_the_replacement_work_once(tiny_lens: TinyLens, kind: str) -> None:
    lens, runs = tiny_lens(kind), [0, 0]
    blocks = [lens._fast.get_submodule(path) for path in lens._block_paths]

    def count(which: int) -> Callable[..., None]:
        def add(*_: Any) -> None:
            runs[which] += 1

        return add

    projections = output_projections(lens._fast)
    hooks = [projections[i].register_forward_hook(count(which)) for which, i in enumerate((1, 2))]
    try:
        lens.losses_with(rows(), 2, swaps())
    finally:
        for hook in hooks:
            hook.remove()
    assert runs == [1, len(swaps())]
    assert not any("forward" in vars(block) for block in blocks)


def test_model_whose_blocks_pass_more_than_a_stream_is_run_whole_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = lens_module._fast_handle

    def crossing(*args: Any) -> Any:
        handle, first = make(*args), []
        layers = handle.model.layers
        layers[0].self_attn.register_forward_hook(lambda *seen: first.append(seen[2][0]))
        # Block 3 adds what block 0's attention gave in this very pass, which a pass that skips block 0 lacks.
        layers[3].register_forward_pre_hook(lambda _, given: (given[0] + first.pop(), *given[1:]))
        return handle

    monkeypatch.setattr(lens_module, "_fast_handle", crossing)
    monkeypatch.setattr(Lens, "_agrees", lambda *_: True)
    lens = load(save_tiny("llama", tmp_path / "model"))
    assert lens.fast
    assert not lens._resumes
    assert not lens.keeps_streams(POS)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_taken_up_at_a_layer_is_that_of_a_whole_pass(
    tiny_lens: TinyLens, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens, layers = tiny_lens(kind), [0, 2, 3]
    found = lens.read_attentions(rows(), layers)
    if lens.keeps_streams(POS):
        streams = {layer: read.stream for layer, read in lens.read_streams(rows(), layers).items()}
        again = lens.read_attentions(rows(), layers, streams)
        assert all(torch.equal(a, b) for layer in layers for a, b in zip(found[layer], again[layer], strict=True))
    monkeypatch.setattr(lens, "_hands_over", False)
    whole = lens.read_attentions(rows(), layers)
    assert all(close(a, b) for layer in layers for a, b in zip(found[layer], whole[layer], strict=True))
    blocks = [block.original_component for block in lens._bridge.blocks]
    assert not any("forward" in vars(block) for block in blocks)


@pytest.mark.parametrize("kind", FAST)
def test_attention_taken_up_at_a_layer_runs_no_block_before_it(tiny_lens: TinyLens, kind: str) -> None:
    lens, ran = tiny_lens(kind), []
    streams = {3: lens.read_streams(rows(), [3])[3].stream}
    hooks = [block.attn.register_forward_hook(lambda *_: ran.append(1)) for block in lens._bridge.blocks]
    whole = lens._read_attentions(rows(), [3])[3]
    assert len(ran) == 3
    ran.clear()
    found = lens.read_attentions(rows(), [3], streams)[3]
    assert ran == []
    assert close(found.pattern, whole.pattern)
    for hook in hooks:
        hook.remove()


def test_a_model_without_a_fast_handle_keeps_no_streams(tiny_lens: TinyLens) -> None:
    assert not tiny_lens("gemma2").keeps_streams(POS)
    with pytest.raises(ValueError, match="no streams"):
        tiny_lens("gemma2").read_streams(rows(), [1])


def test_replacement_that_fails_leaves_no_hook_behind(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("llama")
    before = lens.token_losses(rows())

    def fail(_: Tensor) -> Tensor:
        raise ZeroDivisionError

    for broken in (fail, Out(fail)):
        with pytest.raises(ZeroDivisionError):
            lens.losses_with(rows(), 2, [None, broken, None])
        assert lens.token_losses(rows()).equal(before)


def test_no_replacements_give_nothing(tiny_lens: TinyLens) -> None:
    assert tiny_lens("llama").losses_with(rows(), 1, []) == []


def test_losses_want_layer_and_replacement_together(tiny_lens: TinyLens) -> None:
    with pytest.raises(ValueError, match="belong together"):
        tiny_lens("llama").token_losses(rows(), 1)


# Logit weights, from the stored weights alone


def _llama_tail(weights: dict[str, Tensor], x: Tensor, layer: int) -> Tensor:
    x = x @ weights[f"model.layers.{layer}.self_attn.o_proj.weight"].T * weights["model.norm.weight"]
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def _gemma_tail(weights: dict[str, Tensor], x: Tensor, layer: int) -> Tensor:
    x = x @ weights[f"model.layers.{layer}.self_attn.o_proj.weight"].T
    x = x * (1 + weights[f"model.layers.{layer}.post_attention_layernorm.weight"]) * (1 + weights["model.norm.weight"])
    return x @ weights["model.embed_tokens.weight"].T


def _gpt2_tail(weights: dict[str, Tensor], x: Tensor, layer: int) -> Tensor:
    x = x @ weights[f"transformer.h.{layer}.attn.c_proj.weight"]
    return (x - x.mean(-1, keepdim=True)) * weights["transformer.ln_f.weight"] @ weights["transformer.wte.weight"].T


def _pythia_tail(weights: dict[str, Tensor], x: Tensor, layer: int) -> Tensor:
    x = x @ weights[f"gpt_neox.layers.{layer}.attention.dense.weight"].T
    x = (x - x.mean(-1, keepdim=True)) * weights["gpt_neox.final_layer_norm.weight"]
    return x @ weights["lm_head.weight"].T


TAILS = {
    "gpt2": _gpt2_tail,
    "llama": _llama_tail,
    "gemma2": _gemma_tail,
    "gemma3": _gemma_tail,
    "qwen2": _llama_tail,
    "qwen3": _llama_tail,
    "pythia": _pythia_tail,
    "mistral": _llama_tail,
}


@pytest.mark.parametrize("kind", KINDS)
def test_logit_weights_follow_the_stored_weights(tiny_lens: TinyLens, kind: str) -> None:
    lens = tiny_lens(kind)
    weights = {name: p.detach() for name, p in tiny_model(kind).named_parameters()}
    vectors = torch.randn(7, lens.info.d_in, generator=torch.Generator().manual_seed(2))
    expected = TAILS[kind](weights, vectors, 2)
    found = lens.logit_weights(vectors, 2)
    assert found.shape == (7, lens.info.d_vocab)
    assert close(found, expected - expected.mean(-1, keepdim=True))


def test_logit_weights_are_where_the_logits_go_when_z_is_pushed_hard(tiny_lens: TinyLens) -> None:
    # Pushed hard along one direction, the last layer's stream is that direction, and its rms scales all logits alike.
    lens, model = tiny_lens("gemma2"), tiny_model("gemma2")
    model.config.final_logit_softcapping = None
    last = model.model.layers[3]
    last.mlp.down_proj.weight.data.zero_()
    push = torch.randn(lens.info.d_in, generator=torch.Generator().manual_seed(3))
    last.self_attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0] + 1e4 * push,))
    last.post_attention_layernorm.register_forward_hook(lambda *args: args[2] * 1e4)
    with torch.no_grad():
        logits = model(input_ids=rows()).logits[0, -1]
    expected = lens.logit_weights(push[None], 3)[0]
    assert torch.nn.functional.cosine_similarity(logits - logits.mean(), expected, dim=0) > 0.9999


# Refusals


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_layer_out_of_range_is_a_sentence(tiny_lens: TinyLens, layer: int) -> None:
    lens = tiny_lens("llama")
    for ask in (
        lambda: lens.check_layer(layer),
        lambda: lens.read_z(rows(), [0, layer]),
        lambda: lens.read_attention(rows(), layer),
        lambda: lens.token_losses(rows(), layer, torch.zeros_like),
        lambda: lens.losses_with(rows(), layer, [None]),
        lambda: lens.logit_weights(torch.zeros(1, lens.info.d_in), layer),
    ):
        with pytest.raises(LayerOutOfRange, match=rf"llama has 4 layers.*no layer {layer}; choose one from 0 to 3\."):
            ask()


def test_row_longer_than_the_context_is_refused(tiny_lens: TinyLens) -> None:
    with pytest.raises(UsageError, match="at most 64 tokens at once, not 65"):
        tiny_lens("gpt2").read_z(rows(pos=65), [0])


@pytest.mark.parametrize("bad", [-1, D_VOCAB])
def test_tokens_of_another_model_are_refused(tiny_lens: TinyLens, bad: int) -> None:
    tokens = rows()
    tokens[1, 3] = bad
    with pytest.raises(UsageError, match="not gpt2's: its ids go from 0 to 279"):
        tiny_lens("gpt2").read_z(tokens, [0])


def test_norm_between_attention_and_its_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"bitnet cannot be used: in layer 0 pattern times v is not z \(off by"):
        load(save_tiny("bitnet", tmp_path / "model"), "bitnet")


@pytest.mark.parametrize(
    ("hook", "sentence"),
    [
        ("hook_z", r"in layer 2 pattern times v is not z \(off by"),
        ("hook_out", r"in layer 2 z W_O \+ b_O is not the attention output \(off by"),
    ],
)
def test_bridge_whose_attention_is_changed_on_the_way_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str, sentence: str
) -> None:
    make = lens_module._bridge

    def gated(model: Any, name: str) -> Any:
        bridge = make(model, name)
        bridge.add_hook(f"blocks.2.attn.{hook}", lambda value, **_: value * 1.01, is_permanent=True)
        return bridge

    monkeypatch.setattr(lens_module, "_bridge", gated)
    with pytest.raises(UnsupportedModel, match=sentence):
        load(save_tiny("llama", tmp_path / "model"))


def test_model_without_attention_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=D_VOCAB, state_size=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModel, match="layer 0 has no attention"):
        load(tmp_path / "model")


def test_place_that_is_nowhere_is_unknown(tmp_path: Path) -> None:
    for place in (tmp_path / "no-such-folder", tmp_path / "no-such.gguf", Path("./no/such/folder/here")):
        with pytest.raises(UnknownModel, match=r"There is no (folder or )?file"):
            load(place)


def test_hub_name_that_cannot_be_had_is_unknown(tmp_path: Path) -> None:
    # Tests run with the hub switched off, so every name is out of reach.
    with pytest.raises(UnknownModel, match="nobody/no-such-model could not be had from the hub"):
        load_lens(ModelSource(location="nobody/no-such-model"), name="x", cache=tmp_path)


def test_hub_name_asks_for_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def from_pretrained(location: str, **where: Any) -> None:
        asked.update(where, location=location)
        raise OSError("You are trying to access a gated repo.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(UnknownModel, match="accept its terms there and set HF_TOKEN"):
        load_lens(ModelSource(location="lab/model", revision="abc"), name="x", cache=tmp_path)
    assert asked == {"location": "lab/model", "revision": "abc", "local_files_only": False, "trust_remote_code": False}


def test_local_models_never_touch_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    load(save_tiny("gpt2", tmp_path / "model"))
    load(save_gguf(tmp_path / "tiny.gguf"))


def test_folder_without_config_is_unreadable(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(UnreadableModel, match=r"holds no config\.json"):
        load(folder)


def test_folder_without_weights_is_unreadable(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnreadableModel, match="holds no weights"):
        load(folder)


def test_folder_without_tokenizer_is_unreadable(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises((UnreadableModel, UnsupportedModel), match="tokenizer"):
        load(folder)


@pytest.mark.parametrize("size", [0, 5, 900, 20_000])
def test_truncated_safetensors_are_unreadable(tmp_path: Path, size: int) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(UnreadableModel, match=r"model cannot be read: "):
        load(folder)


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnreadableModel, match=r"lacks weights .* such as model\.layers\.1\.self_attn\.v_proj\.weight"):
        load(folder)


def test_config_that_is_no_json_is_unreadable(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(UnreadableModel, match="cannot be read"):
        load(folder)


def test_unknown_architecture_is_unsupported(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such-kind"}))
    with pytest.raises(UnsupportedModel, match="of a kind that transformers cannot load"):
        load(folder)


def test_code_of_a_repository_is_not_run(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnsupportedModel, match="code of its own, which Headscope does not run"):
        load(folder)
    assert not (tmp_path / "ran").exists()


# GGUF


def test_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_gguf(tmp_path / "tiny.gguf")
    first = load(path)
    (folder,) = (tmp_path / "cache" / "models").iterdir()
    assert first.info.fingerprint == f"gguf:{folder.name}"
    assert (first.info.n_layers, first.info.n_heads, first.info.n_kv_heads, first.info.d_head) == (2, 4, 2, 8)

    def again(*_: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(weights, "_convert", again)
    moved = path.rename(tmp_path / "moved.gguf")
    second = load(moved)
    assert second.info == first.info
    assert second.read_z(rows(d_vocab=263), [1])[1].equal(first.read_z(rows(d_vocab=263), [1])[1])


def test_gguf_keeps_values_and_tokens(tmp_path: Path) -> None:
    lens = load(save_gguf(tmp_path / "tiny.gguf"))
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(263, 32, generator=generator) * 0.3
    assert lens._model.get_input_embeddings().weight.equal(embedding)
    assert lens.encode(["the cat"]) == tiny_tokenizer()(["the cat"])["input_ids"]
    assert lens.row_start == 0


@pytest.mark.parametrize("damage", ["empty", "text", "head", "half"])
def test_damaged_gguf_is_unreadable_and_leaves_nothing(tmp_path: Path, damage: str) -> None:
    path = save_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello there", "head": whole[:40], "half": whole[: len(whole) // 2]}[damage])
    with pytest.raises(UnreadableModel, match=r"tiny\.gguf (is not a GGUF file|cannot be read: it is damaged)"):
        load(path)
    assert list((tmp_path / "cache").rglob("*")) == [tmp_path / "cache" / "models"]


# Fingerprints


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    one = load(save_tiny("gpt2", tmp_path / "one"), "one").info.fingerprint
    assert load(save_tiny("gpt2", tmp_path / "copy"), "copy").info.fingerprint == one
    assert load(save_tiny("gpt2", tmp_path / "other", seed=1), "other").info.fingerprint != one


def test_processing_says_what_an_sae_must_match(tiny_lens: TinyLens) -> None:
    processing = tiny_lens("gpt2").info.processing
    assert processing.pop("tl_version")
    assert processing == {"folded": False, "centred": False, "dtype": "float32"}


# Tokens


@given(st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=40))
def test_token_texts_join_to_the_text_unless_characters_are_cut(text: str) -> None:
    texts, tokenizer = vocabulary.vocabulary_texts(TOKENIZER), TOKENIZER
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = "".join(texts[i] for i in ids)
    # Bytes of cut characters are spelled out: put them back and nothing is lost.
    spelled = "".join(c if c.isascii() else "".join(f"<0x{byte:02X}>" for byte in c.encode()) for c in text)
    assert pieces == spelled


TOKENIZER = tiny_tokenizer()


def test_token_texts_show_spaces_newlines_bytes_and_holes(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("gpt2")
    ids = lens.encode(["the cat\n\n é"])[0]
    assert lens.token_texts(ids) == ["t", "he", " ", "cat", "\n\n", " ", "<0xC3>", "<0xA9>"]
    assert lens.token_texts([0, D_VOCAB - 1, -1]) == [END, f"<id {D_VOCAB - 1}>", "<id -1>"]


def test_sentencepiece_tokens_show_spaces_and_bytes() -> None:
    assert [vocabulary._sentencepiece_text(t) for t in ("▁the", "<0x0A>", "<0xE2>", "▁▁", "a")] == [
        " the",
        "\n",
        "<0xE2>",
        "  ",
        "a",
    ]


def test_whole_characters_of_several_bytes_are_shown() -> None:
    assert vocabulary._byte_level_text("Ġna\u00c3\u00afve") == " naïve"
    assert vocabulary._byte_level_text("\u00e4\u00bd") == "<0xE4><0xBD>"


def test_encode_adds_no_special_tokens(tiny_lens: TinyLens) -> None:
    lens = tiny_lens("gpt2")
    assert lens.encode(["a", "", "the"]) == [[65], [], [84, 258]]
    assert lens.encode([f"a{END}"]) == [[65, 0]]
    assert lens.encode([]) == []


class _Words:
    """A tokenizer as far as the row-start rule looks."""

    def __init__(self, bos: str | None, eos: str | None, *others: str) -> None:
        self.bos_token, self.eos_token = bos, eos
        self._words = [word for word in (*others, bos, eos) if word]

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(dict.fromkeys(self._words))}


@pytest.mark.parametrize(
    ("bos", "eos", "others", "start"),
    [
        (END, END, ("a",), 1),  # GPT-2, Pythia: one token does both
        ("<bos>", "<eos>", ("<pad>",), 1),  # Gemma
        ("<|begin_of_text|>", "<|eot_id|>", (), 0),  # Llama 3
        ("<|im_start|>", "<|im_end|>", (END,), 0),  # SmolLM2 Instruct: bos opens a chat turn
        (None, "<|im_end|>", ("a", END), 1),  # Qwen: none
        (None, "</s>", ("a",), 1),
        ("<|im_start|>", "<|im_end|>", (), 1),
    ],
)
def test_row_start_is_the_token_that_documents_began_with(
    bos: str | None, eos: str | None, others: tuple[str, ...], start: int
) -> None:
    assert vocabulary.row_start(_Words(bos, eos, *others), "x") == start


def test_tokenizer_without_a_token_to_begin_with_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="no token to begin a row with"):
        vocabulary.row_start(_Words(None, None, "a"), "x")


def test_dtype_is_resolved_once_and_by_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("float32", cpu) == torch.float32
    assert resolve_dtype("bfloat16", cpu) == torch.bfloat16
    assert resolve_dtype("auto", cpu) == resolve_dtype("auto", cpu)
    for gain, expected in ((1.49, torch.float32), (1.5, torch.bfloat16)):
        monkeypatch.setattr(machine, "_bf16_gain", lambda _, gain=gain: gain)
        assert resolve_dtype("auto", cpu) == expected


# The real model


@pytest.mark.real
def test_smollm2_loads_with_its_known_shape(smollm2_lens: Lens) -> None:
    info = smollm2_lens.info
    assert (info.n_layers, info.n_heads, info.n_kv_heads, info.d_head, info.d_model, info.d_vocab) == (30, 9, 3, 64, 576, 49152)
    assert info.max_context == 8192
    assert smollm2_lens.row_start == 0
    assert smollm2_lens.fast
    text = "The café opens at\n\n 8:30, naïve 🎉 visitors…"
    (ids,) = smollm2_lens.encode([text])
    shown = "".join(smollm2_lens.token_texts(ids))
    assert shown.startswith("The café opens at\n\n 8:30, naïve ")


@pytest.mark.real
def test_smollm2_predicts_english_and_needs_its_attention(smollm2_lens: Lens) -> None:
    (ids,) = smollm2_lens.encode(["The capital of France is Paris. The capital of Germany is Berlin. The capital of France is"])
    tokens = torch.tensor([[smollm2_lens.row_start, *ids]])
    clean = smollm2_lens.token_losses(tokens).mean()
    assert clean < 2.5
    assert smollm2_lens.token_losses(tokens, 0, torch.zeros_like).mean() > clean + 1


@pytest.mark.real
def test_smollm2_copies_repeated_tokens_by_its_induction_heads(smollm2_lens: Lens) -> None:
    half = torch.randint(1000, 40_000, (2, 32), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([torch.full((2, 1), smollm2_lens.row_start), half, half], 1)
    losses = smollm2_lens.token_losses(tokens)
    assert losses[:, 33:].mean() < losses[:, :32].mean() - 5
    # L18H6, an induction head: from a repeated token it looks at what followed the token the first time.
    pattern = smollm2_lens.read_attention(tokens, 18).pattern[:, 6]
    dest = torch.arange(34, 65)
    assert pattern[:, dest, dest - 31].mean() > 0.5


@pytest.mark.real
def test_smollm2_fast_and_half_z_agree_with_the_bridge(smollm2_lens: Lens) -> None:
    tokens = rows(2, 64, smollm2_lens.info.d_vocab)
    tokens[:, 0] = smollm2_lens.row_start
    exact = smollm2_lens.read_attention(tokens, 17).z[:, 1:]
    assert close(smollm2_lens.read_z(tokens, [17])[17][:, 1:], exact, 1e-3)
    half = smollm2_lens.read_z(tokens, [17], torch.bfloat16)[17][:, 1:].float()
    assert (half - exact).norm() / exact.norm() < 0.1


@pytest.mark.real
def test_smollm2_pattern_times_v_is_z_and_z_through_w_o_is_the_output(smollm2_lens: Lens) -> None:
    tokens = rows(2, 48, smollm2_lens.info.d_vocab)
    outputs: dict[int, Tensor] = {}
    seen = smollm2_lens._bridge.hooks(
        fwd_hooks=[("blocks.17.attn.hook_out", lambda value, **_: outputs.setdefault(17, value.detach().clone()))]
    )
    with seen:
        smollm2_lens._model(input_ids=tokens)
    z, v, pattern = smollm2_lens.read_attention(tokens, 17)
    for head in range(9):
        assert close(pattern[:, head] @ v[:, :, head // 3], z[..., 64 * head : 64 * head + 64])
    assert close(z @ smollm2_lens.W_O(17).flatten(0, 1), outputs[17])


@pytest.mark.real
def test_smollm2_attention_taken_up_at_a_layer_is_that_of_a_whole_pass(smollm2_lens: Lens) -> None:
    tokens, layers = rows(2, 48, smollm2_lens.info.d_vocab), [0, 17, 29]
    assert smollm2_lens.keeps_streams(48)
    found, whole = smollm2_lens.read_attentions(tokens, layers), smollm2_lens._read_attentions(tokens, layers)
    assert all(close(a, b) for layer in layers for a, b in zip(found[layer], whole[layer], strict=True))


@pytest.mark.real
def test_smollm2_losses_of_several_replacements_are_those_of_one_at_a_time(smollm2_lens: Lens) -> None:
    tokens = rows(2, 32, smollm2_lens.info.d_vocab)
    assert smollm2_lens._resumes
    together = smollm2_lens.losses_with(tokens, 17, swaps())
    alone = [smollm2_lens.token_losses(tokens, 17, swap) if swap else smollm2_lens.token_losses(tokens) for swap in swaps()]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(together, alone, strict=True))
