"""Transcoders in circuits: nodes add up on every architecture, effects are those of autograd through the frozen graph; the peers'
files, read as their own packages compute them."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_core import circuits
from sae_core.circuits import LogitRoot, Place, trace
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
from sae_core.formats.hub import _wanted
from sae_core.formats.transcoders import PASSAGE, fitted, open_transcoder, tried
from sae_core.lens import Lens
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
KINDS = ("llama", "gpt2", "gemma2", "gemma3", "qwen3", "pythia", "gptj", "mistral", "gpt_oss", "olmo2")


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


# ---- broken variants must fail ----


@pytest.mark.parametrize("broken", ["shifted scale", "stream before attention", "another input", "skip turned round"])
def test_broken_variants_miss_the_value(tiny_lens: Callable[[str], Lens], monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    lens, root = tiny_lens("gemma2"), LogitRoot(17, 8, against=44)
    saes, transcoders = every_sae(lens, [1, 2, 3]), of_every_layer(lens, skip=True)
    assert trace(lens, TOKENS, saes, root, transcoders=transcoders).gap <= 1e-5
    real_read, real_mlp = Lens._mlp_read, circuits._read_mlp

    def read(self: Lens, layer: int, names: Any, *rest: Any) -> Any:
        found = real_read(self, layer, names, *rest)
        if broken == "shifted scale":
            return found._replace(scale=found.scale.roll(1))
        return found._replace(n_parts=names.index(f"attention {layer}")) if broken == "stream before attention" else found

    def layer_of(*given: Any) -> circuits.MLPLayer:
        found = real_mlp(*given)
        if broken == "another input":
            found.sight = found.sight._replace(x=found.sight.x + 0.3)
        if broken == "skip turned round":
            assert found.skip is not None
            found.skip = found.skip.T
        return found

    monkeypatch.setattr(Lens, "_mlp_read", read)
    monkeypatch.setattr(circuits, "_read_mlp", layer_of)
    assert trace(lens, TOKENS, saes, root, transcoders=transcoders).gap > 1e-3


def test_a_model_whose_mlp_cannot_be_seen_is_refused_in_a_sentence(
    tiny_lens: Callable[[str], Lens], monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = tiny_lens("llama")
    one = random_transcoder(lens, 1)
    monkeypatch.setattr(Lens, "_mlp_norm", lambda *_: None)
    with pytest.raises(UnsupportedModel, match="do not give what enters the MLP of layer 1"):
        trace(lens, TOKENS, every_sae(lens, [3]), LogitRoot(17, 8), transcoders={1: one})
    monkeypatch.undo()
    monkeypatch.setattr(Lens, "_mlp_post_norm", lambda self, _: self._bridge.ln_final.original_component)
    with pytest.raises(UnsupportedModel, match="output of the MLP of layer 1 is not what it adds"):
        trace(lens, TOKENS, every_sae(lens, [3]), LogitRoot(17, 8), transcoders={1: one})


# ---- files ----

FILES = {
    "saelens-plain": "", "saelens-skip": "", "saelens-jumprelu": "", "saelens-jumprelu-skip": "", "sparsify": "layers.1.mlp",
    "gemma-scope": "layer_1/width_24/average_l0_9", "gemma-scope-2": "layer_1_width_24_l0_small_affine",
    "circuit-tracer-layer_0": "", "circuit-tracer-layer_1": "",
}  # fmt: skip
SAYS: dict[str, tuple[str | None, str | None]] = {
    "saelens": ("normed", "stream"), "sparsify": ("normed", "mlp"), "gemma-scope": ("ungained", "stream"),
    "gemma-scope-2": ("normed", "stream"), "circuit-tracer": ("stream", "stream"),
}  # fmt: skip


def place_of(case: str) -> Path:
    if case.startswith("circuit-tracer-"):
        return CASES / "circuit-tracer" / f"{case.removeprefix('circuit-tracer-')}.safetensors"
    return CASES / case / FILES[case]


@pytest.mark.parametrize("case", FILES)
def test_a_peers_transcoder_computes_what_its_own_package_does(
    tiny_lens: Callable[[str], Lens], tmp_path: Path, case: str
) -> None:
    peer = open_transcoder(place_of(case))
    assert (peer.reads, peer.writes) == SAYS[peer.format]
    assert peer.layer == (0 if case.endswith("layer_0") else 1)
    made = fitted(peer, tiny_lens("llama"), TranscoderFiles(location=case))
    sha256 = save_transcoder(made, tmp_path / "one.safetensors")
    assert len(sha256) == 64
    again = load_transcoder(tmp_path / "one.safetensors")
    assert again.cfg == made.cfg
    other = open_transcoder(tmp_path / "one.safetensors")
    assert (other.format, other.layer, other.reads, other.writes) == ("headscope", peer.layer, peer.reads, peer.writes)
    assert other.tensors["W_enc"].equal(made.W_enc), "a file of another data folder is taken as it is"
    expected = load_file(CASES / case / FILES[case] / "expected.safetensors")
    found = again.encode_sparse(expected["x"])
    acts = torch.zeros_like(expected["acts"]).index_put((found.token, found.feature), found.value)
    assert torch.allclose(acts, expected["acts"], atol=1e-5)
    assert bool((acts > 0).any())
    out = acts @ again.W_dec + again.b_dec
    out = out if again.skip is None else out + expected["x"] @ again.skip
    assert torch.allclose(out, expected["out"], atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "hook", "folded", "reads"),
    [
        ("llama", "ln2.hook_normalized", False, "ungained"), ("gpt2", "ln2.hook_normalized", False, "normed"),
        ("gpt2", "ln2.hook_normalized", True, "ungained"), ("llama", "mlp.hook_in", True, "ungained"),
        ("llama", "hook_resid_mid", True, "stream"), ("llama", "hook_mlp_in", False, "stream"),
    ],
)  # fmt: skip
def test_what_saelens_hooks_mean_depends_on_the_model_and_its_folding(
    tiny_lens: Callable[[str], Lens], tmp_path: Path, kind: str, hook: str, folded: bool, reads: str
) -> None:
    """`ln2.hook_normalized` comes before the gain of TransformerLens' RMSNorm and after that of its LayerNorm."""
    folder = shutil.copytree(CASES / "saelens-skip", tmp_path / "theirs")
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"] |= {"hook_name": f"blocks.1.{hook}", "model_from_pretrained_kwargs": {"fold_ln": folded}}
    (folder / "cfg.json").write_text(json.dumps(config))
    made = fitted(open_transcoder(folder), tiny_lens(kind), TranscoderFiles(location="x"))
    assert made.cfg.reads == reads
    assert fitted(open_transcoder(folder), tiny_lens(kind), TranscoderFiles(location="x", reads="normed")).cfg.reads == "normed"


def test_what_a_transcoder_leaves_says_whether_it_is_read_rightly(tiny_lens: Callable[[str], Lens]) -> None:
    """One that makes the MLP exactly, from the input that it was fitted on and no other."""
    lens = tiny_lens("gpt2")
    tokens = [lens.row_start, *lens.encode([PASSAGE])[0]][: lens.info.max_context]
    read = lens.read_whole(torch.tensor([tokens]), [], [1])
    added, d = read.parts[read.names.index("MLP 1")], lens.info.d_model
    x = read.mlps[1].given
    by_x = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1)[1:], added[1:]).solution
    cfg = TranscoderConfig(layer=1, reads="normed", writes="stream")
    nothing = torch.zeros(d, 4), torch.full((4,), -1.0), torch.zeros(4, d)
    made = Transcoder(cfg, *nothing, by_x[-1], torch.zeros(4), by_x[:-1])
    found = tried(lens, made)
    inside = added[1:]
    left = inside - x[1:] @ by_x[:-1] - by_x[-1]
    assert found.fvu == pytest.approx(float(left.square().sum() / (inside - inside.mean(0)).square().sum()), rel=1e-3)
    assert found.l0 == 0
    assert all(other > found.fvu for other in found.otherwise.values())


def hurt(case: str, tmp_path: Path, name: str, **changes: Tensor | None) -> Path:
    """A copy of a case, with tensors of a file changed or taken away."""
    folder = shutil.copytree(CASES / case, tmp_path / "theirs", copy_function=shutil.copyfile)
    file = next(folder.rglob(name))
    tensors = load_file(file) | {key: value for key, value in changes.items() if value is not None}
    save_file({key: value for key, value in tensors.items() if changes.get(key, value) is not None}, file)
    return file.parent if name != "layer_1.safetensors" else file


def test_what_is_wrong_is_said_in_a_sentence(tiny_lens: Callable[[str], Lens], tmp_path: Path) -> None:
    lens, formats = tiny_lens("llama"), CASES.parent / "formats"

    def refused(error: type[HeadscopeError], says: str, path: Path, **said: Any) -> None:
        with pytest.raises(error, match=says):
            fitted(open_transcoder(path), lens, TranscoderFiles(location="x", **said))

    refused(UnsupportedSAE, "is an SAE and no transcoder: its architecture is topk", formats / "saelens-topk")
    refused(UnsupportedSAE, "is an SAE and no transcoder: its cfg.json does not say transcode", formats / "sparsify")
    refused(UnreadableSAE, "There is no file or folder", tmp_path / "nothing")
    refused(UnreadableSAE, "no transcoder in a format that is known", tmp_path)
    refused(UnreadableSAE, "lacks the tensor W_dec", hurt("saelens-skip", tmp_path / "1", "sae_weights.safetensors", W_dec=None))
    misshapen = hurt("saelens-skip", tmp_path / "2", "sae_weights.safetensors", W_dec=torch.zeros(23, 32))
    refused(UnreadableSAE, r"W_dec has the shape \(23, 32\)", misshapen)
    refused(UsageError, "is one of layer 1, and layer 0 was asked for", CASES / "saelens-skip", layer=0)
    refused(UnreadableSAE, "holds values that are not finite", hurt(
        "circuit-tracer", tmp_path / "3", "layer_1.safetensors", b_dec=torch.full((32,), float("nan"))
    ))  # fmt: skip
    alone = shutil.copyfile(CASES / "circuit-tracer" / "layer_1.safetensors", tmp_path / "some.safetensors")
    refused(UnsupportedSAE, "does not say which layer it is of; say it with --layer", alone)
    refused(UnsupportedSAE, "does not say what it reads; say it with --reads", alone, layer=1)
    assert (
        fitted(open_transcoder(alone), lens, TranscoderFiles(location="x", layer=1, reads="normed", writes="mlp")).cfg.writes
        == "mlp"
    )
    (tmp_path / "config.yaml").write_text("model_kind: cross_layer_transcoder\n")
    refused(UnsupportedSAE, "is a cross-layer transcoder", alone)
    with pytest.raises(UsageError, match="There is no format x"):
        open_transcoder(alone, "x")


def test_one_of_another_model_is_refused(tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("llama")
    one = random_transcoder(lens, 1)
    wide = replace(one, W_enc=torch.zeros(40, 48), W_dec=torch.zeros(48, 40), b_dec=torch.zeros(40))
    with pytest.raises(SAEMismatch, match="reads 40 numbers a token, and the stream of llama has 32"):
        trace(lens, TOKENS, {}, LogitRoot(17, 8), transcoders={1: wide})
    other = replace(one, cfg=one.cfg.model_copy(update={"model_fingerprint": "weights:other"}))
    with pytest.raises(SAEMismatch, match="layer 1 was given to other weights than llama has now"):
        trace(lens, TOKENS, {}, LogitRoot(17, 8), transcoders={1: other})
    far = replace(one, cfg=one.cfg.model_copy(update={"layer": 9}))
    with pytest.raises(LayerOutOfRange, match="one of layer 9, and llama has layers 0 to 3"):
        trace(lens, TOKENS, {}, LogitRoot(17, 8), transcoders={1: far})


def test_a_damaged_file_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(UnreadableSAE, match="no transcoder of Headscope, or damaged"):
        load_transcoder(tmp_path / "x.safetensors")
    with pytest.raises(UnreadableSAE, match="is missing"):
        load_transcoder(tmp_path / "y.safetensors")


@pytest.mark.real
def test_on_smollm2_every_nodes_parts_sum_to_its_value(smollm2_lens: Lens) -> None:
    lens = smollm2_lens
    text = "When Mary and John went to the store, John gave a bottle of milk to"
    tokens = [lens.row_start, *lens.encode([text])[0]]
    saes = {layer: random_sae(lens, layer, 1152, rate=0.02) for layer in (9, 17)}
    transcoders = {layer: random_transcoder(lens, layer, 1152, rate=0.02, skip=layer == 20) for layer in (3, 8, 20, 28)}
    mary, john = (lens.encode([word])[0][0] for word in (" Mary", " John"))
    found = trace(
        lens, tokens, saes, LogitRoot(mary, len(tokens) - 1, against=john), transcoders=transcoders, share=0.001, most=80
    )
    assert [place.kind for place in found.nodes].count("MLP feature") > 3
    adds_up(found, 1e-3)
    assert found.gap < 1e-4


def test_of_the_hub_a_file_comes_with_what_says_how_to_read_it() -> None:
    assert _wanted("sets/layer_3.safetensors") == ["sets/layer_3.safetensors", "sets/config.yaml", "sets/config.json"]
    assert "transcoders/layer_1/params.safetensors" in _wanted("transcoders/layer_1")
