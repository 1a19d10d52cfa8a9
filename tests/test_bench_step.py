"""What `sae-step` measures: that its sides take steps, and that its gradient error would show a wrong gradient."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import _step, sae_step
from sae_core import sparse
from sae_core.sparse import Code, Gradients

D_IN, D_SAE, K = 8, 32, 4


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=generator))
    return {"x": torch.randn(2, 256, D_IN, generator=generator), "W_dec": W_dec}


def test_a_side_answers_each_request_with_its_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sae_step, "K", K)
    torch.save(_inputs(), tmp_path / "inputs.pt")
    with sae_step.Side(Path(sys.executable), "topk", "float32", tmp_path / "inputs.pt") as side:
        for number in range(3):
            side.step(keep=number > 0)
    assert len(side.seconds) == 2
    assert all(seconds > 0 for seconds in side.seconds)


def test_a_side_that_fails_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="status 1"):
        sae_step.Side(Path(sys.executable), "topk", "float32", tmp_path / "nothing.pt")


def test_the_dense_side_is_the_sae_that_ours_is() -> None:
    inputs = _inputs()
    x, W_dec = inputs["x"][0], inputs["W_dec"]
    b_dec = x.mean(0)
    code = sparse.top_k((x - b_dec) @ W_dec.T, K)
    assert torch.allclose(_step.Dense(W_dec, b_dec, K)(x), sparse.decode(code, W_dec) + b_dec, atol=1e-5)


@pytest.mark.parametrize("side", ["dense", "topk", "batchtopk"])
def test_steps_of_a_side_make_the_error_smaller(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_core.trainer import Trainer

    found: list[float] = []
    dense_forward, our_step = _step.Dense.forward, Trainer.step

    def forward(self: _step.Dense, x: Tensor) -> Tensor:
        x_hat = dense_forward(self, x)
        found.append(float((x_hat.detach() - x).square().sum()))
        return x_hat

    def step(self: Trainer, *args: object, **named: object) -> object:
        stats = our_step(self, *args, **named)
        found.append(float(stats.fvu))
        return stats

    monkeypatch.setattr(_step.Dense, "forward", forward)
    monkeypatch.setattr(Trainer, "step", step)
    inputs = _inputs()
    take = _step.SIDES[side](inputs["x"][0], inputs["W_dec"], K, 1e-2, "float32")
    for _ in range(20):
        take(inputs["x"][0])
    assert found[-1] < 0.8 * found[0]


def test_gradient_error_is_small_and_shows_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"n": 64, "d_in": 16, "expansion": 8, "k": 4}
    assert sae_step.gradient_error(**small) <= 1e-5
    right = sparse.backward

    def wrong(code: Code, *args: Tensor) -> Gradients:
        found = right(code, *args)
        return found._replace(b_dec=found.b_dec * 1.001)

    monkeypatch.setattr(sparse, "backward", wrong)
    assert sae_step.gradient_error(**small) > 1e-4
