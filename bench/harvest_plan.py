"""Whether `doctor` plans a harvest right: time, disk and memory of a plan over those of a real harvest of part of its tokens.

A made SAE (`sae_core.rates`) of 24,576 features, 32 of them active on a token, at SmolLM2's layer 17, is harvested over
`rows=256` rows of the demo's text, in a process of its own. The plan of that very size is made from rates measured just before,
as `headscope doctor --features 24576 --measure` does, given how many examples and live features were found: over so few tokens
features have fewer than they may, or none. Nothing is kept of the streams, as of a sweep too long for the disk. `time` compares
the sum over the phases, whose own ratios follow. `planned_10m` is what the plan says of 10M tokens, whose visit goes to far more
rows with far fewer examples each, so that it cannot be worked out from the short one's. Memory is what the process holds at most
beside what it held before the harvest. About five minutes on two cores.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import torch

from bench import _smollm2
from bench._processes import forget_peak, peak_memory
from sae_core.config import HarvestConfig
from sae_core.harvest import Files, choose, features, scan_shard, shards, swept_rows, visit, visit_parts
from sae_core.rates import harvest_rates, made_sae
from server.harvest_plan import Size, harvest_plan

LAYER, FEATURES, K = 17, 24_576, 32
LONG = 10_000_000


def run(rows: int = 256) -> dict[str, dict[str, object]]:
    """Ratios of planned to measured; 1 is right."""
    lens = _smollm2.lens()
    text = _smollm2.demo_rows(lens)
    rates = harvest_rates(lens, LAYER, FEATURES, K, text.context, HarvestConfig())
    done = subprocess.run([sys.executable, "-m", "bench.harvest_plan", str(rows)], check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    cfg = HarvestConfig(tokens=found["tokens"], kept_gb=0)
    model = (lens.info.d_in, lens.info.d_model, lens.info.n_heads, lens.info.d_vocab)
    size = Size(found["tokens"], text.context, FEATURES, K, *model)
    plan, long = harvest_plan(cfg, size, rates, found["examples"], found["live"]), Size(**{**size.__dict__, "tokens": LONG})
    memory = ", ".join(f"{name} {value / 1e6:,.0f} MB" for name, value in plan.memory.items())
    print(f"  {found['examples']:,} examples of {found['live']:,} features; planned: {memory}", file=sys.stderr, flush=True)
    seconds = found["seconds"]
    planned = harvest_plan(cfg.model_copy(update={"tokens": LONG}), long, rates).seconds
    wanted = ">= 0.8 and <= 1.2"

    def ratio(value: float, target: str | None = wanted) -> dict[str, object]:
        return {"value": float(f"{value:.3g}"), "unit": "x", "target": target}

    figures = {
        "time": ratio(sum(plan.seconds[name] for name in seconds) / sum(seconds.values())),
        "disk": ratio(sum(plan.disk[name] for name in ("tallies", "choice", "examples")) / found["disk"]),
        "memory": ratio(plan.peak / max(found["memory"].values())),
        "planned_10m": {"value": round(sum(planned.values()) / 60), "unit": "min", "target": None},
    }
    return figures | {name: ratio(plan.seconds[name] / seconds[name], None) for name in seconds}


def measure(rows: int) -> dict[str, object]:
    """A harvest, timed phase by phase; what it took of disk and memory."""
    lens = _smollm2.lens()
    text = _smollm2.demo_rows(lens)
    cfg = HarvestConfig(tokens=rows * text.context, kept_gb=0)
    tokens = torch.from_numpy(text.train[:16].astype("int64"))
    z = lens.read_z(tokens, [LAYER])[LAYER]
    sae = made_sae(lens, LAYER, z, FEATURES, K)
    before = forget_peak()
    seconds: dict[str, float] = {}
    memory: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="headscope-bench-") as name:
        files = Files(Path(name))
        begun = time.perf_counter()

        def ended(phase: str) -> None:
            nonlocal begun
            seconds[phase], memory[phase] = time.perf_counter() - begun, peak_memory() - before
            print(f"  {phase}: {seconds[phase]:.1f} s, {memory[phase] / 1e6:,.0f} MB", file=sys.stderr, flush=True)
            forget_peak()
            begun = time.perf_counter()

        todo = shards(swept_rows(text, cfg), cfg)
        for shard in todo:
            deque(scan_shard(lens, [sae], text, shard, cfg, [files.shard(shard)]), maxlen=0)
        ended("scan")
        chosen = choose([files.shard(shard) for shard in todo], sae, text, cfg, files.selection)
        ended("choose")
        paths = []
        for number, part in enumerate(visit_parts([chosen], cfg)):
            paths.append(files.part(number))
            deque(visit(lens, [sae], text, [chosen], part, cfg, [paths[-1]]), maxlen=0)
        ended("visit")
        table = features(lens, sae, chosen, paths, cfg, files.features)
        ended("features")
        disk = sum(path.stat().st_size for path in Path(name).iterdir() if path != files.features)
    return {
        "seconds": seconds,
        "tokens": cfg.tokens,
        "examples": len(chosen.feature),
        "live": table.totals.n_live,
        "disk": disk,
        "memory": memory,
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
