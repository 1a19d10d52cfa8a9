"""What a harvest will take: the laws that its plan follows. `python -m bench harvest-plan` holds it against a real one."""

import pytest

from sae_core.config import HarvestConfig
from sae_core.rates import HarvestRates
from server.harvest_plan import Size, harvest_plan

SIZE = Size(tokens=10_000_000, context=128, d_sae=24_576, k=32, d_in=576, d_model=576, n_heads=9, d_vocab=49_152)
RATES = HarvestRates(read=1e-4, scan=2e-4, visit_row=0.01, example=1e-4, feature=1e-3)
CFG = HarvestConfig()


def changed(**values: int) -> Size:
    return Size(**{**SIZE.__dict__, **values})


def test_time_is_units_times_rates() -> None:
    plan = harvest_plan(CFG, SIZE, RATES)
    assert plan.seconds["scan"] == pytest.approx(10_000_000 * 3e-4)
    examples = 24_576 * (20 + 4 * 3)
    assert plan.seconds["visit"] == pytest.approx(78_125 * 0.01 + examples * 1e-4, rel=1e-3)  # nearly every row holds one
    assert plan.seconds["features"] == pytest.approx(24.576)
    assert harvest_plan(CFG, SIZE, None).seconds == {}


def test_a_sweep_that_keeps_its_streams_passes_once_in_fp32_and_takes_disk() -> None:
    size = changed(tokens=1_000_000)
    kept, twice = (harvest_plan(HarvestConfig(kept_gb=gb), size, RATES) for gb in (4, 0))
    assert kept.seconds["scan"] == pytest.approx(1_000_000 * (0.01 / 128 + 2e-4))
    assert twice.seconds["visit"] - kept.seconds["visit"] == pytest.approx(7812 * 0.01, rel=1e-3)
    assert kept.disk.pop("streams") == 4.0 * 7812 * 128 * 576
    assert kept.disk == twice.disk


def test_more_tokens_cost_time_and_disk_but_no_memory() -> None:
    one, ten = (harvest_plan(CFG, changed(tokens=tokens), RATES) for tokens in (10_000_000, 100_000_000))
    assert ten.seconds["scan"] == pytest.approx(10 * one.seconds["scan"])
    assert ten.seconds["features"] == one.seconds["features"]
    assert one.disk["tallies"] < ten.disk["tallies"] < 11 * one.disk["tallies"]
    assert ten.disk["database"] < 3 * one.disk["database"]  # rows of text, up to one an example
    for name in one.memory:
        assert ten.memory[name] <= one.memory[name]  # a part of the visit holds fewer of as many examples


def test_more_features_cost_all_three() -> None:
    small, large = (harvest_plan(CFG, changed(d_sae=d_sae), RATES) for d_sae in (4_608, 24_576))
    for part in ("seconds", "disk", "memory"):
        ours, theirs = getattr(small, part), getattr(large, part)
        assert all(ours[name] <= theirs[name] for name in ours)
    assert small.peak < large.peak
