"""Each metric against its closed form, on numbers small enough to work out by hand."""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_core.config import SAEConfig, Site
from sae_core.evaluate import Evaluation, Variance, cross_entropy, evaluate, interval, repeated_random
from sae_core.saes import BatchTopKSAE


def test_fvu_is_one_for_the_mean_and_zero_for_a_perfect_copy() -> None:
    z = torch.tensor([[1.0, 10.0], [3.0, 14.0]])  # mean (2, 12); squared deviations 2 and 8
    perfect, mean = Variance(2), Variance(2)
    perfect.add(z, z)
    mean.add(z, z.mean(0).expand_as(z))
    assert perfect.fvu() == 0.0
    assert mean.fvu() == pytest.approx(1.0)


def test_fvu_by_hand_and_by_head_and_streamed() -> None:
    z = torch.tensor([[1.0, 10.0], [3.0, 14.0]])
    z_hat = z + torch.tensor([[0.5, 0.0], [0.5, 2.0]])  # squared errors: 0.5 in head 0, 4 in head 1
    variance = Variance(2)
    variance.add(z[:1], z_hat[:1])
    variance.add(z[1:], z_hat[1:])
    assert variance.fvu() == pytest.approx(4.5 / 10)
    assert variance.fvu_by_head(2) == pytest.approx([0.5 / 2, 4 / 8])
    assert variance.share_by_head(2) == pytest.approx([0.2, 0.8])


def test_fvu_does_not_depend_on_where_the_mean_lies() -> None:
    z = torch.randn(100, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near, far = Variance(4), Variance(4)
    near.add(z, 0.9 * z)
    far.add(z + 1000, 0.9 * z + 1000)
    assert far.fvu() == pytest.approx(near.fvu(), rel=1e-6)


def test_interval_is_the_normal_one_over_rows() -> None:
    got = interval(torch.tensor([1.0, 2.0, 3.0, 4.0]))  # std sqrt(5/3), half = 1.96 * that / 2
    half = 1.959964 * math.sqrt(5 / 3) / 2
    assert (got.mean, got.low, got.high) == pytest.approx((2.5, 2.5 - half, 2.5 + half))


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


class LinearModel:
    """Stands where a Lens would: z is a table look-up, the loss of a position is |z|^2 of the patched z."""

    info = SimpleNamespace(d_vocab=50, n_heads=2, d_head=2)
    device = torch.device("cpu")
    row_start = 7
    table = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))

    def read_z(self, tokens: Tensor, layers: Sequence[int], dtype: torch.dtype = torch.float32) -> dict[int, Tensor]:
        return {layers[0]: self.table[tokens].to(dtype)}

    def token_losses(self, tokens: Tensor, layer: int | None = None, replace: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        assert (layer is None) == (replace is None)
        z = self.table[tokens]
        return (replace(z) if replace else z).square().sum(-1)[:, 1:]


def identity_sae() -> BatchTopKSAE:
    """z = relu(z) - relu(-z): eight features, one of them never used, reconstruct exactly."""
    cfg = SAEConfig(
        arch="batchtopk", d_in=4, d_sae=9, k=4, n_heads=2, d_head=2, site=Site(layer=0), model="m", model_fingerprint="f",
        processing={}, scale=1.0, max_norm=None, context=9,
    )  # fmt: skip
    both = torch.cat([torch.eye(4), -torch.eye(4), torch.eye(4)[:1]])
    tensors = {"W_enc": both.T, "b_enc": torch.tensor([0.0] * 8 + [-1e6]), "W_dec": both, "b_dec": torch.zeros(4)}
    return BatchTopKSAE(cfg, tensors | {"threshold": torch.zeros(9)})


def test_evaluate_of_a_perfect_sae_by_closed_form() -> None:
    tokens = np.random.default_rng(1).integers(0, 50, (40, 9)).astype(np.int32)
    rows: Any = SimpleNamespace(train=tokens, heldout=tokens[:30], context=9)
    generator = evaluate(LinearModel(), identity_sae(), rows, prose_rows=30, repeated_rows=20, dead_tokens=360)  # type: ignore[arg-type]
    reports = []
    while True:
        try:
            reports.append(next(generator))
        except StopIteration as end:
            result: Evaluation = end.value
            break
    z = LinearModel.table[torch.from_numpy(tokens[:30, 1:].astype(np.int64))]
    assert result.reconstruction.fvu == pytest.approx(0.0, abs=1e-9)
    assert result.reconstruction.l0 == pytest.approx(4.0)
    assert result.reconstruction.dead == pytest.approx(1 / 9)
    assert result.prose.sae == pytest.approx(result.prose.clean, rel=1e-6)
    assert result.prose.clean == pytest.approx(float(z.square().sum(-1).mean()), rel=1e-5)
    assert result.prose.zero == 0.0
    assert result.prose.mean == pytest.approx(float(z.mean((0, 1)).square().sum()), rel=1e-4)
    assert reports[-1].done == reports[-1].total


def test_repeated_rows_say_the_same_twice_after_the_row_start() -> None:
    tokens = repeated_random(LinearModel(), 5, 9)  # type: ignore[arg-type]
    assert tokens.shape == (5, 9)
    assert (tokens[:, 0] == 7).all()
    assert torch.equal(tokens[:, 1:5], tokens[:, 5:9])
