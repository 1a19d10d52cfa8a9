"""What circuits cost through MLPs: SmolLM2, the demo's SAE, and two small transcoders that are trained on first use.

`fvu_<layer>` is the fraction of the variance of what an MLP adds that its transcoder leaves on eight held-out rows, `l0_<layer>`
the features a token. `whole_s` and `through_s` are processor seconds of a circuit from the last token's likeliest next one,
without and with them, medians of turns; `gap` the largest of the latter's nodes, `followed` how many features of MLPs it takes
apart. The trained transcoders stay in the cache, as folders that `headscope import transcoder` takes.
"""

import statistics
import sys
import time

import torch

from bench import _smollm2
from bench._served import Figure
from bench._transcoder import train
from bench.prompt import TEXT
from sae_core.circuits import LogitRoot, left_by, trace
from sae_core.config import TranscoderFiles
from sae_core.formats.transcoders import fitted, open_transcoder
from server.settings import Settings

LAYERS = {10: False, 13: True}
"""Whether its transcoder has a skip."""
SHARE = 0.0005


def run(turns: int = 5) -> dict[str, Figure]:
    """Each way `turns` times."""
    lens = _smollm2.lens()
    rows, place = _smollm2.demo_rows(lens), Settings().cache / "bench" / "transcoders"
    folders = {layer: place / f"layers.{layer}.mlp" for layer in LAYERS}
    if not all((folder / "cfg.json").exists() for folder in folders.values()):
        print(f"Training two transcoders into {place}; once, some minutes.", file=sys.stderr, flush=True)
        train(_smollm2.folder(), rows, LAYERS, place)
    transcoders = {
        layer: fitted(open_transcoder(folder), lens, TranscoderFiles(location=str(folder))) for layer, folder in folders.items()
    }
    figures: dict[str, Figure] = {}
    for layer, one in transcoders.items():
        left = [left_by(lens, row.tolist(), one) for row in rows.heldout[:8]]
        figures[f"fvu_{layer}"] = {
            "value": round(statistics.mean(fvu for fvu, _ in left), 3),
            "unit": "of the variance",
            "target": None,
        }
        figures[f"l0_{layer}"] = {"value": round(statistics.mean(l0 for _, l0 in left), 1), "unit": "features", "target": None}
    tokens, saes = [lens.row_start, *lens.encode([TEXT])[0]], {17: _smollm2.demo_sae(lens)}
    likeliest = int(lens.read_ending(torch.tensor([tokens]), 0).logits[0, -1].argmax())
    root, seconds = LogitRoot(likeliest, len(tokens) - 1), {False: list[float](), True: list[float]()}
    for through in (False, True) * turns:
        began = time.process_time()
        found = trace(lens, tokens, saes, root, transcoders=transcoders if through else {}, share=SHARE, most=40, widest=25)
        seconds[through].append(time.process_time() - began)
    followed = sum(place.kind == "MLP feature" for place in found.nodes)
    return figures | {
        "whole_s": {"value": round(statistics.median(seconds[False]), 2), "unit": "s", "target": None},
        "through_s": {"value": round(statistics.median(seconds[True]), 2), "unit": "s", "target": None},
        "gap": {"value": found.gap, "unit": "of the parts' sizes", "target": "<= 1e-3"},
        "followed": {"value": followed, "unit": "nodes", "target": None},
    }
