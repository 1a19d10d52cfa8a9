"""Training from text to a saved SAE against SAELens 6.54.12: tokens per second, peak memory, and what the SAEs lose.

Same model (SmolLM2-135M-Instruct, the same fp32 weights), same layer's hook_z, same rows of tokens, same d_sae, k, batch
(4,096) and number of steps, BatchTopK on both sides, each run in a fresh process, taken in turns: ours and theirs
alternate, and medians of each are compared.

What is inside the times. Ours: tokenising the demo's text, model passes to disk, steps, the checkpoint, calibration of the
threshold, saving. Theirs: all of `LanguageModelSAETrainingRunner.run()`, so model passes, steps, saving; they are given
our rows as tokens, so that both see the same ones, and spend no time on tokenising. Loading the model is outside both.
SAELens' settings are its defaults but for the buffer, which at its default is too small to start. Their run has AuxK in
it, but no feature is dead to it before 1,000 steps. Precision is fp32 on both sides, except in `speedup_4608_bf16`, where
our model pass and encoder product are in bf16; SAELens stays in fp32, as it is by default.

`speedup` is at d_sae 18,432 and `speedup_4608_*` at 4,608, where also memory (the process' own peak resident memory, its
memory-mapped pool of activations counted) and FVU are compared. For the FVU both SAEs are read in raw z on the same
held-out rows, row starts and norm outliers left out, by the same formula, at the same L0: the one threshold of each is
set anew so that just k features fire per token of these rows. (SAELens' saved threshold is an average that starts at 0
and moves by 1 % a step, so after a short run it is far too low: L0 in the thousands.) Each side is run at three learning rates,
its default among them, and the best of its three SAEs counts; `silent` is the share of their features that fire on none of
these rows.

`layer=17` takes another layer, `steps=50` and `wide_steps=24` other lengths. About 25 minutes on two quiet cores without AMX.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import _smollm2
from bench._peers import peer_python
from bench._processes import measured

if TYPE_CHECKING:
    from torch import Tensor

Figure = dict[str, object]
Run = dict[str, Any]

PEER = ("torch==2.13.0", "sae-lens==6.54.12", "transformer-lens<4")
D_IN, CONTEXT, BATCH, K, HELDOUT_TOKENS = 576, 128, 4096, 32, 65_536
NARROW, WIDE = 8, 32  # expansions: 4,608 and 18,432 features
OUR_LRS = (3e-3, 6e-3, 1.2e-2)  # the first is our default, right for five times as many tokens
THEIR_LRS = (3e-4, 3e-3, 6e-3)  # the first is their default; their decoder's rows may shrink, so that a rate counts for more


def run(layer: int = 5, steps: int = 50, wide_steps: int = 24) -> dict[str, Figure]:
    """Train both in turns, then compare."""
    theirs_python, weights = peer_python("sae-lens", PEER), _smollm2.folder()
    with tempfile.TemporaryDirectory(prefix="headscope-bench-") as place:
        numbered = iter(range(100))

        def ours(expansion: int, n: int, dtype: str, lr: float) -> Run:
            return _say(
                f"ours, {expansion * D_IN} features, {dtype}, learning rate {lr}",
                measured(
                    [sys.executable, "-m", "bench._ours"],
                    layers=[layer],
                    expansion=expansion,
                    k=K,
                    steps=n,
                    batch=BATCH,
                    context=CONTEXT,
                    lr=lr,
                    dtype=dtype,
                    heldout_tokens=HELDOUT_TOKENS,
                    folder=f"{place}/{next(numbered)}",
                ),
            )

        def theirs(expansion: int, n: int, lr: float, rows: str) -> Run:
            return _say(
                f"SAELens, {expansion * D_IN} features, learning rate {lr}",
                measured(
                    [theirs_python, "-P", Path(__file__).with_name("_saelens.py")],
                    model=str(weights),
                    rows=f"{rows}/train.npy",
                    layer=layer,
                    d_sae=expansion * D_IN,
                    k=K,
                    steps=n,
                    batch=BATCH,
                    lr=lr,
                    folder=f"{place}/{next(numbered)}",
                ),
            )

        narrow: dict[str, list[Run]] = {"float32": [], "bfloat16": [], "theirs": []}
        for our_lr, their_lr in zip(OUR_LRS, THEIR_LRS, strict=True):
            narrow["float32"].append(ours(NARROW, steps, "float32", our_lr))
            narrow["theirs"].append(theirs(NARROW, steps, their_lr, narrow["float32"][0]["rows"]))
            narrow["bfloat16"].append(ours(NARROW, steps, "bfloat16", our_lr))
        wide: dict[str, list[Run]] = {"float32": [ours(WIDE, wide_steps, "float32", OUR_LRS[0])], "theirs": []}
        for _ in range(2):
            wide["theirs"].append(theirs(WIDE, wide_steps, THEIR_LRS[0], wide["float32"][0]["rows"]))
            wide["float32"].append(ours(WIDE, wide_steps, "float32", OUR_LRS[0]))
        lost = _lost(narrow, layer)

    speed = {name: _median(narrow[name], _rate) for name in narrow}
    wide_speed = {name: _median(wide[name], _rate) for name in wide}
    peak = {name: _median(narrow[name], lambda done: done["peak"]) for name in narrow}
    return {
        "speedup": _figure(wide_speed["float32"] / wide_speed["theirs"], "x", ">= 3"),
        "speedup_4608_fp32": _figure(speed["float32"] / speed["theirs"], "x", ">= 2"),
        "speedup_4608_bf16": _figure(speed["bfloat16"] / speed["theirs"], "x", ">= 4"),
        "memory_ratio": _figure(peak["float32"] / peak["theirs"], "x", "<= 1"),
        "fvu_ratio": _figure(lost["ours"]["fvu"] / lost["theirs"]["fvu"], "x", "<= 1"),
        "fvu_ours": _figure(lost["ours"]["fvu"], "", None),
        "fvu_ours_bf16": _figure(lost["ours_bf16"]["fvu"], "", None),
        "fvu_theirs": _figure(lost["theirs"]["fvu"], "", None),
        "lr_ours": _figure(lost["ours"]["lr"], "", None),
        "lr_theirs": _figure(lost["theirs"]["lr"], "", None),
        "silent_ours": _figure(lost["ours"]["silent"], "", None),
        "silent_theirs": _figure(lost["theirs"]["silent"], "", None),
        "l0_ours": _figure(lost["ours"]["l0"], "", None),
        "l0_theirs": _figure(lost["theirs"]["l0"], "", None),
        "l0_theirs_as_saved": _figure(lost["theirs"]["l0_as_saved"], "", None),
        "speed_ours_4608_fp32": _figure(speed["float32"], "tokens/s", None),
        "speed_ours_4608_bf16": _figure(speed["bfloat16"], "tokens/s", None),
        "speed_theirs_4608": _figure(speed["theirs"], "tokens/s", None),
        "speed_ours_18432_fp32": _figure(wide_speed["float32"], "tokens/s", None),
        "speed_theirs_18432": _figure(wide_speed["theirs"], "tokens/s", None),
        "peak_ours": _figure(peak["float32"] / 1e6, "MB", None),
        "peak_ours_bf16": _figure(peak["bfloat16"] / 1e6, "MB", None),
        "peak_theirs": _figure(peak["theirs"] / 1e6, "MB", None),
        "peak_ours_18432": _figure(_median(wide["float32"], lambda done: done["peak"]) / 1e6, "MB", None),
        "peak_theirs_18432": _figure(_median(wide["theirs"], lambda done: done["peak"]) / 1e6, "MB", None),
    }


def _rate(done: Run) -> float:
    return float(done["tokens"] / done["seconds"])


def _median(runs: list[Run], of: Callable[[Run], float]) -> float:
    return statistics.median(of(done) for done in runs)


def _figure(value: float, unit: str, target: str | None) -> Figure:
    digits = 0 if value >= 1000 else 1 if value >= 100 else 4
    return {"value": round(value, digits), "unit": unit, "target": target}


def _say(what: str, done: Run) -> Run:
    """Report a run on stderr as it ends, since all of them take minutes; stdout is for figures."""
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in done.get("phases", {}).items())
    print(
        f"  {what}: {_rate(done):,.0f} tokens/s, {done['tokens']:,} in {done['seconds']:.1f} s{f' ({parts})' if parts else ''}, "
        f"processors {done['cpu']:.1f} s, peak {done['peak'] / 1e6:,.0f} MB",
        file=sys.stderr,
        flush=True,
    )
    return done


# ------------------------------------------------------------------------------------------------------ what the SAEs lose


def _lost(runs: dict[str, list[Run]], layer: int) -> dict[str, dict[str, float]]:
    """FVU and L0 of the best SAE of each side, ours in each precision, all at L0 = K."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from sae_core.corpus import Rows

    lens, first = _smollm2.lens(), runs["float32"][0]
    rows = Rows.open(Path(first["rows"]))
    z = torch.cat(
        [
            lens.read_z(torch.from_numpy(part.astype("int64")), [layer])[layer]
            for part in np.array_split(rows.heldout[:], max(len(rows.heldout) // 16, 1))
        ]
    )
    kept = z.norm(dim=-1) <= first["max_norm"]
    kept[:, 0] = False
    z = z[kept]

    for done in runs["theirs"]:  # their z is our z, and their file means to us what it means to them
        sample, tensors = np.load(Path(done["weights"]).with_name("sample.npz")), load_file(done["weights"])
        their_z = torch.from_numpy(sample["z"])
        ours = lens.read_z(torch.from_numpy(rows.train[: len(their_z)].astype("int64")), [layer])[layer]
        _same("z", their_z, ours)
        _same("their reconstruction", torch.from_numpy(sample["rebuilt"]), _rebuilt(tensors, their_z, tensors["threshold"])[0])

    best = {}
    for side, kind in {"ours": "float32", "ours_bf16": "bfloat16", "theirs": "theirs"}.items():
        found = [_at_k(load_file(done["weights"]), z) | {"lr": done["lr"]} for done in runs[kind]]
        for at in found:
            print(
                f"  {side} at learning rate {at['lr']}: FVU {at['fvu']:.4f} at L0 {at['l0']:.1f}, {at['silent']:.1%} silent",
                file=sys.stderr,
            )
        best[side] = min(found, key=lambda at: at["fvu"])
    return best


def _same(what: str, found: "Tensor", expected: "Tensor") -> None:
    gap = float((found - expected).norm() / expected.norm())
    if not gap <= 1e-3:
        sys.exit(f"{what} differs between the two sides by {gap:.1e} of its size, so nothing can be compared.")


def _rebuilt(tensors: "dict[str, Tensor]", z: "Tensor", threshold: "Tensor | float") -> "tuple[Tensor, Tensor]":
    """(z_hat, number of active features per token): both sides' files hold W_enc, b_enc, W_dec, b_dec with this meaning."""
    preacts = (z - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    on = preacts > threshold
    return (preacts.relu() * on) @ tensors["W_dec"] + tensors["b_dec"], (on & (preacts > 0)).sum(-1)


def _at_k(tensors: "dict[str, Tensor]", z: "Tensor") -> dict[str, float]:
    """FVU and L0 on z [n, d_in] with the threshold at which K features fire per token of it; L0 with the saved one."""
    import torch

    from sae_core.measures import Sums

    largest, unseen = [], 0.0  # of each batch four times its share, so that a batch may well have more than the others
    for part in torch.split(z, 2048):
        preacts = (part - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
        largest.append(preacts.flatten().topk(4 * K * len(part)).values)
        unseen = max(unseen, float(largest[-1][-1]))
    threshold = float(torch.cat(largest).topk(K * len(z)).values[-1])
    assert threshold >= unseen, "a batch has more than four times its share of the largest pre-activations"
    sums, active, as_saved = Sums(z.shape[-1]), 0, 0
    silent = torch.ones(tensors["W_enc"].shape[1], dtype=torch.bool)
    for part in torch.split(z, 2048):
        rebuilt, n = _rebuilt(tensors, part, threshold)
        sums.add(part, rebuilt)
        active += int(n.sum())
        as_saved += int(_rebuilt(tensors, part, tensors["threshold"])[1].sum())
        silent &= ((part - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"] <= threshold).all(0)
    silent_share = float(silent.float().mean())
    return {"fvu": sums.fvu(), "l0": active / sums.n, "l0_as_saved": as_saved / sums.n, "silent": silent_share}
