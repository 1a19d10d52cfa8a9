"""What a harvest costs beside the bare model: first pass, visit, bookkeeping, all layers at once, and bytes in the database.

The yardstick is the model's own forward as Transformers runs it, all layers, logits made and thrown away, no cache of keys
and values, over the same rows in the same precision (`auto`, what a harvest would choose here; printed). Every pass takes
its turn in each round; figures are medians of the rounds' ratios of wall time.

`one_layer_vs_forward` is the scan of one SAE (the demo's: layer 17 of 30, 4,608 features), reading z from the model, tallying,
and writing the tally. `with_visit_vs_forward` adds choosing and the visit in fp32 with v and pattern, as a harvest does that is
too long to keep what enters the layer (`kept_gb`); `kept_vs_forward` is the whole of one that keeps it, as one of this size does
by itself. `visited_share` is the share of rows visited: near 1 where features have more examples than there are rows, as here.
`bookkeeping_share` is everything in the scan but model pass and encoder (head sums, counts, histograms, what is kept), over
the model pass; the first shard is warm-up. `all_layers_per_layer` is the scan of SAEs of all 30 layers in one pass, per
layer. But for layer 17 those are not trained: `sae_core.rates.made_sae` mixes them from z of some tokens, and one threshold each
makes 30 of them fire per token, so a scan has as much to do as with trained ones.

`rows=256`, `rounds=3` and `features=500` (of the database's figure) take other sizes. About ten minutes on two cores.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import sae_core.harvest as sweep
from bench import _smollm2, store
from sae_core.config import HarvestConfig
from sae_core.corpus import Rows
from sae_core.lens import Lens
from sae_core.machine import resolve_dtype
from sae_core.rates import made_sae
from sae_core.saes.base import SAE
from sae_core.streams import Streams

Figure = dict[str, object]
Passes = dict[str, Callable[[Path], object]]

TARGETS = {
    "one_layer_vs_forward": "<= 1.3",
    "with_visit_vs_forward": "<= 2",
    "kept_vs_forward": "<= 2",
    "bookkeeping_share": "<= 0.1",
    "all_layers_per_layer": "<= 0.35",
}
SAMPLE = 64
"""Rows from which SAEs of other layers are made."""


def run(rows: int = 256, rounds: int = 3, features: int = 500) -> dict[str, Figure]:
    """All figures."""
    lens = _smollm2.lens()
    sae, text = _smollm2.demo_sae(lens), _smollm2.demo_rows(lens)
    cfg = HarvestConfig(tokens=rows * text.context, shard_rows=max(rows // 2, 1), per_band=5)
    dtype = resolve_dtype(cfg.model_dtype, lens.device)
    print(f"  model passes in {dtype}, {torch.get_num_threads()} threads", file=sys.stderr, flush=True)
    model = AutoModelForCausalLM.from_pretrained(_smollm2.folder(), dtype=dtype).eval()
    saes = {sae.cfg.site.layer: sae} | made_saes(lens, sae, text)
    every = [saes[layer] for layer in range(lens.info.n_layers)]
    parts: list[dict[str, float]] = []
    visited: list[float] = []

    def one_layer(folder: Path) -> None:
        with _timed(lens, sae) as seconds:
            for number, shard in enumerate(sweep.shards(rows, cfg)):
                if number == 1:
                    seconds.update(dict.fromkeys(seconds, 0.0), all=time.perf_counter())
                _scan(lens, [sae], text, shard, cfg, folder)
            seconds["all"] = time.perf_counter() - seconds["all"]
        parts.append(seconds)

    def visit(folder: Path) -> None:
        visited.append(_visit(lens, sae, text, cfg, folder) / rows)

    passes: Passes = {
        "forward": lambda _: _forward(model, text.train[:rows], cfg.batch_rows),
        "one_layer": one_layer,
        "visit": visit,
        "kept": lambda folder: _kept(lens, sae, text, cfg, folder / "kept"),
        "all_layers": lambda folder: _scan_all(lens, every, text, cfg, folder / "every"),
    }
    times = _in_turns(passes, rounds)
    one, both = _ratio(times, "one_layer"), [a + b for a, b in zip(times["one_layer"], times["visit"], strict=True)]
    found = {
        "one_layer_vs_forward": one,
        "with_visit_vs_forward": _ratio(times | {"both": both}, "both"),
        "kept_vs_forward": _ratio(times, "kept"),
        "visited_share": statistics.median(visited),
        "bookkeeping_share": statistics.median((p["all"] - p["model"] - p["encoder"]) / p["model"] for p in parts),
        "encoder_share": statistics.median(p["encoder"] / p["model"] for p in parts),
        "all_layers_per_layer": _ratio(times, "all_layers") / len(every),
    }
    figures = {name: _figure(value, "" if "share" in name else "x", TARGETS.get(name)) for name, value in found.items()}
    figures["forward"] = _figure(rows * text.context / statistics.median(times["forward"]), "tokens/s", None)
    return figures | {"bytes_per_feature": store.bytes_per_feature(lens, sae, features)}


def _figure(value: float, unit: str, target: str | None) -> Figure:
    return {"value": float(f"{value:.4g}"), "unit": unit, "target": target}


def _in_turns(passes: Passes, rounds: int) -> dict[str, list[float]]:
    """Wall seconds of each pass in each round, a first round of warm-up left out. A round's passes share a folder."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(rounds + 1):
        with tempfile.TemporaryDirectory(prefix="headscope-bench-") as folder:
            for name, once in passes.items():
                begun = time.perf_counter()
                once(Path(folder))
                if turn:
                    times[name].append(time.perf_counter() - begun)
                print(f"  round {turn}, {name}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    return times


def _ratio(times: dict[str, list[float]], name: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times["forward"], strict=True))


# ---------------------------------------------------------------------------------------------------------------- passes


@torch.no_grad()
def _forward(model: Any, tokens: Any, at_once: int) -> None:
    for low in range(0, len(tokens), at_once):
        model(input_ids=torch.from_numpy(tokens[low : low + at_once].astype(np.int64)), use_cache=False)


def _scan(
    lens: Lens,
    saes: Sequence[SAE],
    rows: Rows,
    shard: range,
    cfg: HarvestConfig,
    folder: Path,
    streams: Streams | None = None,
) -> None:
    paths = [files.shard(shard) for files in sweep.files_of(folder, len(saes))]
    _smollm2.finished(sweep.scan_shard(lens, saes, rows, shard, cfg, paths, streams=streams))


def _scan_all(lens: Lens, saes: Sequence[SAE], rows: Rows, cfg: HarvestConfig, folder: Path) -> None:
    for shard in sweep.shards(sweep.swept_rows(rows, cfg), cfg):
        _scan(lens, saes, rows, shard, cfg, folder)


def _kept(lens: Lens, sae: SAE, rows: Rows, cfg: HarvestConfig, folder: Path) -> None:
    """Scan, choose and visit, with what enters the layer kept."""
    streams = sweep.streams_of(folder, lens, [sae], rows, cfg)
    if streams is None:
        raise RuntimeError(f"nothing is kept of {cfg.tokens} tokens, so this would measure something else")
    for shard in sweep.shards(sweep.swept_rows(rows, cfg), cfg):
        _scan(lens, [sae], rows, shard, cfg, folder, streams)
    _visit(lens, sae, rows, cfg, folder, streams)


def _visit(lens: Lens, sae: SAE, rows: Rows, cfg: HarvestConfig, folder: Path, streams: Streams | None = None) -> int:
    """Choose from the tallies in `folder` and visit; how many rows were visited."""
    (files,) = sweep.files_of(folder, 1)
    shards = sweep.shards(sweep.swept_rows(rows, cfg), cfg)
    selection = sweep.choose([files.shard(shard) for shard in shards], sae, rows, cfg, files.selection)
    for number, part in enumerate(sweep.visit_parts([selection], cfg)):
        _smollm2.finished(sweep.visit(lens, [sae], rows, [selection], part, cfg, [files.part(number)], streams))
    return len(sweep.visited_rows([selection]))


@contextmanager
def _timed(lens: Lens, sae: SAE) -> Iterator[dict[str, float]]:
    """Seconds spent in model passes and in the encoder, while a scan runs; `all` is the caller's."""
    seconds = {"all": time.perf_counter(), "model": 0.0, "encoder": 0.0}

    def timed(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            found = call(*args, **kwargs)
            seconds[name] += time.perf_counter() - begun
            return found

        return timing

    with (
        mock.patch.object(lens, "read_z", timed(lens.read_z, "model")),
        mock.patch.object(sae, "encode_sparse", timed(sae.encode_sparse, "encoder")),
    ):
        yield seconds


# ------------------------------------------------------------------------------------------------- SAEs of other layers


def made_saes(lens: Lens, like: SAE, rows: Rows) -> dict[int, SAE]:
    """An SAE for every other layer, of `like`'s shape, out of z of some rows."""
    layers = [layer for layer in range(lens.info.n_layers) if layer != like.cfg.site.layer]
    chunks = np.array_split(rows.train[:SAMPLE], SAMPLE // 16)
    read = [lens.read_z(torch.from_numpy(chunk.astype(np.int64)), layers) for chunk in chunks]
    z = {layer: torch.cat([chunk[layer] for chunk in read]) for layer in layers}
    return {layer: made_sae(lens, layer, z[layer], like.cfg.d_sae, like.cfg.k) for layer in layers}
