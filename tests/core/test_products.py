"""Products through oneDNN against PyTorch's own, and when they are taken."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_core import products
from tests.core.tiny_models import D_VOCAB, tiny_model


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    products.onednn_is_faster.cache_clear()
    yield
    products.onednn_is_faster.cache_clear()


@pytest.fixture
def other_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with AVX-512 that is not Intel's."""
    monkeypatch.setattr(products, "_maker", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    plain = products._product

    def count(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(1)
        return plain(x, weight, bias)

    monkeypatch.setattr(products, "_product", count)
    return calls


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_pytorchs(bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 70, 5, generator=draw).transpose(0, 1)[::2], torch.randn(9, 5, generator=draw)
    b = torch.randn(9, generator=draw) if bias else None
    torch.testing.assert_close(products._product(x, weight, b), torch.nn.functional.linear(x, weight, b))


@pytest.mark.parametrize(("kind", "linears"), [("llama", 7 * 4 + 1), ("gpt2", 4 * 4 + 1)])
def test_a_model_through_onednn_gives_its_own_logits(kind: str, linears: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(0, D_VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    model: Any = tiny_model(kind)
    with torch.no_grad():
        expected = model(tokens).logits
        products.through_onednn(model)
        calls = counted(monkeypatch)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == linears


def test_gradients_and_other_precisions_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(4, 3)
    products.through_onednn(layer)
    calls = counted(monkeypatch)
    layer(torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert layer.to(torch.bfloat16)(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert calls == []


@pytest.mark.usefixtures("other_maker")
def test_another_makers_processor_takes_onednn() -> None:
    assert products.onednn_is_faster()


@pytest.mark.usefixtures("other_maker")
@pytest.mark.parametrize(
    "changed",
    [
        (products, "_maker", lambda: "GenuineIntel"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "AVX2"),
        (torch.ops, "mkldnn", SimpleNamespace()),
        (products, "_product", lambda *_: torch.zeros(2, 4)),
    ],
    ids=["Intel", "no AVX-512", "taken out of PyTorch", "wrong"],
)
def test_onednn_is_not_taken_where_it_is_no_gain_or_no_help(changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*changed)
    assert not products.onednn_is_faster()
