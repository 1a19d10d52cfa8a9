"""What a plan of a harvest is made of: a little of one on a tiny model."""

from collections.abc import Callable

import pytest
import torch

from sae_core import rates as module
from sae_core.config import HarvestConfig
from sae_core.lens import Lens
from sae_core.rates import harvest_rates, made_sae

CFG = HarvestConfig(batch_rows=4, model_dtype="float32")


@pytest.mark.parametrize("k", [1, 8])
def test_a_made_sae_fires_as_often_as_asked(k: int, tiny_lens: Callable[[str], Lens]) -> None:
    lens = tiny_lens("llama")
    z = lens.read_z(torch.randint(1, 200, (8, 30), generator=torch.Generator().manual_seed(0)), [1])[1]
    sae = made_sae(lens, 1, z, 200, k)
    assert len(sae.encode_sparse(z[:, 1:].flatten(0, 1)).value) / (8 * 29) == pytest.approx(k, rel=0.05)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(200))


def test_every_unit_of_a_harvest_is_timed(tiny_lens: Callable[[str], Lens], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEATURES", (20, 120))
    monkeypatch.setattr(module, "ROWS", 8)
    found = harvest_rates(tiny_lens("llama"), 1, 400, 8, 24, CFG)
    assert all(0 < value < 10 for value in (found.read, found.scan, found.visit_row, found.feature))
    assert 0 <= found.example < 1
