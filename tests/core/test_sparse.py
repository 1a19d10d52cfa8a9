"""The sparse step against autograd's dense one, and its top-k against a full sort."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_core import sparse
from sae_core.sparse import Code, Preacts

N, D_IN, D_SAE = 201, 12, 128  # more tokens than a part has when parts are small


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pre-activations come 64 tokens at a time, the least there is."""
    monkeypatch.setattr(sparse, "PART_BYTES", {"cpu": 1, "cuda": 1})


def dense_top_k(preacts: Tensor, count: int) -> Tensor:
    """[n, d_sae] with all but the `count` largest positive entries zeroed, by sorting everything."""
    flat = preacts.flatten()
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[flat.argsort(descending=True)[:count]] = True
    return (flat * (keep & (flat > 0))).view_as(preacts)


def dense_row_top_k(preacts: Tensor, k: int) -> Tensor:
    return torch.cat([dense_top_k(row.unsqueeze(0), k) for row in preacts])


def to_dense(code: Code, d_sae: int) -> Tensor:
    dense = torch.zeros(code.n, d_sae, device=code.value.device)
    dense[code.token, code.feature] = code.value
    return dense


def in_token_order(code: Code) -> bool:
    return torch.equal(code.token, code.token.sort().values)


# ---- selection ----


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), guess=st.sampled_from([0.0, 0.5, 1.0, 5.0]))
def test_batch_top_k_equals_a_full_sort_whatever_the_guess(seed: int, k: int, guess: float) -> None:
    preacts = torch.randn(7, 20, generator=torch.Generator().manual_seed(seed))
    code, cut = sparse.batch_top_k(preacts, 7 * k, guess)
    expected = dense_top_k(preacts, 7 * k)
    assert torch.equal(to_dense(code, 20), expected)
    assert cut == pytest.approx(float(expected[expected > 0].min()))
    assert in_token_order(code)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("guess", [0.0, 0.5, 2.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d_sae", [128, 90])
def test_batch_top_k_in_parts_equals_a_full_sort(guess: float, dtype: torch.dtype, d_sae: int) -> None:
    """The parts grow louder: what the first one gives for the cut is far too low, and its pool is dropped again."""
    preacts = torch.randn(N, d_sae, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, N).unsqueeze(1)
    # all different in bfloat16 too, so that there is one answer: 0, 1, 2 ... of the order's ends in positive numbers
    preacts = preacts.flatten().argsort().argsort().sub(N * d_sae // 2).view(N, d_sae).float()
    preacts = preacts.where(preacts < 200, preacts * 0 + 200 + preacts.remainder(50)).to(dtype)
    count = 150
    code, cut = sparse.batch_top_k(preacts, count, guess)
    found = to_dense(code, d_sae)
    sorted_values = preacts.flatten().float().sort(descending=True).values[:count]
    assert torch.equal(code.value.sort(descending=True).values, sorted_values)
    assert torch.equal(found[found > 0], preacts.float()[found > 0])
    assert cut == sorted_values[-1]
    assert in_token_order(code)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    k=st.sampled_from([1, 2, 5, 40]),
    d_sae=st.sampled_from([35, 96, 640, 1024]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_top_k_equals_each_rows_full_sort(seed: int, k: int, d_sae: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    preacts = torch.randn(7, d_sae, generator=generator) - 0.5
    if dtype == torch.bfloat16:  # integers to 255 are exact in it; each row has its own, most of them negative
        preacts = torch.stack([torch.randperm(d_sae, generator=generator) for _ in range(7)]) - (d_sae - 255.0)
    code = sparse.top_k(preacts.to(dtype), k)
    assert torch.equal(to_dense(code, d_sae), dense_row_top_k(preacts.to(dtype).float(), k))
    assert in_token_order(code)


def test_ties_at_the_cut_keep_the_count() -> None:
    preacts = torch.tensor([[3.0, 1.0, 1.0, 0.0], [1.0, 2.0, 1.0, -1.0]])
    code, cut = sparse.batch_top_k(preacts, 4)
    assert sorted(code.value.tolist()) == [1.0, 1.0, 2.0, 3.0]
    assert cut == 1.0
    assert sorted(sparse.top_k(preacts, 2).value.tolist()) == [1.0, 1.0, 2.0, 3.0]


def test_nothing_positive_gives_an_empty_code_and_no_gradient() -> None:
    code, cut = sparse.batch_top_k(-torch.ones(3, 4), 5)
    assert cut == 0.0
    for empty in (code, sparse.top_k(-torch.ones(3, 4), 2)):
        assert len(empty.value) == 0
        assert torch.equal(sparse.decode(empty, torch.randn(4, 2)), torch.zeros(3, 2))
        grads = sparse.backward(empty, torch.ones(3, 2), torch.ones(3, 2), torch.ones(4, 2), torch.ones(4, 2), torch.ones(2))
        assert torch.equal(grads.b_dec, torch.full((2,), 3.0))
        assert not grads.W_dec.any()
        assert not grads.W_enc_t.any()


# ---- pre-activations in parts ----


def _problem(n: int = N, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"x": (n, D_IN), "W_enc_t": (D_SAE, D_IN), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,), "b_enc": (D_SAE,)}
    return {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}


def _preacts(p: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Preacts:
    return Preacts(p["x"] - p["b_dec"], p["W_enc_t"], p["b_enc"], dtype)


def _whole(p: dict[str, Tensor]) -> Tensor:
    return (p["x"] - p["b_dec"]) @ p["W_enc_t"].T + p["b_enc"]


@pytest.mark.usefixtures("small_parts")
def test_parts_are_the_product_of_consecutive_tokens() -> None:
    p = _problem()
    parts = [part.clone() for part in _preacts(p).parts()]
    assert [len(part) for part in parts] == [64, 64, 64, 9]
    assert torch.allclose(torch.cat(parts), _whole(p), atol=1e-5)
    assert torch.allclose(_preacts(p).of(torch.tensor([3, 90])), _whole(p)[:, [3, 90]], atol=1e-5)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("select", [lambda x: sparse.batch_top_k(x, N * 5)[0], lambda x: sparse.top_k(x, 5)])
def test_selection_in_parts_equals_that_of_the_whole_product(select: Callable[[Tensor | Preacts], Code]) -> None:
    p = _problem()
    assert torch.allclose(to_dense(select(_preacts(p)), D_SAE), to_dense(select(_whole(p)), D_SAE), atol=1e-5)


@pytest.mark.parametrize("select", [lambda x: sparse.batch_top_k(x, N * 5)[0], lambda x: sparse.top_k(x, 5)])
def test_bfloat16_chooses_and_float32_computes(select: Callable[[Tensor | Preacts], Code]) -> None:
    p = _problem()
    rounded = torch.cat([part.clone() for part in _preacts(p, torch.bfloat16).parts()])
    chosen, code = select(rounded), select(_preacts(p, torch.bfloat16))
    assert torch.equal(code.token, chosen.token)
    assert torch.equal(code.feature, chosen.feature)
    exact = _whole(p)[code.token, code.feature]
    assert torch.allclose(code.value, exact, atol=1e-5)
    assert not torch.allclose(chosen.value, exact, atol=1e-3)


def test_an_entry_that_only_bfloat16_finds_positive_is_dropped() -> None:
    x = torch.tensor([[1.0, 1.0]])
    W_enc_t = torch.tensor([[1.001, -1.002], [3.0, 0.0]])  # -0.001 in float32; the bias lifts it after rounding only
    preacts = Preacts(x, W_enc_t, torch.tensor([0.0005, 0.0]), torch.bfloat16)
    assert (torch.cat(list(preacts.parts())) > 0).all()
    for code in (sparse.top_k(preacts, 2), sparse.batch_top_k(preacts, 2)[0]):
        assert code.feature.tolist() == [1]


# ---- gradients ----


def _leaves(p: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p[name].clone().requires_grad_() for name in ("W_enc_t", "W_dec", "b_dec", "b_enc")}


def _assert_equal_gradients(grads: sparse.Gradients, leaf: dict[str, Tensor], times: float = 1.0) -> None:
    for name, got in grads._asdict().items():
        wanted = leaf[name].grad
        assert wanted is not None
        assert (got - times * wanted).abs().max() <= 1e-5 * times * wanted.abs().max(), name


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("select", "dense"),
    [(lambda x: sparse.batch_top_k(x, N * 5)[0], lambda x: dense_top_k(x, N * 5)),
     (lambda x: sparse.top_k(x, 5), lambda x: dense_row_top_k(x, 5))],
    ids=["batch", "rows"],
)  # fmt: skip
def test_gradients_equal_autograds(select: Callable[[Preacts], Code], dense: Callable[[Tensor], Tensor]) -> None:
    p = _problem()
    leaf = _leaves(p)
    preacts = (p["x"] - leaf["b_dec"]) @ leaf["W_enc_t"].T + leaf["b_enc"]
    recon = (preacts * (dense(preacts.detach()) > 0)) @ leaf["W_dec"] + leaf["b_dec"]
    (recon - p["x"]).square().sum().backward()

    code = select(_preacts(p))
    out = sparse.decode(code, p["W_dec"]) + p["b_dec"]
    assert torch.allclose(out, recon.detach(), atol=1e-4)
    grads = sparse.backward(code, 2 * (out - p["x"]), p["x"], p["W_enc_t"], p["W_dec"], p["b_dec"])
    _assert_equal_gradients(grads, leaf)


DEAD = torch.tensor([1, 4, 9, 30, 31, 38, 100])


def _auxiliary(p: dict[str, Tensor], error: Tensor) -> tuple[float, dict[str, Tensor]]:
    """AuxK's loss by autograd, and the parameters with their gradients."""
    leaf = _leaves(p)
    preacts = ((p["x"] - leaf["b_dec"]) @ leaf["W_enc_t"].T + leaf["b_enc"])[:, DEAD]
    kept = torch.zeros_like(preacts).scatter(1, preacts.topk(3, dim=1).indices, 1.0)
    loss = ((preacts.relu() * kept) @ leaf["W_dec"][DEAD] - error).square().sum() / error.square().sum()
    loss.backward()
    return loss.item(), leaf


@pytest.mark.parametrize("dense_aux", [0, 100], ids=["sparse", "dense"])
@pytest.mark.parametrize("given_as", [_preacts, _whole], ids=["parts", "whole"])
def test_auxk_gradients_equal_autograds_and_reach_the_encoder_of_dead_features(
    dense_aux: int, given_as: Callable[[dict[str, Tensor]], Tensor | Preacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "DENSE_AUX", dense_aux)
    p = _problem()
    error = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(5))
    wanted_loss, leaf = _auxiliary(p, error)
    loss, grads = sparse.auxiliary(given_as(p), DEAD, 3, error, p["x"], p["W_enc_t"], p["W_dec"], p["b_dec"])
    assert float(loss) == pytest.approx(wanted_loss, rel=1e-5)
    _assert_equal_gradients(grads, leaf)
    assert grads.W_enc_t[DEAD].abs().sum(1).gt(0).all()
    assert grads.W_enc_t.abs().sum(1).gt(0).sum() == len(DEAD)


@pytest.mark.parametrize("dense_aux", [0, 100], ids=["sparse", "dense"])
def test_auxk_adds_its_weighted_gradients_to_others(dense_aux: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "DENSE_AUX", dense_aux)
    p = _problem()
    error = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(5))
    wanted_loss, leaf = _auxiliary(p, error)
    ones = sparse.Gradients(*(torch.ones_like(p[name]) for name in sparse.Gradients._fields))
    arguments = (DEAD, 3, error, p["x"], p["W_enc_t"], p["W_dec"], p["b_dec"])
    loss, grads = sparse.auxiliary(_preacts(p), *arguments, into=ones, weight=torch.tensor(0.5))
    assert grads.W_dec is ones.W_dec
    assert float(loss) == pytest.approx(wanted_loss, rel=1e-5)
    for name, got in grads._asdict().items():
        wanted = leaf[name].grad
        assert wanted is not None
        assert torch.allclose(got - 1, 0.5 * wanted, atol=1e-6), name


# ---- around the optimizer ----


def test_on_the_sphere_leaves_only_what_turns_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "ROWS", 50)  # the last part is shorter
    p = _problem()
    W_dec = sparse.normalise(p["W_dec"].clone())
    assert torch.allclose(W_dec, torch.nn.functional.normalize(p["W_dec"]), atol=1e-6)
    gradient = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(6))
    got = sparse.on_the_sphere(gradient.clone(), W_dec)
    assert (got * W_dec).sum(1).abs().max() < 1e-5
    parallel = gradient - got
    assert torch.allclose(parallel, (gradient * W_dec).sum(1, keepdim=True) * W_dec, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dense_aux", [0, 100], ids=["sparse", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_what_the_cpu_gives(dense_aux: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "DENSE_AUX", dense_aux)
    codes, results = [], []
    for device in ("cpu", "cuda"):
        p = _problem(device=device)
        # choices are compared in float32 only: bfloat16 products round differently
        preacts = _preacts(p, dtype)
        chosen = sparse.batch_top_k(_preacts(p), N * 5)[0], sparse.top_k(_preacts(p), 5)
        codes.append([to_dense(code, D_SAE).cpu() for code in chosen])
        code = preacts.exactly(chosen[0])
        residual = sparse.decode(code, p["W_dec"]) + p["b_dec"] - p["x"]
        grads = sparse.backward(code, residual, p["x"], p["W_enc_t"], p["W_dec"], p["b_dec"])
        arguments = (DEAD.to(device), 3, residual, p["x"], p["W_enc_t"], p["W_dec"], p["b_dec"])
        loss, grads = sparse.auxiliary(_preacts(p), *arguments, into=grads)
        results.append([loss.cpu(), *(g.cpu() for g in grads)])
    for ours, theirs in zip(codes[0] + results[0], codes[1] + results[1], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
