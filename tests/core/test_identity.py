"""Every architecture's pre-activation, by its own equations on scaled z, is the DFA of `affine(f)` on raw z and its bias."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_core import attribution
from sae_core.config import Arch, HarvestConfig, SAEConfig, Site, TrainConfig
from sae_core.corpus import Rows
from sae_core.harvest import HarvestResult, harvest
from sae_core.lens import Lens
from sae_core.saes import ARCHITECTURES, RECIPES, SAE
from sae_core.saes.recipe import Recipe
from sae_core.train import Scaling, _fold
from sae_core.visit import _attribute
from tests.core.tiny_harvest import starts_of, tiny_rows, tiny_sae
from tests.core.tiny_models import KINDS

TinyLens = Callable[[str], Lens]
POS, LAYER, FEATURES = 20, 2, 12
TOLERANCE = 1e-4


class Found(NamedTuple):
    """Some features at some destinations of a row: what attribution gives, and the pre-activations by another way."""

    v: Tensor
    pattern: Tensor
    """[n_heads, dest, src], of the whole row."""
    w: Tensor
    """[n, n_heads, d_head]"""
    bias: Tensor
    dest: Tensor
    preact: Tensor

    def gap(self, pattern: Tensor | None = None) -> Tensor:
        """With the row's pattern, or another in its place."""
        at = (self.pattern if pattern is None else pattern)[:, self.dest].transpose(0, 1)
        return attribution.identity_gap(attribution.dfa(self.v, at, self.w), self.bias, self.preact)


def drawn(lens: Lens, arch: Arch, *, b_dec: bool) -> Recipe:
    """A recipe on the lens' z with no parameter at a special place."""
    cfg = TrainConfig(model="m", corpus="c", site=Site(layer=LAYER), arch=arch, expansion=1, k=3)
    made = RECIPES[arch](cfg, lens.info.d_in, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in made.parameters.items():
        parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
        if name == "b_dec" and not b_dec:
            parameter.zero_()
    return made


def by_its_equations(made: Recipe, x: Tensor, features: Tensor) -> Tensor:
    """The pre-activations [n] that the architecture's docstring defines, of features [n] at x [n, d_in], in fp64."""
    u = ((x.double() - made.b_dec.double()) * made.W_enc_t[features].double()).sum(1)
    gain = made.parameters["r"][features].double().exp() if "r" in made.parameters else 1.0
    return gain * u + made.b_enc[features].double()


def found_of(lens: Lens, tokens: Tensor, layer: int, arch: Arch, scale: float, *, b_dec: bool) -> Found:
    """The SAE folded to raw z for attribution; for the check its unfolded equations on scale x z, with the z of `read_z`,
    which where there is a fast handle has seen neither this v nor this pattern."""
    made = drawn(lens, arch, b_dec=b_dec)
    cfg = made.cfg.model_copy(update={"site": Site(layer=layer)})
    sae = _fold(made.tensors(), Scaling(scale, None), cfg, lens)
    generator = torch.Generator().manual_seed(4)
    dest = torch.randint(1, len(tokens), (FEATURES,), generator=generator)
    features = torch.randint(0, sae.cfg.d_sae, (FEATURES,), generator=generator)
    z = lens.read_z(tokens[None], [layer])[layer][0]
    w, bias = sae.affine(features)
    read = lens.read_attention(tokens[None], layer)
    by_head = w.view(FEATURES, sae.cfg.n_heads, sae.cfg.d_head)
    preact = by_its_equations(made, scale * z[dest], features) / scale
    return Found(read.v[0], read.pattern[0], by_head, bias, dest, preact.float())


def assert_exact(found: Found) -> None:
    """The identity holds, and not with a pattern that is read the wrong way round or one token aside."""
    assert (found.gap() <= TOLERANCE).all()
    for wrong in (found.pattern.transpose(1, 2), found.pattern.roll(1, 1), found.pattern.roll(1, 2)):
        assert found.gap(wrong).median() > 100 * TOLERANCE


@pytest.mark.parametrize("b_dec", [True, False])
@pytest.mark.parametrize("arch", list(RECIPES))
@pytest.mark.parametrize("kind", KINDS)
def test_dfa_of_the_folded_map_is_the_preactivation_of_the_architectures_equations(
    tiny_lens: TinyLens, kind: str, arch: Arch, b_dec: bool
) -> None:
    lens = tiny_lens(kind)
    tokens = torch.randint(0, lens.info.d_vocab, (POS,), generator=torch.Generator().manual_seed(4))
    assert_exact(found_of(lens, tokens, LAYER, arch, 3.7, b_dec=b_dec))


@pytest.mark.real
@pytest.mark.parametrize("arch", list(RECIPES))
def test_smollm2_dfa_is_the_preactivation_of_every_architecture(smollm2_lens: Lens, arch: Arch) -> None:
    (ids,) = smollm2_lens.encode(["The harvest moon rose. The harvest was over, and the moon was red over the harvest."])
    tokens = torch.tensor([smollm2_lens.row_start, *ids])
    assert_exact(found_of(smollm2_lens, tokens, 17, arch, 0.4, b_dec=True))


# ---- SAEs that norm each token ----


def normed(arch: Arch, cfg: SAEConfig) -> SAE:
    """A random SAE that norms its input."""
    generator = torch.Generator().manual_seed(8)
    shapes = {"W_enc": (cfg.d_in, cfg.d_sae), "b_enc": (cfg.d_sae,), "W_dec": (cfg.d_sae, cfg.d_in), "b_dec": (cfg.d_in,)}
    tensors = {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}
    tensors["threshold"] = torch.full((cfg.d_sae,), 0.2)
    return ARCHITECTURES[arch](cfg.model_copy(update={"arch": arch, "input_norm": "token"}), tensors)


@pytest.mark.parametrize("arch", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_normed_tokens_scale_is_in_its_dfa(tiny_lens: TinyLens, kind: str, arch: Arch) -> None:
    lens = tiny_lens(kind)
    sae = normed(arch, tiny_sae(lens, tiny_rows(), d_sae=30).cfg)
    tokens = torch.randint(0, lens.info.d_vocab, (1, POS), generator=torch.Generator().manual_seed(5))
    read = lens.read_attention(tokens, LAYER)
    z, dest, features = read.z[0], torch.arange(POS), torch.arange(POS) % 30
    nothing = torch.zeros(POS, dtype=torch.bool)
    found = _attribute(sae, *sae.affine(features), features, dest, z, read.v[0], read.pattern[0], nothing)
    unit = z.double() / z.double().norm(dim=1, keepdim=True) * math.sqrt(z.shape[1])
    dense = (unit - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
    wanted = dense[dest, features]
    assert torch.allclose(found.preact.double(), wanted, atol=1e-4)
    assert (attribution.identity_gap(found.dfa, found.bias, wanted.float()) <= TOLERANCE).all()
    without = attribution.dfa(
        read.v[0], read.pattern[0][:, dest].transpose(0, 1), sae.W_enc.T[features].view(POS, sae.cfg.n_heads, -1)
    )
    assert attribution.identity_gap(without, found.bias, wanted.float()).median() > 100 * TOLERANCE
    on = dense > 0.2
    if arch == "topk":
        on &= dense >= dense.topk(sae.cfg.k, dim=1).values[:, -1:]
    assert torch.equal(found.act > 0, on[dest, features])
    assert torch.equal(sae.encode(z) > 0, on)
    back = ((dense * on) @ sae.W_dec.double() + sae.b_dec.double()) * z.double().norm(dim=1, keepdim=True) / math.sqrt(z.shape[1])
    assert torch.allclose(sae(z).double(), back, atol=1e-3)


def test_a_normed_sae_is_not_decoded_without_its_tokens_scale(tiny_lens: TinyLens) -> None:
    sae = normed("relu", tiny_sae(tiny_lens("llama"), tiny_rows(), d_sae=30).cfg)
    with pytest.raises(ValueError, match="the tokens' scale"):
        sae.decode(torch.zeros(2, 30))


def run(lens: Lens, sae: SAE, rows: Rows, cfg: HarvestConfig, folder: Path) -> HarvestResult:
    reports = harvest(lens, sae, rows, cfg, folder)
    while True:
        try:
            next(reports)
        except StopIteration as end:
            result: HarvestResult = end.value
            return result


CFG = HarvestConfig(
    tokens=10_000, top_k=3, bands=2, per_band=2, shard_rows=8, batch_rows=4, neighbours=3, logits=5, model_dtype="float32"
)


def test_a_harvest_of_a_normed_sae_adds_up(tiny_lens: TinyLens, tmp_path: Path) -> None:
    lens, rows = tiny_lens("llama"), tiny_rows()
    sae = normed("relu", tiny_sae(lens, rows, d_sae=30).cfg)
    result = run(lens, sae, rows, CFG, tmp_path)
    seen = list(result.examples)
    assert len(seen) > 50
    assert max(example.gap for example in seen) <= TOLERANCE
    for record in result.features:
        if record.n_fired:  # means of whole heads and the bias make the mean activation, where nothing is cut off but the rest
            bias = float(sae.affine(torch.tensor([record.idx]))[1])
            assert float(np.sum(record.head_dfa)) + bias == pytest.approx(record.mean_act, rel=1e-3)


# ---- means and spreads by head, over every firing ----


def assert_means_are_those_of_every_firings_dfa(lens: Lens, sae: SAE, rows: Rows, result: HarvestResult) -> None:
    """Against the whole DFA of every firing, from v and pattern: what the first pass took from z alone."""
    tokens = torch.from_numpy(rows.train.astype(np.int64))
    read = lens.read_attention(tokens, sae.cfg.site.layer)
    acts = sae.encode(read.z).masked_fill(sae.excluded(read.z, starts_of(rows))[..., None], 0.0)
    # Where a token is on the threshold to the last digits, the two passes need not agree whether it fires.
    clear = (sae.preacts(read.z) - sae.threshold).abs().flatten(0, 1).amin(0) > 1e-4
    checked = 0
    for record in (record for record in result.features if clear[record.idx]):
        row, dest = acts[..., record.idx].nonzero(as_tuple=True)
        if not len(row):
            continue
        w = sae.W_enc[:, record.idx].view(1, sae.cfg.n_heads, -1)
        given = torch.stack(
            [attribution.dfa(read.v[r], read.pattern[r, :, t][None], w)[0].sum(1) for r, t in zip(row, dest, strict=True)]
        ).double()
        assert record.n_fired == len(row)
        size = float(given.abs().max())
        np.testing.assert_allclose(record.head_dfa, given.mean(0), atol=1e-4 * size)
        np.testing.assert_allclose(record.head_dfa_std, given.std(0, correction=0), atol=2e-3 * size)
        checked += 1
    assert checked > 10


def test_head_means_and_spreads_are_those_of_every_firings_dfa(tiny_lens: TinyLens, tmp_path: Path) -> None:
    lens, rows = tiny_lens("gemma2"), tiny_rows(10)
    sae = tiny_sae(lens, rows)
    assert_means_are_those_of_every_firings_dfa(lens, sae, rows, run(lens, sae, rows, CFG, tmp_path))


@pytest.mark.real
def test_smollm2_head_means_and_spreads_are_those_of_every_firings_dfa(smollm2_lens: Lens, tmp_path: Path) -> None:
    rows = tiny_rows(6, context=24, vocabulary=5000)
    sae = tiny_sae(smollm2_lens, rows, d_sae=40)
    sae.cfg = sae.cfg.model_copy(update={"max_norm": None})  # with so few tokens the norm of one would be on the edge
    assert_means_are_those_of_every_firings_dfa(smollm2_lens, sae, rows, run(smollm2_lens, sae, rows, CFG, tmp_path))


# ---- what the kept examples say of distance and spread ----


def assert_samples_are_means_over_the_kept_examples(lens: Lens, sae: SAE, rows: Rows, result: HarvestResult) -> None:
    """Against the whole DFA of each kept example, taken apart entry by entry in fp64."""
    read = lens.read_attention(torch.from_numpy(rows.train.astype(np.int64)), sae.cfg.site.layer)
    seen: dict[int, list[tuple[dict[int, float], float, float, float]]] = {}
    for example in result.examples:
        w = sae.W_enc[:, example.feature].view(1, sae.cfg.n_heads, -1)
        dfa = attribution.dfa(read.v[example.row], read.pattern[example.row, :, example.dest][None], w)[0]
        size = dfa.abs().double().numpy()
        size /= size.sum()
        starts = (rows.train[example.row] == rows.row_start) | (np.arange(rows.context) == 0)
        distance: dict[int, float] = {}
        for src in np.flatnonzero(~starts[: example.dest + 1]).tolist():
            gap = example.dest - src
            low = 0 if gap == 0 else 2 ** int(math.log2(gap))
            distance[low] = distance.get(low, 0.0) + float(size[:, src].sum())
        heads, sources = (-sum(p * math.log(p) for p in shares.tolist() if p > 0) for shares in (size.sum(1), size.sum(0)))
        seen.setdefault(example.feature, []).append((distance, float(size[:, starts].sum()), heads, sources))
    assert len(seen) > 20
    for record in result.features:
        found, mine = record.sample, seen.get(record.idx, [])
        if not mine:
            assert found == {}
            continue
        assert found["n"] == len(mine)
        for low, high, share in found["distance"]:
            assert high == max(2 * low, 1)
            assert share == pytest.approx(sum(one[0].get(low, 0.0) for one in mine) / len(mine), abs=2e-4)
        listed = {low for low, _, _ in found["distance"]}
        assert all(low in listed for distance, *_ in mine for low, share in distance.items() if share > 1e-3)
        assert found["start_share"] == pytest.approx(sum(one[1] for one in mine) / len(mine), abs=2e-4)
        assert found["heads"] == pytest.approx(math.exp(sum(one[2] for one in mine) / len(mine)), rel=2e-3)
        assert found["sources"] == pytest.approx(math.exp(sum(one[3] for one in mine) / len(mine)), rel=2e-3)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_samples_are_means_over_the_kept_examples(tiny_lens: TinyLens, tmp_path: Path, kind: str) -> None:
    lens, rows = tiny_lens(kind), tiny_rows()
    rows.train[3, 7] = rows.row_start  # two documents packed into a row
    sae = tiny_sae(lens, rows)
    assert_samples_are_means_over_the_kept_examples(lens, sae, rows, run(lens, sae, rows, CFG, tmp_path))


@pytest.mark.real
def test_smollm2_samples_are_means_over_the_kept_examples(smollm2_lens: Lens, tmp_path: Path) -> None:
    rows = tiny_rows(8, context=24, vocabulary=5000)
    sae = tiny_sae(smollm2_lens, rows, d_sae=40)
    assert_samples_are_means_over_the_kept_examples(smollm2_lens, sae, rows, run(smollm2_lens, sae, rows, CFG, tmp_path))
