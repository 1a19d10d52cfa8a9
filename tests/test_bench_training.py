"""The benchmarks' own arithmetic: what they say must follow from what they ran."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench._processes import measured, peak_memory
from bench.train_vs_saelens import K, _at_k


def dictionary(n: int, d: int, f: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "W_enc": torch.randn(d, f, generator=generator),
        "b_enc": torch.randn(f, generator=generator),
        "W_dec": torch.randn(f, d, generator=generator),
        "b_dec": torch.randn(d, generator=generator),
        "threshold": torch.full((f,), 1.0),
    }
    return tensors, torch.randn(n, d, generator=generator)


def test_both_sides_are_compared_at_just_k_features_per_token() -> None:
    tensors, z = dictionary(3000, 8, 400)
    tensors["b_enc"][:7] = -100.0
    found = _at_k(tensors, z)
    assert found["l0"] == pytest.approx(K, abs=2 / len(z))  # the cut itself may be counted or not

    preacts = (z - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    cut = preacts.flatten().sort(descending=True).values[K * len(z) - 1]
    rebuilt = torch.where(preacts > cut, preacts, 0.0) @ tensors["W_dec"] + tensors["b_dec"]
    assert found["fvu"] == pytest.approx(float((z - rebuilt).square().sum() / (z - z.mean(0)).square().sum()), rel=1e-4)
    assert found["l0_as_saved"] == pytest.approx(float((preacts > 1.0).sum() / len(z)))
    assert found["silent"] == pytest.approx(float((preacts <= cut).all(0).float().mean()))
    assert found["silent"] >= 7 / 400


def test_a_timed_process_hands_back_its_last_line() -> None:
    code = "import json, sys; print('noise'); print(json.dumps({'twice': 2 * json.loads(sys.argv[1])['n']}))"
    assert measured([sys.executable, "-c", code], n=21) == {"twice": 42}


def test_a_timed_process_that_fails_ends_the_benchmark_with_its_last_words() -> None:
    with pytest.raises(SystemExit, match="no room for bees"):
        measured([sys.executable, "-c", "raise ValueError('no room for bees')"])


def test_peak_memory_is_the_process_own() -> None:
    held = bytearray(64 << 20)  # nothing of it may be seen by the child
    code = "from bench._processes import peak_memory as p; a = p(); b = bytearray(50 << 20); print(a, p())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(command.__file__).parent.parent)
    before, after = map(int, done.stdout.split())
    assert after - before >= 45 << 20
    assert before < peak_memory()
    assert len(held) == 64 << 20


@pytest.mark.parametrize("option", ["depth=3", "layer=deep", "layer"])
def test_a_benchmark_refuses_parameters_that_it_lacks(
    option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "train-vs-saelens", option])
    assert command.main() == 2
    assert "it takes: layer=5, steps=50, wide_steps=24" in capsys.readouterr().err


def test_a_benchmark_takes_numbers_and_says_its_figures_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(layer: int = 5) -> dict[str, dict[str, object]]:
        return {"layer": {"value": layer, "unit": "", "target": None}}

    monkeypatch.setattr("bench.scaling.run", run)
    monkeypatch.setattr(sys, "argv", ["bench", "scaling", "layer=7", "--json"])
    assert command.main() == 0
    assert json.loads(capsys.readouterr().out)["figures"]["layer"]["value"] == 7
