"""What a run holds in memory: each part by hand, and against what the code that it describes makes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_core import lens
from sae_core.config import HarvestConfig, RowsConfig, Site, TrainConfig
from sae_core.errors import UnreadableModel
from sae_core.saes import RECIPES
from sae_core.sizes import ModelSizes
from server import doctor, memory
from server.memory import plan
from server.settings import Settings
from tests.core.tiny_models import save_tiny

# 4 layers, 8 heads of 16 (d_in 128) that share 4 keys, a stream of 64, an MLP of 256, 1000 tokens.
SIZES = ModelSizes(parameters=1_000_000, n_layers=4, n_heads=8, n_kv_heads=4, d_head=16, d_model=64, d_mlp=256, d_vocab=1000)


def config(**changes: Any) -> TrainConfig:
    given = {"rows": RowsConfig(context=128), "collect_rows": 10, "batch": 512, "harvests": (HarvestConfig(batch_rows=2),)}
    return TrainConfig.model_validate({"model": "m", "corpus": "c", "site": Site(layer=1), "expansion": 4} | given | changes)


def test_float32_parts_are_those_counted_by_hand() -> None:
    found = plan(config(), SIZES, half_pass=False, half_step=False)
    assert found.model == {"float32 weights": 4_000_000}
    assert found.collecting == {"pass": 4 * 1280 * (3 * 64 + 3 * 256), "z": 4 * 1280 * 128}
    assert found.all_layers == 4 * 4 * 1280 * 128
    sae = 4 * (2 * 128 * 512 + 512 + 128)
    step = 4 * 512 * (3 * 512 + 3 * 128)
    assert found.training == {"SAE": sae, "gradients": sae, "Adam's moments": 2 * sae, "step": step}
    # 2^26 logits are 524 rows of 128 x 1000; each is held with its log probability.
    assert found.measuring == {"SAE": sae, "logits": 2 * 4 * 524 * 128_000}
    assert found.visiting == {"SAE": sae, "visit": 4 * 256 * (3 * 64 + 5 * 128), "patterns": 3 * 4 * 2 * 8 * 128 * 128}
    assert found.peak == 4_000_000 + sum(found.measuring.values())


def test_bfloat16_halves_the_pass_and_adds_its_copies() -> None:
    exact, half = (plan(config(), SIZES, half_pass=on, half_step=on) for on in (False, True))
    assert half.model == exact.model | {"bfloat16 weights": 2_000_000}
    assert {name: 2 * size for name, size in half.collecting.items()} == exact.collecting
    assert 2 * half.all_layers == exact.all_layers
    assert half.training == exact.training | {"bfloat16 encoder": 2 * 128 * 512}


def test_all_layers_raise_the_peak_where_collecting_is_the_largest() -> None:
    many = SIZES._replace(n_layers=10_000)
    found = plan(config(), many, half_pass=False, half_step=False)
    assert found.peak_all == 4_000_000 + found.collecting["pass"] + 10_000 * found.collecting["z"]
    assert found.peak < found.peak_all
    few = plan(config(), SIZES, half_pass=False, half_step=False)
    assert few.peak_all == few.peak  # measuring is the larger there


def test_the_peak_is_the_model_and_the_largest_of_what_takes_turns() -> None:
    long = plan(config(rows=RowsConfig(context=4096), batch=4096), SIZES, half_pass=False, half_step=False)
    assert long.peak == 4_000_000 + sum(long.visiting.values())
    wide = plan(config(expansion=256, batch=8192), SIZES, half_pass=False, half_step=False)
    assert wide.peak == 4_000_000 + sum(wide.training.values())


def test_attention_is_the_widest_point_where_heads_are() -> None:
    wide = SIZES._replace(d_mlp=10)
    assert plan(config(), wide, half_pass=False, half_step=False).collecting["pass"] == 4 * 1280 * (3 * 64 + 2 * 12 * 16)


@pytest.mark.parametrize("arch", sorted(RECIPES))
def test_an_saes_size_is_that_of_the_parameters_in_training(arch: str) -> None:
    cfg = config(arch=arch)
    recipe = RECIPES[cfg.arch](cfg, 128, torch.device("cpu"), torch.float32)
    expected = sum(4 * p.numel() for p in recipe.parameters.values())
    assert plan(cfg, SIZES, half_pass=False, half_step=False).training["SAE"] == expected


def test_logits_are_split_as_the_lens_splits_them() -> None:
    assert memory.LOGITS_AT_ONCE == lens.LOGITS_AT_ONCE


def test_doctor_plans_for_a_folder_without_weights_and_for_two_billion(tmp_path: Path) -> None:
    folder = save_tiny("qwen3", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    settings = Settings(data=tmp_path / "data", cache=tmp_path / "cache")
    found = doctor.report(settings, config(model=str(folder), model_dtype="bfloat16"), probe=False)
    own, example = found["memory"]
    assert own["sizes"]["parameters"] == 61_984
    assert own["parts"]["model"] == {"float32 weights": 4 * 61_984, "bfloat16 weights": 2 * 61_984}
    assert example["model"] == "gemma-2-2b"
    assert example["parts"]["model"]["float32 weights"] == 4 * example["sizes"]["parameters"] > 8e9
    text = "\n".join(" ".join(line) for line in doctor.lines(found))
    assert "gemma-2-2b, 2.61B parameters, on a GPU" in text
    assert "float32 weights 10.5 GB, bfloat16 weights 5.2 GB" in text
    assert "fits into the" in text


def test_doctor_says_when_a_gpu_is_too_small(tmp_path: Path) -> None:
    found = doctor.report(Settings(data=tmp_path / "data"), config(), probe=False)
    for free, verdict in ((16e9, "is too much for the 16.0 GB free on cuda:0"), (80e9, "fits into the 80.0 GB free on cuda:0")):
        found["devices"] = [{"name": "cuda:0", "label": "a GPU", "memory": free, "free": free}]
        assert verdict in doctor.lines(found)[-1][1]


def test_doctor_without_the_models_config_plans_for_two_billion(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path / "data", cache=tmp_path / "cache")
    (only,) = doctor.report(settings, config(), probe=False)["memory"]
    assert only["model"] == "gemma-2-2b"


def test_doctor_refuses_a_folder_whose_config_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnreadableModel, match=r"cannot be told from its config\.json"):
        doctor.report(Settings(data=tmp_path / "data"), config(model=str(tmp_path)), probe=False)
