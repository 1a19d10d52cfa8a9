"""Each metric against its closed form, on numbers small enough to work out by hand."""

import json
import math
from collections.abc import Callable, Generator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_core.config import SAEConfig, Site
from sae_core.corpus import Rows
from sae_core.evaluate import Evaluation, Interval, Reconstruction, cross_entropy, evaluate, interval, repeated_random, spectrum
from sae_core.lens import Effect, Lens, Out
from sae_core.measures import bucket
from sae_core.progress import Progress
from sae_core.saes import SAE, BatchTopKSAE


def test_interval_is_the_normal_one_over_rows() -> None:
    got = interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))  # std sqrt(5/3), half = 1.96 * that / 2
    half = 1.959964 * math.sqrt(5 / 3) / 2
    assert (got.mean, got.low, got.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))


def test_the_spectrum_of_a_head_says_how_many_directions_it_uses() -> None:
    flat, single = torch.eye(4), torch.tensor([[0.0, 3.0, 0.0, 0.0]]).expand(4, 4)
    found = spectrum(torch.cat([flat, single], 1), 2)
    assert found is not None
    assert found.d_head == 4
    assert found.effective == pytest.approx([4, 1])
    assert found.singular[0] == pytest.approx([0.25] * 4)
    assert found.singular[1] == pytest.approx([1, 0, 0, 0])
    assert spectrum(torch.zeros(0, 8), 2) is None


def test_the_spectrum_is_that_of_the_singular_values() -> None:
    torch.manual_seed(0)
    W_dec = torch.randn(30, 12)
    found = spectrum(W_dec, 3)
    assert found is not None
    for head in range(3):
        values = torch.linalg.svdvals(W_dec[:, 4 * head : 4 * head + 4].double())
        assert found.singular[head] == pytest.approx((values / values.sum()).tolist(), abs=1e-6)
        p = values**2 / (values**2).sum()
        assert found.effective[head] == pytest.approx(float(torch.exp(-(p * p.log()).sum())))


def losses(per_row: Sequence[float]) -> Tensor:
    return torch.tensor(per_row)[:, None].expand(-1, 3)


def test_recovered_is_the_published_ratio() -> None:
    record = cross_entropy(losses([3.0, 3.2, 3.1]), losses([3.1, 3.3, 3.2]), losses([5.0, 5.2, 5.1]), losses([4.0, 4.2, 4.1]))
    assert record.recovered_zero == pytest.approx((5.1 - 3.2) / (5.1 - 3.1))
    assert record.recovered_mean == pytest.approx((4.1 - 3.2) / (4.1 - 3.1))
    assert record.note is None
    assert (record.clean, record.sae) == pytest.approx((3.1, 3.2))


def test_pairing_removes_what_rows_share() -> None:
    """Rows differ by nats, variants by a constant: the interval of the difference has no width."""
    record = cross_entropy(losses([1.0, 9.0, 4.0]), losses([1.1, 9.1, 4.1]), losses([1.2, 9.2, 4.2]), losses([1.2, 9.2, 4.2]))
    assert record.sae_minus_clean.high - record.sae_minus_clean.low < 1e-5


def test_recovered_is_withheld_with_a_reason_when_the_denominator_is_noise() -> None:
    record = cross_entropy(losses([3.0, 3.2, 3.1]), losses([3.0, 3.2, 3.1]), losses([3.1, 3.1, 3.12]), losses([4.0, 4.2, 4.1]))
    assert record.recovered_zero is None
    assert record.recovered_mean == pytest.approx(1.0)
    assert record.note is not None
    assert "zero-ablation changes the cross-entropy by only" in record.note


def test_divergences_are_recovered_like_losses() -> None:
    clean, kl = (
        losses([3.0, 3.2, 3.1]),
        {"sae": losses([0.1, 0.1, 0.1]), "zero": losses([1.0, 1.0, 1.0]), "mean": losses([0.0, 3.0, 0.0])},
    )
    record = cross_entropy(clean, clean, clean + 1, clean + 1, kl=kl)
    assert record.kl_recovered_zero == pytest.approx(0.9)
    assert record.sae_kl is not None
    assert record.sae_kl.mean == pytest.approx(0.1)
    assert record.kl_recovered_mean is None, "one row in three says too little"
    assert "mean-ablation changes the prediction by only +1.0000" in (record.note or "")


def test_losses_by_position_are_those_of_the_positions() -> None:
    clean = torch.zeros(3, 5)
    sae = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]] * 3)
    found = cross_entropy(clean, sae, sae + 1, sae + 1, first=2).by_position  # the scored positions are 2 to 6
    assert [(one.low, one.high) for one in found] == [(2, 3), (4, 6)]
    assert [one.sae_minus_clean.mean for one in found] == pytest.approx([1.5, 4.0])


def test_buckets_are_powers_of_two_and_leave_no_gap() -> None:
    found = list(dict.fromkeys(bucket(position) for position in range(128)))
    assert found == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, 127)]


def test_one_row_gives_a_mean_without_bounds() -> None:
    assert interval(torch.tensor([2.0])) == Interval(mean=2.0, low=None, high=None)
    record = cross_entropy(losses([3.0]), losses([3.1]), losses([5.0]), losses([4.0]))
    assert (record.recovered_zero, record.recovered_mean) == (None, None)
    assert "whose error is not known" in (record.note or "")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_record_holds_what_json_cannot_say(bad: float) -> None:
    broken = losses([bad, 1.0, 2.0])
    record = cross_entropy(
        broken, broken, losses([1.0, 1.0, 2.0]), broken, kl=dict.fromkeys(("sae", "zero", "mean"), broken), output_gap=bad
    )
    assert record.clean is None
    assert record.output_gap is None
    json.dumps(record.model_dump(mode="json"), allow_nan=False)


def test_what_older_saes_have_stored_is_still_an_evaluation() -> None:
    ce: dict[str, Any] = {"rows": 9, "tokens": 90, "clean": 3.0, "sae": 3.1, "zero": 3.4, "mean": 3.3, "note": "n"}
    ce |= {"recovered_zero": 0.7, "recovered_mean": None}
    ce |= {f"{name}_minus_clean": {"mean": 0.1, "low": 0.0, "high": 0.2} for name in ("sae", "zero", "mean")}
    fit = {"tokens": 5, "l0": 4.0, "fvu": 0.2, "fvu_by_head": [0.2], "variance_by_head": [1.0], "dead": 0.0, "dead_tokens": 9}
    old = Evaluation.model_validate({"reconstruction": fit, "prose": ce, "repeated": ce})
    assert old.reconstruction.fvu == 0.2
    assert (old.reconstruction.gamma, old.probes, old.stability) == (None, [], [])


# ---- the whole, on a model that is a table ----


class LinearModel:
    """Stands where a Lens would: z is a table look-up, the attention output is z W_O + b_O, a position's loss is its square."""

    info = SimpleNamespace(d_vocab=50, n_heads=2, d_head=2)
    device = torch.device("cpu")
    row_start = 50
    table = torch.randn(51, 4, generator=torch.Generator().manual_seed(2))
    bias = torch.tensor([0.5, -1.0, 2.0])

    def read_z(self, tokens: Tensor, layers: Sequence[int], dtype: torch.dtype = torch.float32) -> dict[int, Tensor]:
        return {layers[0]: self.table[tokens].to(dtype)}

    def W_O(self, layer: int) -> Tensor:  # noqa: ARG002
        return torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(4))

    def b_O(self, layer: int) -> Tensor:  # noqa: ARG002
        return self.bias

    def logit_rows(self, pos: int) -> int:
        return max(1, 30 // pos)  # fewer rows than a batch has

    def effects_with(self, tokens: Tensor, layer: int, replacements: Sequence[Callable[[Tensor], Tensor] | Out]) -> list[Effect]:
        effects = []
        for replacement in [None, *replacements]:
            z = self.table[tokens]
            if not isinstance(replacement, Out):
                z = replacement(z) if replacement else z
            out = z @ self.W_O(layer).flatten(0, 1) + self.bias
            if isinstance(replacement, Out):
                out = replacement.replace(out)
            loss = out.square().sum(-1)[:, :-1]
            effects.append(Effect(loss, (loss - effects[0].losses).abs() if effects else torch.zeros_like(loss)))
        return effects


def made_of(features: Tensor, *, dead: int = 0, **changed: Any) -> BatchTopKSAE:
    """An SAE whose decoder rows are `features` and whose encoder is their transpose; the last `dead` never fire."""
    n, d_in = features.shape
    cfg = SAEConfig(
        arch="batchtopk", d_in=d_in, d_sae=n, k=4, n_heads=2, d_head=d_in // 2, site=Site(layer=0), model="m",
        model_fingerprint="f", processing={}, scale=1.0, max_norm=None, context=9,
    ).model_copy(update=changed)  # fmt: skip
    b_enc = torch.zeros(n)
    b_enc[n - dead :] = -1e6
    tensors = {"W_enc": features.T, "b_enc": b_enc, "W_dec": features, "b_dec": torch.zeros(d_in), "threshold": torch.zeros(n)}
    return BatchTopKSAE(cfg, tensors)


def identity_sae(**changed: Any) -> BatchTopKSAE:
    """z = relu(z) - relu(-z): eight features reconstruct exactly, a ninth is never used."""
    return made_of(torch.cat([torch.eye(4), -torch.eye(4), torch.eye(4)[:1]]), dead=1, **changed)


def result_of(generator: Generator[Progress, None, Evaluation]) -> tuple[Evaluation, list[Progress]]:
    reports = []
    while True:
        try:
            reports.append(next(generator))
        except StopIteration as end:
            return end.value, reports


def measured(sae: SAE, n_heldout: int = 30, inner: int | None = None, **options: Any) -> tuple[Evaluation, Tensor]:
    """The evaluation on the table, and z of the held-out tokens; every second row has a row start at `inner`."""
    tokens = np.random.default_rng(1).integers(0, 50, (40, 9)).astype(np.int32)
    if inner is not None:
        tokens[::2, inner] = LinearModel.row_start
    rows: Any = SimpleNamespace(train=tokens[30:], heldout=tokens[:n_heldout], context=9)
    lens: Any = LinearModel()
    result, reports = result_of(
        evaluate(lens, sae, rows, prose_rows=30, repeated_rows=20, dead_tokens=90, batch_rows=7, **options)
    )
    assert reports[-1].done == reports[-1].total
    return result, LinearModel.table[torch.from_numpy(tokens[:n_heldout, 1:].astype(np.int64))]


def loss_of(z: Tensor) -> float:
    return float((z @ LinearModel().W_O(0).flatten(0, 1) + LinearModel.bias).square().sum(-1).mean())


def test_evaluate_of_a_perfect_sae_by_closed_form() -> None:
    result, z = measured(identity_sae())
    fit, prose = result.reconstruction, result.prose
    assert (fit.fvu, fit.mse) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert (fit.explained_variance, fit.cosine, fit.norm_ratio, fit.gamma) == pytest.approx((1.0, 1.0, 1.0, 1.0))
    assert (fit.l0, fit.tokens) == (4.0, 240)
    assert fit.l1 == pytest.approx(float(z.abs().sum(-1).mean()))
    assert fit.norm_in == pytest.approx(float(z.norm(dim=-1).mean()))
    assert fit.dead == pytest.approx(1 / 9)
    assert fit.dead_tokens == 30 * 8 + 10 * 8, "row starts do not count"
    assert prose is not None
    assert prose.sae == pytest.approx(prose.clean, rel=1e-6)
    assert prose.sae_kl is not None
    assert prose.sae_kl.mean == pytest.approx(0.0, abs=1e-5)
    assert prose.output_gap == pytest.approx(0.0, abs=1e-4)
    assert result.notes == []


def test_row_starts_between_documents_count_in_no_statistic_and_stay_as_they_are() -> None:
    result, z = measured(identity_sae(), inner=4)
    fit, prose = result.reconstruction, result.prose
    kept = torch.ones(30, 8, dtype=torch.bool)
    kept[::2, 3] = False  # z leaves out the first position
    assert fit.tokens == int(kept.sum())
    assert fit.norm_in == pytest.approx(float(z[kept].norm(dim=-1).mean()))
    assert fit.dead_tokens == 240 - 15 + 80 - 5
    assert prose is not None
    tokens = np.random.default_rng(1).integers(0, 50, (40, 9))[:30]
    tokens[::2, 4] = LinearModel.row_start
    scored, stays = LinearModel.table[torch.from_numpy(tokens)][:, :-1], torch.zeros(30, 8, 1, dtype=torch.bool)
    stays[:, 0], stays[::2, 4] = True, True
    assert prose.zero == pytest.approx(loss_of(scored * stays), rel=1e-5)
    assert prose.mean == pytest.approx(loss_of(torch.where(stays, scored, z[kept].mean(0))), rel=1e-4)


def test_losses_with_ablations_by_closed_form() -> None:
    """No position is excluded, so that every prediction is one that the ablation moved."""
    prose = measured(identity_sae(exclude_start=False))[0].prose
    tokens = np.random.default_rng(1).integers(0, 50, (40, 9))[:30]
    z = LinearModel.table[torch.from_numpy(tokens)]
    scored = z[:, :-1]
    assert prose is not None
    assert prose.clean == pytest.approx(loss_of(scored), rel=1e-5)
    assert prose.zero == pytest.approx(loss_of(torch.zeros(4)), rel=1e-5)
    assert prose.mean == pytest.approx(loss_of(z.mean((0, 1))), rel=1e-4)
    assert prose.zero_output == 0.0, "without b_O nothing is left"


def test_a_lossy_sae_by_brute_force() -> None:
    """Two of four coordinates are lost: each measure from its definition, on every token one by one."""
    sae = made_of(torch.cat([torch.eye(4)[:2], -torch.eye(4)[:2]]))
    result, z = measured(sae)
    fit = result.reconstruction
    flat = z.flatten(0, 1)
    z_hat = flat * torch.tensor([1.0, 1.0, 0.0, 0.0])
    spread = (flat - flat.mean(0)).square().sum(0)
    assert fit.fvu == pytest.approx(float((flat - z_hat).square().sum() / spread.sum()), rel=1e-5)
    assert fit.fvu_by_head[0] == pytest.approx(0.0, abs=1e-9)
    assert fit.fvu_by_head[1] == pytest.approx(float(flat[:, 2:].square().sum() / spread[2:].sum()), rel=1e-5)
    assert fit.variance_by_head == pytest.approx([float(spread[:2].sum() / spread.sum()), float(spread[2:].sum() / spread.sum())])
    assert fit.gamma == pytest.approx(1.0), "what is left is of the right size"
    assert fit.gamma_by_head == [pytest.approx(1.0), None], "nothing is left of the second head"
    assert fit.cosine == pytest.approx(float(torch.cosine_similarity(flat, z_hat).mean()), rel=1e-5)
    assert [(one.low, one.high, one.tokens) for one in fit.by_position] == [(1, 1, 30), (2, 3, 60), (4, 7, 120), (8, 8, 30)]
    for one in fit.by_position:
        here = z[:, one.low - 1 : one.high]
        error = here[..., 2:].square().sum()
        assert one.fvu == pytest.approx(float(error / (here - flat.mean(0)).square().sum()), rel=1e-5)
        assert one.l0 == pytest.approx(float((here[..., :2] != 0).sum(-1).float().mean()))
    assert result.prose is not None
    rebuilt = torch.cat([z_hat.view_as(z)], 1)[:, :-1]
    first = result.prose.by_position[0]
    assert (first.low, first.high, first.sae_minus_clean.mean) == (0, 0, 0.0), "the row start keeps its z"
    change = result.prose.by_position[1].sae_minus_clean.mean
    assert change == pytest.approx(loss_of(rebuilt[:, 0]) - loss_of(z[:, 0]), rel=1e-4)


def test_densities_by_brute_force() -> None:
    fit = measured(identity_sae())[0].reconstruction
    tokens = np.random.default_rng(1).integers(0, 50, (40, 9))[:, 1:]
    z = LinearModel.table[torch.from_numpy(tokens)].flatten(0, 1)
    density = torch.cat([(z > 0).double().mean(0), (z < 0).double().mean(0), torch.zeros(1)]).numpy()
    assert [one.density for one in fit.density_quantiles] == pytest.approx(
        [float(np.quantile(density, one.share)) for one in fit.density_quantiles]
    )
    assert fit.dense_10 == pytest.approx(float((density > 0.1).mean()))
    assert fit.dense_1 == pytest.approx(8 / 9)


def test_directions_are_compared_among_live_features_only() -> None:
    fit = measured(identity_sae())[0].reconstruction
    assert fit.decoder_cosine == pytest.approx(0.0), "the dead feature, a copy of the first, would make it 2/9"
    assert fit.encoder_cosine == pytest.approx(0.0)
    assert fit.encoder_decoder_cosine == pytest.approx(1.0)


def test_other_saes_are_matched_by_their_live_features() -> None:
    turned = made_of(torch.cat([torch.eye(4), -torch.eye(4), torch.eye(4)[:1]])[torch.randperm(9)])
    found = measured(identity_sae(), others={"same": identity_sae(), "turned": turned})[0].stability
    assert [(one.against, one.features, one.others) for one in found] == [("same", 8, 8), ("turned", 8, 9)]
    assert [one.mean for one in found] == pytest.approx([1.0, 1.0])
    assert found[0].mutual == 1.0


def test_without_held_out_rows_nothing_is_claimed_of_them() -> None:
    result, _ = measured(identity_sae(), n_heldout=0)
    assert result.prose is None
    assert (result.reconstruction.tokens, result.reconstruction.fvu) == (0, None)
    assert result.reconstruction.dead == pytest.approx(1 / 9)
    assert result.notes == ["No rows were held out, so nothing was measured on text that training has not seen."]


def test_a_model_that_gives_nan_leaves_notes_and_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    table = LinearModel.table.clone()
    table[3] = math.nan
    monkeypatch.setattr(LinearModel, "table", table)
    result, _ = measured(identity_sae())
    json.dumps(result.model_dump(mode="json"), allow_nan=False)
    assert result.reconstruction.fvu is None
    assert any("No finite value came out for cosine, fvu, gamma, mse" in note for note in result.notes)
    assert "The loss on held-out text is not finite." in result.notes


def test_a_site_that_never_varies_has_no_fvu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearModel, "table", torch.ones(51, 4))
    fit: Reconstruction = measured(identity_sae())[0].reconstruction
    assert (fit.fvu, fit.explained_variance) == (None, None)
    assert fit.cosine == pytest.approx(1.0)


def test_repeated_rows_say_the_same_twice_after_the_row_start() -> None:
    tokens = repeated_random(LinearModel(), 5, 9)  # type: ignore[arg-type]
    assert tokens.shape == (5, 9)
    assert (tokens[:, 0] == LinearModel.row_start).all()
    assert torch.equal(tokens[:, 1:5], tokens[:, 5:9])


# ---- on real architectures ----


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_divergences_are_those_of_the_predictions(tiny_lens: Callable[[str], Lens], kind: str) -> None:
    """KL from `lens` against its definition on distributions that the losses give: the vocabulary enumerated by targets."""
    lens = tiny_lens(kind)
    tokens = torch.randint(lens.info.d_vocab, (3, 12), generator=torch.Generator().manual_seed(1))
    clean, half = lens.effects_with(tokens, 2, [lambda z: z / 2])
    assert float(clean.kl.abs().max()) == 0.0
    assert torch.allclose(clean.losses, lens.token_losses(tokens))
    assert torch.allclose(half.losses, lens.token_losses(tokens, 2, lambda z: z / 2), atol=1e-5)
    # -log p(t) for every t: the loss of the prediction at position 4 when token 5, which it cannot see, is t.
    every = tokens[:1].repeat(lens.info.d_vocab, 1)
    every[:, 5] = torch.arange(lens.info.d_vocab)
    p, q = (-lens.token_losses(every, *patch)[:, 4].double() for patch in ((), (2, lambda z: z / 2)))
    assert float(p.exp().sum()) == pytest.approx(1.0, rel=1e-4)
    assert float(half.kl[0, 4]) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_patching_z_and_patching_the_output_agree_and_their_ablations_differ_by_the_bias(
    tiny_lens: Callable[[str], Lens], kind: str
) -> None:
    lens = tiny_lens(kind)
    d_in, layer = lens.info.d_in, 2
    features = torch.linalg.qr(torch.randn(d_in, d_in, generator=torch.Generator().manual_seed(0))).Q[: d_in // 2]
    sae = made_of(
        torch.cat([features, -features]),
        n_heads=lens.info.n_heads,
        d_head=lens.info.d_head,
        site=Site(layer=layer),
        exclude_start=False,
    )
    tokens = np.random.default_rng(0).integers(0, lens.info.d_vocab, (12, 16)).astype(np.int32)
    rows = Rows(folder=None, context=16, row_start=0, train=tokens[:4], heldout=tokens[4:], fingerprint="")  # type: ignore[arg-type]
    result, _ = result_of(evaluate(lens, sae, rows, prose_rows=8, repeated_rows=4, dead_tokens=64, batch_rows=4))
    prose = result.prose
    assert prose is not None
    assert prose.output_gap is not None
    assert prose.output_gap < 1e-4, "patching the output with z_hat W_O + b_O is patching z with z_hat"
    assert prose.sae != pytest.approx(prose.clean, abs=1e-3), "and either changes the loss"
    scored = torch.from_numpy(tokens[4:].astype(np.int64))
    gone = lens.token_losses(scored, layer, Out(torch.zeros_like)).double().mean()
    assert prose.zero_output == pytest.approx(float(gone), rel=1e-5)
    if lens.b_O(layer) is None:
        assert prose.zero_output == pytest.approx(prose.zero, rel=1e-12)
    else:
        assert prose.zero_output != pytest.approx(prose.zero, abs=1e-6)
