"""Settings of published runs by name, as fields of `TrainConfig`. No torch.

`kissane-gpt2-l0` .. `l11`: the SAEs of Kissane et al. 2024 on GPT-2 Small, from the configs beside their weights: raw z
read under bf16, row starts included, no scaling, b_dec from zero, untied start, L1 by layer, 2e9 tokens of OpenWebText.
A preset is where to begin: anything given beside it wins. Where the published code leaves a choice that matters here
(model processing), ours stays: weights are used as stored, so z holds the value bias, and b_dec takes up the difference.
"""

from typing import Any

PUBLISHED: dict[str, Any] = {
    "arch": "relu",
    "beta1": 0.9,
    "beta2": 0.99,
    "batch": 4096,
    "schedule": "restarts",
    "scaling": False,
    "b_dec_init": "zeros",
    "tied_init": False,
    "l1_warmup": 0.0,
    "resample_steps": 25_000,
    "resample_times": 4,
    "exclude_start": False,
    "sink_norm": None,
    "pool_tokens": 1_572_864,
    "model_dtype": "bfloat16",
    "step_dtype": "float32",
    "checkpoint_steps": 1000,
}
GPT2: dict[int, tuple[int, float, float]] = {
    0: (32, 1.8, 1e-6),
    1: (32, 0.8, 1e-6),
    2: (32, 1.0, 1e-6),
    3: (32, 0.9, 1e-6),
    4: (32, 1.1, 1e-6),
    5: (64, 1.0, 1e-6),
    6: (32, 1.1, 1e-6),
    7: (64, 1.1, 1e-6),
    8: (32, 1.3, 1e-5),
    9: (32, 1.2, 1e-6),
    10: (32, 1.3, 1e-5),
    11: (32, 3.0, 3.16e-6),
}  # by layer: expansion, L1 weight, frequency at or below which a feature is resampled

PRESETS: dict[str, dict[str, Any]] = {
    f"kissane-gpt2-l{layer}": PUBLISHED
    | {
        "model": "gpt2",
        "corpus": "hf:Skylion007/openwebtext",
        "site": {"layer": layer},
        "rows": {"tokens": 2_000_000_000},
        "lr": 1.2e-3,
        "expansion": expansion,
        "l1": l1,
        "dead_frequency": dead,
    }
    for layer, (expansion, l1, dead) in GPT2.items()
}
