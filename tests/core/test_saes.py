"""Every architecture: its gradients against autograd on its equations, its inference against its definition."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_core.config import Arch, SAEConfig, Site, TrainConfig
from sae_core.saes import ARCHITECTURES, RECIPES, SAE
from sae_core.saes.matryoshka import MatryoshkaRecipe
from sae_core.saes.recipe import Batch, Recipe, geometric_median, principal_directions
from sae_core.trainer import Trainer

D_IN, D_SAE, N, K = 12, 36, 40, 3
CPU = torch.device("cpu")
NONE = torch.zeros(0, dtype=torch.int64)


def config(arch: Arch, **changes: Any) -> TrainConfig:
    return TrainConfig(model="m", corpus="c", site=Site(layer=0), arch=arch, expansion=D_SAE // D_IN, k=K, batch=64, **changes)


def recipe(arch: Arch, seed: int = 0, **changes: Any) -> Recipe:
    """A recipe with no parameter at a special place."""
    made = RECIPES[arch](config(arch, **changes), D_IN, CPU, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.parameters.items():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if name == "log_theta":
            parameter.sub_(0.7)
    made.normalise()
    return made


def inputs(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D_IN, generator=generator) * 2
    return x, x.mean(0) + 0.1


def leaves(made: Recipe) -> dict[str, Tensor]:
    return {name: parameter.clone().requires_grad_() for name, parameter in made.parameters.items()}


def assert_gradients(found: dict[str, Tensor], loss: Tensor, p: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    wanted = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
    for name in p:
        worst = (found[name] - wanted[name]).abs().max() / wanted[name].abs().max()
        assert worst < tolerance, f"{name}: {float(worst):.1e}"


def fvu(x_hat: Tensor, x: Tensor, mean: Tensor) -> Tensor:
    return (x_hat - x).square().sum() / (x - mean).square().sum()


def preacts(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return (x - p["b_dec"]) @ p["W_enc_t"].T + p["b_enc"]


def mask_of(arch: Arch, values: Tensor) -> Tensor:
    """What the code keeps, by sorting."""
    flat = values.detach().clamp_min(0)
    if arch == "topk":
        return flat * (flat >= flat.topk(K, dim=1).values[:, -1:]) > 0
    return flat * (flat >= flat.flatten().topk(N * K).values[-1]) > 0


@pytest.mark.parametrize("arch", ["topk", "batchtopk"])
@pytest.mark.parametrize("dead", [(), (1, 5, 6, 20)])
def test_top_k_gradients_are_autograds_auxk_included(arch: Arch, dead: tuple[int, ...]) -> None:
    made, (x, mean), idle = recipe(arch, aux_k=2), inputs(), torch.tensor(dead, dtype=torch.int64)
    p = leaves(made)
    values = preacts(p, x)
    x_hat = (values * mask_of(arch, values)) @ p["W_dec"] + p["b_dec"]
    loss = fvu(x_hat, x, mean)
    if dead:
        error = (x - x_hat).detach()
        some = values[:, idle]
        top = torch.relu(some) * (some >= some.topk(2, dim=1).values[:, -1:])
        loss = loss + made.cfg.aux_coef * (top @ p["W_dec"][idle] - error).square().sum() / error.square().sum()
    found = made.gradients(Batch(x, mean, K, 1.0, idle))
    assert float(found.values["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(found.values["l0"]) == pytest.approx(K)
    assert int(found.fired.sum()) == N * K
    assert_gradients(found.gradients, loss, p)


def test_matryoshka_gradients_are_autograds() -> None:
    made, (x, mean) = recipe("matryoshka", groups=(1 / 6, 1 / 3)), inputs()
    assert isinstance(made, MatryoshkaRecipe)
    assert made.bounds == [0, 6, 18, 36]
    p = leaves(made)
    values = preacts(p, x)
    f = values * mask_of("batchtopk", values)
    prefixes = [f[:, :end] @ p["W_dec"][:end] + p["b_dec"] for end in (6, 18, 36)]
    loss = sum((fvu(x_hat, x, mean) for x_hat in prefixes), torch.zeros(())) / 3
    found = made.gradients(Batch(x, mean, K, 1.0, NONE))
    assert float(found.values["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(found.values["fvu"]) == pytest.approx(float(fvu(prefixes[-1], x, mean).detach()), rel=1e-5)
    assert_gradients(found.gradients, loss, p)


def test_relu_gradients_are_those_of_the_papers_loss() -> None:
    made, (x, mean) = recipe("relu", l1=0.7), inputs()
    p = leaves(made)
    f = torch.relu(preacts(p, x))
    loss = (f @ p["W_dec"] + p["b_dec"] - x).square().sum(1).mean() + 0.7 * f.sum(1).mean()
    found = made.gradients(Batch(x, mean, K, 1.0, NONE))
    assert float(found.values["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(found.values["l0"]) == pytest.approx(float((f > 0).sum() / N))
    assert_gradients(found.gradients, loss, p)


def test_gated_gradients_reach_the_gate_through_the_penalty_and_the_guide_alone() -> None:
    made, (x, mean) = recipe("gated", l1=0.4), inputs()
    p = leaves(made)
    u = (x - p["b_dec"]) @ p["W_enc_t"].T
    gate = u + p["b_gate"]
    f = (gate > 0).float() * torch.relu(p["r"].exp() * u + p["b_enc"])
    fixed = (p["W_dec"].detach(), p["b_dec"].detach())
    guide = (torch.relu(gate) @ fixed[0] + fixed[1] - x).square().sum(1).mean()
    loss = (f @ p["W_dec"] + p["b_dec"] - x).square().sum(1).mean() + 0.4 * torch.relu(gate).sum(1).mean() + guide
    found = made.gradients(Batch(x, mean, K, 1.0, NONE))
    assert_gradients(found.gradients, loss, p)


def test_jumprelu_gradients_are_the_straight_through_sums() -> None:
    """Smooth parameters by autograd with the jump held fixed, thresholds by the published sums, written out."""
    made, (x, mean) = recipe("jumprelu", bandwidth=0.8, l0_coef=0.3), inputs()
    p = leaves(made)
    values, theta = preacts(p, x), p["log_theta"].exp().detach()
    on = (values > theta).float().detach()
    smooth = fvu((values * on) @ p["W_dec"] + p["b_dec"], x, mean)
    found = made.gradients(Batch(x, mean, K, 1.0, NONE))
    names = ["W_enc_t", "b_enc", "W_dec", "b_dec"]
    assert_gradients(found.gradients, smooth, {name: p[name] for name in names})

    f = (values * on).detach()
    power = (x - mean).square().sum()
    per_value = 2 * ((f @ made.W_dec + made.b_dec - x) @ made.W_dec.T) / power  # d FVU / d f
    window = ((values.detach() - theta).abs() < 0.4).float()
    l0 = float(on.sum()) / N
    by_theta = -(theta / 0.8) * (per_value * window).sum(0) - 0.3 * 2 * (l0 / K - 1) / K * window.sum(0) / 0.8 / N
    assert torch.allclose(found.gradients["log_theta"], by_theta * theta, rtol=1e-4, atol=1e-7)
    assert window.sum() > 0


@pytest.mark.parametrize("arch", list(RECIPES))
def test_the_decoder_moves_on_the_sphere(arch: Arch) -> None:
    made, (x, mean) = recipe(arch), inputs()
    gradient = made.gradients(Batch(x, mean, K, 1.0, NONE)).gradients["W_dec"]
    size = gradient.norm(dim=1).max()
    assert (gradient * made.W_dec).sum(1).abs().max() > 0.01 * size
    assert (made.on_the_sphere(gradient) * made.W_dec).sum(1).abs().max() < 1e-5 * size


def test_the_led_penalty_comes_to_rest_at_k() -> None:
    """On data with a known sparse code, L0 ends near k from weights that are far too small and too large."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(24, D_IN, generator=generator), dim=1)
    for start in (0.02, 2.0):
        trainer = Trainer(config("relu", lr=1e-2), D_IN, CPU, torch.float32)
        trainer.recipe.facts["l1"] = start
        l0 = []
        for _ in range(400):
            code = (torch.rand(256, 24, generator=generator) < 0.1) * (1 + torch.rand(256, 24, generator=generator))
            x = code @ atoms
            l0.append(float(trainer.step(x, x.mean(0), 3e-3, K, 10**9).l0))
        assert K * 0.8 < sum(l0[-50:]) / 50 < K * 1.25, start


def saved(arch: Arch, tensors: dict[str, Tensor]) -> SAE:
    cfg = SAEConfig(
        arch=arch, d_in=D_IN, d_sae=D_SAE, k=K, n_heads=3, d_head=4, site=Site(layer=0), model="m", model_fingerprint="f",
        processing={}, scale=1.0, max_norm=None, context=8,
    )  # fmt: skip
    return ARCHITECTURES[arch](cfg, tensors)


@pytest.mark.parametrize("arch", list(RECIPES))
def test_sparse_dense_and_chosen_activations_agree(arch: Arch) -> None:
    made, (z, _) = recipe(arch), inputs()
    sae = saved(arch, made.tensors())
    dense = sae.encode(z)
    assert 0 < float((dense > 0).sum()) < dense.numel()
    code = sae.encode_sparse(z)
    assert torch.equal(torch.stack([code.token, code.feature]), torch.stack(dense.nonzero(as_tuple=True)))
    assert torch.equal(code.value, dense[code.token, code.feature])
    features = torch.tensor([7, 0, 33])
    w, c = sae.affine(features)
    chosen = sae.activate(z @ w.T + c, features, sae.least(z))
    assert torch.allclose(chosen, dense[:, features], atol=1e-5)
    assert torch.equal(chosen > 0, dense[:, features] > 0)


def test_topk_keeps_k_at_inference_however_the_features_are_asked_for() -> None:
    sae, (z, _) = saved("topk", recipe("topk").tensors()), inputs()
    assert ((sae.encode(z) > 0).sum(1) == K).all()
    assert torch.allclose(sae.encode(z[5:6]), sae.encode(z)[5:6], atol=1e-5)


def test_a_gated_sae_is_saved_as_the_thresholded_sae_it_is_equal_to() -> None:
    made, (z, _) = recipe("gated"), inputs()
    u = (z - made.b_dec) @ made.W_enc_t.T
    wanted = (u + made.parameters["b_gate"] > 0) * torch.relu(made.parameters["r"].exp() * u + made.b_enc)
    found = saved("gated", made.tensors()).encode(z)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.equal(found > 0, wanted > 0)


def test_the_geometric_median_ignores_an_outlier_that_moves_the_mean() -> None:
    points = torch.cat([torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) + 5, torch.full((20, 3), 1e4)])
    median = geometric_median(points)
    assert (median - 5).abs().max() < 0.5
    # a stationary point: the unit vectors towards the sample cancel
    towards = torch.nn.functional.normalize(points.double() - median.double(), dim=1)
    assert towards.sum(0).norm() < 0.05


def test_principal_directions_span_what_varies_and_the_first_decoder_stays_in_it() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D_IN, 4, generator=generator)).Q.T
    sample = torch.randn(500, 4, generator=generator) @ basis + 7
    found = principal_directions(sample, 4)
    assert torch.allclose(found @ found.T, torch.eye(4), atol=1e-5)
    assert torch.allclose((found @ basis.T).square().sum(), torch.tensor(4.0), atol=1e-4)
    made = RECIPES["batchtopk"](config("batchtopk", active_subspace=4 / D_IN), D_IN, CPU, torch.float32)
    made.begin(sample, sample.mean(0))
    inside = made.W_dec @ basis.T @ basis
    assert torch.allclose(inside, made.W_dec, atol=1e-5)
    assert torch.equal(made.W_enc_t, made.W_dec)
    assert torch.allclose(made.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_untied_starts_are_drawn_as_published() -> None:
    made = RECIPES["relu"](config("relu", tied_init=False, b_dec_init="zeros"), D_IN, CPU, torch.float32)
    bound = math.sqrt(6 / D_SAE)
    assert 0.9 * bound < float(made.W_enc_t.abs().max()) <= bound
    assert not torch.allclose(made.W_enc_t / made.W_enc_t.norm(dim=1, keepdim=True), made.W_dec, atol=0.1)
