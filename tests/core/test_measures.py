"""Sums and weight measures against numbers worked out by hand and against brute force."""

import math

import pytest
import torch
from torch import Tensor

from sae_core import measures
from sae_core.measures import Firing, Sums, alignment, nearest, neighbour_cosine


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counted(z: Tensor, z_hat: Tensor) -> Sums:
    sums = Sums(z.shape[1])
    sums.add(z, z_hat)
    return sums


def test_fvu_is_one_for_the_mean_and_zero_for_a_perfect_copy() -> None:
    z = torch.tensor([[1.0, 10.0], [3.0, 14.0]])  # mean (2, 12); squared deviations 2 and 8
    assert counted(z, z).fvu() == 0.0
    assert counted(z, z.mean(0).expand_as(z)).fvu() == pytest.approx(1.0)


def test_fvu_by_hand_and_by_head_and_merged() -> None:
    z = torch.tensor([[1.0, 10.0], [3.0, 14.0]])
    z_hat = z + torch.tensor([[0.5, 0.0], [0.5, 2.0]])  # squared errors: 0.5 in head 0, 4 in head 1
    sums = counted(z[:1], z_hat[:1]).merge(counted(z[1:], z_hat[1:]))
    assert sums.n == 2
    assert sums.fvu() == pytest.approx(4.5 / 10)
    assert sums.fvu_by_head(2) == pytest.approx([0.5 / 2, 4 / 8])
    assert sums.share_by_head(2) == pytest.approx([0.2, 0.8])


def test_fvu_does_not_depend_on_where_the_mean_lies() -> None:
    z = normal(100, 4)
    assert counted(z + 1000, 0.9 * z + 1000).fvu() == pytest.approx(counted(z, 0.9 * z).fvu(), rel=1e-6)


def test_parts_of_the_tokens_add_up_to_the_whole_around_the_mean_of_all() -> None:
    z = normal(90, 4) + torch.arange(90)[:, None] / 30  # the parts' own means differ
    z_hat = z + 0.3 * normal(90, 4, seed=1)
    parts = [counted(z[low : low + 30], z_hat[low : low + 30]) for low in (0, 30, 60)]
    whole = counted(z, z_hat)
    variance = [float(part.spread(whole.mean).sum()) for part in parts]
    assert sum(variance) == pytest.approx(float(whole.spread().sum()))
    weighted = sum(part.fvu(whole.mean) * v for part, v in zip(parts, variance, strict=True)) / sum(variance)
    assert weighted == pytest.approx(whole.fvu())
    own = float((z[:30] - z.mean(0)).square().sum())
    assert parts[0].fvu(whole.mean) == pytest.approx(float((z[:30] - z_hat[:30]).square().sum()) / own)


def test_every_measure_against_brute_force() -> None:
    z, z_hat = normal(50, 6) + 2, 0.7 * (normal(50, 6) + 2) + 0.2 * normal(50, 6, seed=1)
    sums = counted(z, z_hat)
    mean = z.mean(0)
    rows = list(zip(z, z_hat, strict=True))
    assert sums.gamma() == pytest.approx(float(sum(h @ h for _, h in rows) / sum(h @ x for x, h in rows)))
    ours, both = sum((h - mean) @ (h - mean) for _, h in rows), sum((h - mean) @ (x - mean) for x, h in rows)
    assert sums.gamma_centred() == pytest.approx(float(ours / both))
    assert sums.gamma_by_head(2)[1] == pytest.approx(
        float(sum(h[3:] @ h[3:] for _, h in rows) / sum(h[3:] @ x[3:] for x, h in rows))
    )
    assert sums.cosine / 50 == pytest.approx(float(torch.cosine_similarity(z, z_hat).mean()))
    assert sums.norm_in / 50 == pytest.approx(float(z.norm(dim=1).mean()))
    assert sums.norm_out / 50 == pytest.approx(float(z_hat.norm(dim=1).mean()))
    assert sums.ratio / 50 == pytest.approx(float((z_hat.norm(dim=1) / z.norm(dim=1)).mean()))
    assert float(sums.error.sum()) / 50 == pytest.approx(float((z - z_hat).square().sum(1).mean()))


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_gamma_is_the_factor_of_a_reconstruction_that_only_shrinks(factor: float) -> None:
    z = normal(40, 4)
    assert counted(z, factor * z).gamma() == pytest.approx(factor)


def test_gamma_minimises_what_it_is_said_to_minimise() -> None:
    """The paper's definition: the gamma at which |z_hat / gamma - z|^2 is least."""
    z, z_hat = normal(40, 4), normal(40, 4) * 0.6 + 0.1 * normal(40, 4, seed=1)
    gamma = counted(z, z_hat).gamma()
    error = [float((z_hat / (gamma * off) - z).square().sum()) for off in (0.98, 1.0, 1.02)]
    assert error[1] == min(error)


def test_a_large_mean_hides_shrinkage_from_gamma_but_not_from_its_centred_form() -> None:
    z = normal(400, 4) + 50
    shrunk = z.mean(0) + 0.5 * (z - z.mean(0))
    assert counted(z, shrunk).gamma() == pytest.approx(1.0, abs=1e-3)
    assert counted(z, shrunk).gamma_centred() == pytest.approx(0.5)


def test_a_reconstruction_of_nothing_has_no_direction_and_no_length() -> None:
    sums = counted(torch.ones(2, 3), torch.zeros(2, 3))
    assert (sums.cosine, sums.ratio, sums.norm_out) == (0.0, 0.0, 0.0)


def test_density_counts_tokens_and_its_quantiles_are_over_all_features() -> None:
    firing = Firing(4)
    acts = torch.tensor([[1.0, 0.5, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    assert firing.add(acts).tolist() == [2, 1]
    assert firing.add(acts).tolist() == [2, 1]
    assert firing.density.tolist() == [1.0, 0.5, 0.0, 0.0]
    assert firing.live.tolist() == [True, True, False, False]
    assert (firing.above(0.5), firing.above(0.1)) == (0.25, 0.5)
    assert firing.quantiles((0.0, 0.5, 1.0)) == pytest.approx([0.0, 0.25, 1.0])


@pytest.mark.parametrize("at_once", [1, 40, 2**25])
def test_nearest_is_the_largest_signed_cosine(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(measures, "AT_ONCE", at_once)
    a, b = normal(7, 3), normal(9, 3, seed=1)
    value, which = nearest(a, b)
    for i in range(7):
        cosines = [float(torch.cosine_similarity(a[i], row, dim=0)) for row in b]
        assert float(value[i]) == pytest.approx(max(cosines), abs=1e-6)
        assert int(which[i]) == cosines.index(max(cosines))
    others, _ = nearest(a, a, same=True)
    for i in range(7):
        assert float(others[i]) == pytest.approx(
            max(float(torch.cosine_similarity(a[i], a[j], dim=0)) for j in range(7) if j != i), abs=1e-6
        )


def test_neighbours_by_hand() -> None:
    assert neighbour_cosine(torch.eye(3)) == pytest.approx(0.0)
    assert neighbour_cosine(torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])) == pytest.approx((1 + 1 - 1) / 3)
    assert neighbour_cosine(torch.tensor([[1.0, 0.0], [1.0, 1.0]])) == pytest.approx(1 / math.sqrt(2))
    assert neighbour_cosine(torch.ones(1, 3)) is None
    assert alignment(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])) == pytest.approx(0.0)
    assert alignment(torch.zeros(0, 2), torch.zeros(0, 2)) is None
