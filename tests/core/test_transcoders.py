"""Transcoders in circuits: nodes add up on every architecture, effects are those of autograd through the frozen graph; the peers'
files, read as their own packages compute them."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_core.circuits import Circuit, FeatureRoot, LogitRoot, Place, trace
from sae_core.config import Reads, TranscoderConfig, TranscoderFiles, Writes
from sae_core.errors import (
    HeadscopeError,
    LayerOutOfRange,
    SAEMismatch,
    UnreadableSAE,
    UnsupportedModel,
    UnsupportedSAE,
    UsageError,
)
from sae_core.formats.transcoders import PeerTranscoder, fitted, open_transcoder, tried
from sae_core.lens import Lens
from sae_core.norms import Norm, plain
from sae_core.saes import SAE
from sae_core.transcoders import Transcoder, load_transcoder, save_transcoder
from tests.core.test_rdfa import TOKENS, adds_up, every_sae, firing, random_sae

EVERYTHING: dict[str, Any] = {"share": 1e-7, "most": 10**6, "widest": 10**6}
CASES = Path(__file__).resolve().parent.parent / "fixtures" / "transcoders"


def random_transcoder(
    lens: Lens,
    layer: int,
    n: int = 48,
    *,
    reads: Reads = "normed",
    writes: Writes = "mlp",
    skip: bool = False,
    k: int | None = None,
    rate: float = 0.12,
) -> Transcoder:
    """Directions drawn at random that fire on about `rate` of the tokens; every bias is drawn too."""
    generator, d = torch.Generator().manual_seed(70 + layer), lens.info.d_model

    def drawn(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(shape, generator=generator)

    made = Transcoder(
        TranscoderConfig(layer=layer, reads=reads, writes=writes, k=k),
        drawn(d, n, size=d**-0.5), drawn(n, size=0.2), drawn(n, d, size=0.3), drawn(d, size=0.2), torch.zeros(n),
        drawn(d, d, size=0.5 * d**-0.5) if skip else None,
    )  # fmt: skip
    rows = torch.randint(1, min(lens.info.d_vocab, 250), (6, 1, 16), generator=generator)
    norm, _ = lens.mlp_norms(layer)
    x = torch.cat([made.sight(lens.read_whole(row, [], [layer]).mlps[layer], norm).x[1:] for row in rows])
    threshold = (x @ made.W_enc + made.b_enc).quantile(1 - rate, dim=0).clamp_min(1e-3)
    return replace(made, threshold=threshold)


def of_every_layer(lens: Lens, **options: Any) -> dict[int, Transcoder]:
    return {layer: random_transcoder(lens, layer, **options) for layer in range(lens.info.n_layers)}


# ---- everything adds up ----

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {}, "skip": {"skip": True}, "ungained": {"reads": "ungained", "writes": "stream", "skip": True, "k": 4},
    "stream": {"reads": "stream", "k": 5},
}  # fmt: skip
KINDS = ("llama", "gpt2", "gemma2", "gemma3", "qwen2", "qwen3", "pythia", "gptj", "mistral", "gpt_oss", "olmo2")


@pytest.mark.parametrize(
    ("kind", "variant"),
    [(kind, "skip") for kind in KINDS] + [(kind, one) for kind in ("gpt2", "gemma2") for one in ("plain", "ungained", "stream")],
)
def test_parts_sum_to_every_nodes_own_value(tiny_lens: Callable[[str], Lens], kind: str, variant: str) -> None:
    lens = tiny_lens(kind)
    saes, transcoders = every_sae(lens, range(lens.info.n_layers)), of_every_layer(lens, **VARIANTS[variant])
    for root in (firing(lens, saes[3], TOKENS), LogitRoot(17, 8, against=44)):
        found = trace(lens, TOKENS, saes, root, transcoders=transcoders, share=0.01, most=60)
        adds_up(found, 1e-5)
        kinds = [place.kind for place in found.nodes]
        assert kinds.count("MLP feature") > (0 if kind == "olmo2" else 3), "MLPs were gone through"
        for place, node in found.nodes.items():
            if place.kind == "MLP feature":
                assert node.value == pytest.approx(found.activations[place], rel=1e-4), "it fires by its own pre-activation"
                assert place.position > 0, "a row start has no features"


def test_some_mlps_stay_whole(tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("llama")
    saes, only = every_sae(lens, [0, 3]), {1: random_transcoder(lens, 1)}
    found = trace(lens, TOKENS, saes, LogitRoot(17, 8), transcoders=only, share=0.002)
    assert {place.layer for place in found.effects if place.kind == "MLP"} == {0, 2, 3}
    assert {place.layer for place in found.effects if place.kind in ("MLP feature", "MLP error")} == {1}
    root = firing(lens, saes[0], TOKENS)
    assert not [place for place in trace(lens, TOKENS, saes, root, transcoders=only).effects if "MLP" in place.kind]


# ---- against autograd ----


def frozen(norm: torch.nn.Module | None, clean: Tensor, x: Tensor, *, centres: bool) -> Tensor:
    """The norm's own module with its scale held at what it was on `clean`: its slope entry by entry, from what it gives."""
    if norm is None:
        return x
    bias = norm(torch.zeros_like(clean)[None])[0].double()
    before = [one - one.mean(-1, keepdim=True) if centres else one for one in (clean.double(), x)]
    slope = (norm(clean[None])[0].double() - bias) / before[0]
    return before[1] * slope + bias


def by_autograd(
    lens: Lens, saes: Mapping[int, SAE], transcoders: Mapping[int, Transcoder], root: LogitRoot
) -> dict[Place, float]:
    """Effects of embeddings and errors: gradients of the root through the model's own modules, patterns, norms and what fires
    frozen, with SAEs and transcoders in place of what they are on."""
    layers = range(lens.info.n_layers)
    whole = lens.read_whole(torch.tensor([TOKENS]), list(layers), list(layers))
    centres, sums = bool(lens.mlp_norms(0)[0].centres), dict(zip(whole.names, whole.parts, strict=True))
    leaves: dict[tuple[str, int], Tensor] = {}

    def leaf(kind: str, layer: int, value: Tensor) -> Tensor:
        leaves[kind, layer] = value.detach().double().requires_grad_()
        return leaves[kind, layer]

    clean, x = sums["embedding"].clone(), leaf("embedding", -1, sums["embedding"])
    if "position" in sums:
        clean, x = clean + sums["position"], x + sums["position"].double()
    start = torch.arange(len(TOKENS)) == 0
    for layer in layers:
        block = lens._bridge.blocks[layer]
        norms = {name: block._modules[name].original_component if name in block._modules else None for name in NORMS}
        before, x_before = clean, x
        # Attention.
        sae, read = saes[layer], whole.attention[layer]
        projection = block.attn.v.original_component.double()
        v = projection(frozen(norms["ln1"], clean, x, centres=centres)[None])[0].view(len(x), lens.info.n_kv_heads, -1)
        projection.float()
        v = v.repeat_interleave(lens.info.n_heads // lens.info.n_kv_heads, dim=1)
        z = torch.einsum("hds,she->dhe", read.pattern[0].double(), v).flatten(1)
        on = (sae.encode(read.z[0]) > 0) & ~start[:, None]

        def decoded(z: Tensor, sae: SAE = sae, on: Tensor = on) -> Tensor:
            f = ((z - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()) * on
            return f @ sae.W_dec.double() + sae.b_dec.double() * ~start[:, None]

        W_O, b_O = lens.W_O(layer).flatten(0, 1), lens.b_O(layer)
        b_O = torch.zeros_like(W_O[0]) if b_O is None else b_O
        z = decoded(z) + leaf("attention", layer, read.z[0] - decoded(read.z[0].double()))
        x = x + frozen(norms["ln1_post"], read.z[0] @ W_O + b_O, z @ W_O.double() + b_O.double(), centres=centres)
        clean = clean + sums[f"attention {layer}"]
        # MLP.
        one = transcoders[layer]
        parallel = whole.mlps[layer].n_parts == whole.before(layer)
        stream, entering = (before, x_before) if parallel else (clean, x)
        norm = norms["ln2"] or (norms["ln1"] if parallel else None)
        given = frozen(norm, stream, entering, centres=centres)
        if one.cfg.reads == "ungained" and norm is not None:
            bias, ones = norm(torch.zeros_like(stream)[None])[0].double(), torch.ones(stream.shape[-1])
            gain = norm((ones * torch.tensor([1.0, -1.0]).repeat(len(ones) // 2) * 1e4)[None, None])[0, 0].double() - bias[0]
            given = (given - bias) / (gain * torch.tensor([1.0, -1.0]).repeat(len(ones) // 2))
        x_in = entering if one.cfg.reads == "stream" else given
        preacts = x_in @ one.W_enc.double() + one.b_enc.double()
        fires = preacts > one.threshold
        if one.cfg.k is not None:
            fires &= preacts >= preacts.topk(one.cfg.k).values[:, -1:]
        y = (preacts * (fires & ~start[:, None])) @ one.W_dec.double() + one.b_dec.double()
        y = (y if one.skip is None else y + x_in @ one.skip.double()) * ~start[:, None]
        out, after = (mlp_out(lens, layer), norms["ln2_post"]) if one.cfg.writes == "mlp" else (sums[f"MLP {layer}"], None)
        x = x + frozen(after, out, y + leaf("MLP", layer, out - y), centres=centres)
        clean = clean + sums[f"MLP {layer}"]
    final = frozen(lens._bridge.ln_final.original_component, clean, x, centres=centres)
    rows = lens._unembed.weight.double()[torch.tensor([root.token, root.against])]
    (final[root.dest] @ (rows[0] - rows[1])).backward()
    kinds: dict[str, Any] = {"embedding": "embedding", "attention": "error", "MLP": "MLP error"}
    effects = {}
    for (kind, layer), value in leaves.items():
        assert value.grad is not None
        for position, effect in enumerate((value * value.grad).sum(-1).tolist()):
            effects[Place(kinds[kind], layer, position, -1)] = effect
    return effects


NORMS = ("ln1", "ln1_post", "ln2", "ln2_post")


def mlp_out(lens: Lens, layer: int) -> Tensor:
    with lens._taps([f"blocks.{layer}.mlp.hook_out"], stop=True) as found:
        lens._model(input_ids=torch.tensor([TOKENS]), use_cache=False)
    return found[f"blocks.{layer}.mlp.hook_out"][0]


@pytest.mark.parametrize(
    ("kind", "variant"),
    [("llama", "skip"), ("gemma2", "plain"), ("pythia", "skip"), ("gptj", "plain"), ("olmo2", "skip"), ("gpt2", "ungained"),
     ("gemma2", "ungained"), ("gpt2", "stream")],
)  # fmt: skip
def test_effects_are_those_of_autograd_through_the_frozen_graph(
    tiny_lens: Callable[[str], Lens], kind: str, variant: str
) -> None:
    lens, root = tiny_lens(kind), LogitRoot(17, 8, against=44)
    saes = {layer: random_sae(lens, layer, 24, rate=0.08) for layer in range(lens.info.n_layers)}
    transcoders = of_every_layer(lens, n=24, rate=0.08, **VARIANTS[variant])
    found = trace(lens, TOKENS, saes, root, transcoders=transcoders, **EVERYTHING)
    expected = by_autograd(lens, saes, transcoders, root)
    size = max(abs(value) for value in found.effects.values())
    reach = {place.kind for place, value in expected.items() if abs(value) > 1e-3 * size}
    assert reach == {"embedding", "error", "MLP error"}
    for place in expected:
        assert found.effects.get(place, 0.0) == pytest.approx(expected[place], abs=1e-3 * size), place
