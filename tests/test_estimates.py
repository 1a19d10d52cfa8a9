"""How long it will take: arithmetic checked by hand."""

import pytest

from sae_core.config import HarvestConfig, HeadsStudy, InductionStudy, RowsConfig, Site, TrainConfig
from sae_core.progress import Progress
from server.doctor import needs, sweep_needs
from server.estimates import (
    Clock,
    Shape,
    Speed,
    Swept,
    harvest_seconds,
    heads_seconds,
    induction_seconds,
    scan_seconds,
    sweep_seconds,
    train_seconds,
)
from server.terminal import duration

SHAPE = Shape(d_model=576, n_layers=30, n_heads=9, d_head=64, d_vocab=49152)
SPEED = Speed(1e11, 4e11)


def config(tokens: int = 1_048_576, **changes: object) -> TrainConfig:
    return TrainConfig(model="m", corpus="c", site=Site(layer=17), rows=RowsConfig(tokens=tokens), **changes)  # type: ignore[arg-type]


def test_twice_the_tokens_take_twice_the_time_to_collect_and_train() -> None:
    one, two = (train_seconds(config(tokens), SHAPE, SPEED) for tokens in (2**20, 2**21))
    assert two["collect"] == pytest.approx(2 * one["collect"])
    assert two["train"] == pytest.approx(2 * one["train"])


def test_a_faster_machine_is_expected_to_be_faster() -> None:
    slow, fast = (sum(train_seconds(config(), SHAPE, speed).values()) for speed in (SPEED, Speed(4e11, 16e11)))
    assert fast < 0.5 * slow


def test_a_sweep_of_rows_on_disk_spares_the_model() -> None:
    cached, fresh = (
        harvest_seconds(HarvestConfig(), [Swept(17, 4608, 32)], RowsConfig(), SHAPE, SPEED, cached=cached)["scan"]
        for cached in (True, False)
    )
    assert cached < fresh


def test_saes_swept_together_share_the_pass_of_the_deepest() -> None:
    one, other = Swept(3, 4608, 32), Swept(17, 4608, 32)
    shallow, deep, both = (
        harvest_seconds(HarvestConfig(), saes, RowsConfig(), SHAPE, SPEED, cached=False)
        for saes in ([one], [other], [one, other])
    )
    assert both["scan"] < shallow["scan"] + deep["scan"]
    assert both["features"] == pytest.approx(shallow["features"] + deep["features"])
    assert both["write"] == pytest.approx(2 * deep["write"])


def test_runs_on_one_stream_share_a_pass_as_deep_as_the_deepest_and_add_up_their_steps() -> None:
    shallow, deep = config(k=8), config(k=16).model_copy(update={"site": Site(layer=29)})
    alone = [train_seconds(run, SHAPE, SPEED) for run in (shallow, deep)]
    both = sweep_seconds([shallow, deep], SHAPE, SPEED)
    assert both["collect"] == alone[1]["collect"] > alone[0]["collect"]
    assert both["prepare"] == alone[0]["prepare"]
    for phase in ("train", "evaluate", "harvests"):
        assert both[phase] == pytest.approx(alone[0][phase] + alone[1][phase])


def test_runs_on_one_stream_share_its_disk_layer_by_layer() -> None:
    one, same, other = config(), config(seed=1), config().model_copy(update={"site": Site(layer=3)})
    pool = 2**20 * SHAPE.d_in * 2  # bf16
    rows = 4 * (2**20 + 65_536)
    alone = needs(one, SHAPE, SPEED).disk
    assert sweep_needs([one], SHAPE, SPEED).disk == alone
    assert sweep_needs([one, same], SHAPE, SPEED).disk == pytest.approx(2 * alone - pool - rows)
    assert sweep_needs([one, other], SHAPE, SPEED).disk == pytest.approx(2 * alone - rows)


def test_a_cache_with_a_name_keeps_every_pool_and_float32_takes_twice_the_room() -> None:
    pool = 2**18 * SHAPE.d_in * 2  # bf16
    own = needs(config(pool_tokens=2**18), SHAPE, SPEED)
    assert needs(config(pool_tokens=2**18, cache="kept"), SHAPE, SPEED).disk == pytest.approx(own.disk + 3 * pool)
    full = needs(config(pool_tokens=2**18, model_dtype="float32"), SHAPE, SPEED)
    assert (full.disk - own.disk, full.memory - own.memory) == pytest.approx((pool, pool))


def follow(clock: Clock, *reports: tuple[float, str, int]) -> float:
    """Seconds left after these reports of (time, phase, percent done)."""
    left = 0.0
    for when, phase, done in reports:
        left = clock.at_time(Progress(phase, done, 100), when)
    return left


def test_before_anything_is_measured_the_expectation_counts() -> None:
    assert follow(Clock({"collect": 10, "train": 20}), (0, "collect", 0)) == pytest.approx(30)


def test_a_measured_phase_replaces_its_expectation_and_corrects_the_rest() -> None:
    # 50 % of collecting took 20 s where 5 were expected: 20 more, and training takes four times what was thought.
    left = follow(Clock({"collect": 10, "train": 20}), (0, "collect", 0), (20, "collect", 50))
    assert left == pytest.approx(20 + 80)


def test_what_an_earlier_attempt_did_is_not_taken_for_speed() -> None:
    # It resumes at 80 % and does 10 % in 10 s: 10 s are left, not 1.
    assert follow(Clock({"train": 20}), (0, "train", 80), (10, "train", 90)) == pytest.approx(10)


def test_phases_that_take_turns_are_timed_apart() -> None:
    clock = Clock({"collect": 10, "train": 10})
    follow(clock, (0, "collect", 0), (10, "collect", 50), (10, "train", 0), (14, "train", 50))
    left = follow(clock, (14, "collect", 50), (24, "collect", 100))
    assert left == pytest.approx(4)  # the other half of training


def test_a_phase_that_nobody_expected_leaves_the_others_to_come() -> None:
    assert follow(Clock({"scan": 30, "visit": 10}), (0, "prepare", 0)) == pytest.approx(40)


def test_nothing_is_left_at_the_end() -> None:
    assert follow(Clock({"a": 5, "b": 5}), (0, "a", 0), (5, "a", 100), (5, "b", 0), (9, "b", 100)) == pytest.approx(0)


@pytest.mark.parametrize(("seconds", "said"), [(None, ""), (12.4, "12 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")])
def test_durations_are_said_as_people_say_them(seconds: float | None, said: str) -> None:
    assert duration(seconds) == said


def test_a_study_of_every_head_costs_a_product_with_the_vocabulary_for_each() -> None:
    every, some = (heads_seconds(HeadsStudy(model="m", layers=layers), SHAPE, SPEED) for layers in ("all", (0, 1, 2)))
    assert every["weights"] == pytest.approx(10 * some["weights"]), "3 layers of 30"
    assert set(every) == {"random", "weights"}
    assert "text" in heads_seconds(HeadsStudy(model="m", corpus="c"), SHAPE, SPEED)


def test_a_study_costs_what_it_reads_as_deep_as_it_reads() -> None:
    assert scan_seconds(2000, 5, SHAPE, SPEED) - 1 == pytest.approx(2 * (scan_seconds(1000, 5, SHAPE, SPEED) - 1))
    every = induction_seconds(InductionStudy(model="m", corpus="c"), SHAPE, SPEED)
    first = induction_seconds(InductionStudy(model="m", corpus="c", layers=(2,)), SHAPE, SPEED)
    assert first["text"] == pytest.approx(every["text"] / 10), "3 layers of 30"
    assert first["synthetic"] == every["synthetic"], "which goes to the final norm"
    assert set(induction_seconds(InductionStudy(model="m"), SHAPE, SPEED)) == {"synthetic"}
