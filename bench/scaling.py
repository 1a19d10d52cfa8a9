"""How training's speed and memory go with the number of features, of layers and of tokens; prints docs/performance.md's tables.

SmolLM2-135M-Instruct, batch 4,096, k = 32, context 128, in the precisions that `auto` chooses here (they are printed).
Each line of a table is a process of its own that trains by `train_many` for a few steps: its model pass in tokens per
second, its steps in tokens per second (the median step; one SAE's), and the process' own peak resident memory, in which
the memory-mapped activations count. `all in` is what a long run comes to: 1 / (1 / pass + layers / steps), that is text
tokens per second when every token is passed once and trained on once by each layer's SAE.

Figures: `time_per_token_vs_features`, how much longer a token's step takes with 16 times the features, as a share of 16;
`time_vs_tokens`, how much longer passes and steps take for four times the tokens, as a share of four. Both should be 1 or
less, give or take noise. `memory_all_layers_vs_one` and `pass_all_layers_vs_last` compare
all layers' SAEs in one run with the last layer's alone.

`steps=6` is the length of a line's run, `layer=17` the layer of the lines that have one. About eight minutes on two quiet
cores.
"""

import functools
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import _smollm2
from bench._processes import measured

D_IN, CONTEXT, BATCH = 576, 128, 4096
WIDTHS = (7, 14, 28, 57, 114)  # expansions: 4,032 to 65,664 features
LAYERS = 30


def run(layer: int = 17, steps: int = 6) -> dict[str, dict[str, object]]:
    """Measure, print the tables, and say how the cost goes."""
    _smollm2.folder()  # fetched and converted before anything is timed
    widths = [_run(steps, [layer], expansion) for expansion in WIDTHS]
    few = [layer - i * (layer // 4) for i in (3, 2, 1, 0)]
    depths = [_run(steps, layers, 8) for layers in ([LAYERS - 1], few, [])]
    short, long = _run(8, [layer], 8), _run(32, [layer], 8)
    _print_tables(widths, depths, layer)
    per_token = widths[-1]["step"] / widths[0]["step"] / (WIDTHS[-1] / WIDTHS[0])
    tokens = _work(long) / _work(short) / (long["tokens"] / short["tokens"])
    return {
        "time_per_token_vs_features": {"value": round(per_token, 3), "unit": "x", "target": "<= 1.1"},
        "time_vs_tokens": {"value": round(tokens, 3), "unit": "x", "target": "<= 1.1"},
        "memory_all_layers_vs_one": {"value": round(depths[2]["peak"] / depths[0]["peak"], 3), "unit": "x", "target": None},
        "pass_all_layers_vs_last": {"value": round(_passed(depths[0]) / _passed(depths[2]), 3), "unit": "x", "target": None},
    }


def _run(steps: int, layers: list[int], expansion: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="headscope-bench-") as place:
        done = measured(
            [sys.executable, "-m", "bench._ours"],
            layers=layers,
            expansion=expansion,
            k=32,
            steps=steps,
            batch=BATCH,
            context=CONTEXT,
            lr=3e-3,
            dtype="auto",
            heldout_tokens=0,
            folder=place,
        )
    print(f"  {done['saes']} x {done['d_sae']:,}: {done['seconds']:.1f} s", file=sys.stderr, flush=True)
    return done


def _passed(done: dict[str, Any]) -> float:
    """Tokens per second of the model pass, writing z to disk included."""
    return float(done["collected"] / done["phases"]["collect"])


def _stepped(done: dict[str, Any]) -> float:
    """Tokens per second of one SAE's steps."""
    return BATCH / float(done["step"])


def _work(done: dict[str, Any]) -> float:
    """Seconds of what grows with the tokens: passes, and steps at their median."""
    return float(done["phases"]["collect"] + done["tokens"] / BATCH * done["step"])


def _all_in(done: dict[str, Any]) -> float:
    return 1 / (1 / _passed(done) + done["saes"] / _stepped(done))


def _print_tables(widths: list[dict[str, Any]], depths: list[dict[str, Any]], layer: int) -> None:
    """Markdown, as it stands in docs/performance.md, on stderr: stdout is for figures."""
    say = functools.partial(print, file=sys.stderr, flush=True)
    model, step = widths[0]["dtypes"]
    say(f"\n{_machine()}, {widths[0]['threads']} threads, {datetime.now(UTC):%Y-%m-%d}; pass {model}, step {step}.\n")
    say(f"| Features (layer {layer}) | step, tokens/s | ns per token and feature | all in, tokens/s | peak memory, MB |")
    say("|---:|---:|---:|---:|---:|")
    for done in widths:
        cost = done["step"] / BATCH / done["d_sae"] * 1e9
        say(f"| {done['d_sae']:,} | {_stepped(done):,.0f} | {cost:.1f} | {_all_in(done):,.0f} | {done['peak'] / 1e6:,.0f} |")
    say("\n| Layers (4,608 features each) | pass, tokens/s | step, tokens/s | all in, tokens/s | peak memory, MB |")
    say("|---|---:|---:|---:|---:|")
    for name, done in zip(("1, the last", f"4, to layer {layer}", f"all {LAYERS}"), depths, strict=True):
        say(f"| {name} | {_passed(done):,.0f} | {_stepped(done):,.0f} | {_all_in(done):,.0f} | {done['peak'] / 1e6:,.0f} |")
    say()


def _machine() -> str:
    """The processor as the system names it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()
