"""The sparse step against autograd's dense one, and its top-k against a full sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_core import sparse


def dense_top_k(preacts: Tensor, count: int) -> Tensor:
    """[n, d_sae] with all but the `count` largest positive entries zeroed, by sorting everything."""
    flat = preacts.flatten()
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[flat.argsort(descending=True)[:count]] = True
    return (flat * (keep & (flat > 0))).view_as(preacts)


def to_dense(code: sparse.Code, d_sae: int) -> Tensor:
    dense = torch.zeros(code.n, d_sae)
    dense[code.token, code.feature] = code.value
    return dense


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), guess=st.sampled_from([0.0, 0.5, 1.0, 5.0]))
def test_batch_top_k_equals_a_full_sort_whatever_the_guess(seed: int, k: int, guess: float) -> None:
    preacts = torch.randn(7, 20, generator=torch.Generator().manual_seed(seed))
    code, cut = sparse.batch_top_k(preacts, 7 * k, guess)
    expected = dense_top_k(preacts, 7 * k)
    assert torch.equal(to_dense(code, 20), expected)
    assert cut == pytest.approx(float(expected[expected > 0].min()))
    assert torch.equal(code.token, code.token.sort().values)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), k=st.sampled_from([1, 2, 5, 40]), d_sae=st.sampled_from([35, 96, 640]))
def test_top_k_equals_each_rows_full_sort(seed: int, k: int, d_sae: int) -> None:
    preacts = torch.randn(7, d_sae, generator=torch.Generator().manual_seed(seed)) - 0.5
    code = sparse.top_k(preacts, k)
    expected = torch.cat([dense_top_k(row.unsqueeze(0), k) for row in preacts])
    assert torch.equal(to_dense(code, d_sae), expected)
    assert torch.equal(code.token, code.token.sort().values)


def test_nothing_positive_gives_an_empty_code() -> None:
    code, cut = sparse.batch_top_k(-torch.ones(3, 4), 5)
    assert len(code.value) == 0
    assert cut == 0.0
    assert torch.equal(sparse.decode(code, torch.randn(4, 2)), torch.zeros(3, 2))


def _problem(n: int = 33, d_in: int = 12, d_sae: int = 40) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"x": (n, d_in), "W_enc_t": (d_sae, d_in), "W_dec": (d_sae, d_in), "b_dec": (d_in,), "b_enc": (d_sae,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_gradients_equal_autograds() -> None:
    p = _problem()
    leaf = {name: p[name].clone().requires_grad_() for name in ("W_enc_t", "W_dec", "b_dec", "b_enc")}
    preacts = (p["x"] - leaf["b_dec"]) @ leaf["W_enc_t"].T + leaf["b_enc"]
    mask = dense_top_k(preacts.detach(), 33 * 5) > 0
    recon = (preacts * mask) @ leaf["W_dec"] + leaf["b_dec"]
    (recon - p["x"]).square().sum().backward()

    plain = (p["x"] - p["b_dec"]) @ p["W_enc_t"].T + p["b_enc"]
    code, _ = sparse.batch_top_k(plain, 33 * 5)
    out = sparse.decode(code, p["W_dec"]) + p["b_dec"]
    grads = sparse.backward(code, 2 * (out - p["x"]), p["x"], p["W_enc_t"], p["W_dec"], p["b_dec"])

    for name, got in grads._asdict().items():
        wanted = leaf[name].grad
        assert wanted is not None
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def test_auxk_gradients_equal_autograds_and_reach_the_encoder_of_dead_features() -> None:
    p = _problem()
    dead = torch.tensor([1, 4, 9, 30, 31, 38])
    error = torch.randn(33, 12, generator=torch.Generator().manual_seed(5))
    leaf = {name: p[name].clone().requires_grad_() for name in ("W_enc_t", "W_dec", "b_dec", "b_enc")}
    preacts = ((p["x"] - leaf["b_dec"]) @ leaf["W_enc_t"].T + leaf["b_enc"])[:, dead]
    kept = torch.zeros_like(preacts).scatter(1, preacts.topk(3, dim=1).indices, 1.0)
    wanted_loss = ((preacts.relu() * kept) @ leaf["W_dec"][dead] - error).square().sum() / error.square().sum()
    wanted_loss.backward()

    plain = (p["x"] - p["b_dec"]) @ p["W_enc_t"].T + p["b_enc"]
    loss, grads = sparse.auxiliary(plain, dead, 3, error, p["x"], p["W_enc_t"], p["W_dec"], p["b_dec"])

    assert float(loss) == pytest.approx(wanted_loss.item(), rel=1e-5)
    for name, got in grads._asdict().items():
        wanted = leaf[name].grad
        assert wanted is not None
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
    assert grads.W_enc_t[dead].abs().sum(1).gt(0).all()
