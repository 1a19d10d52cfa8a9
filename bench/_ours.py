"""One training run of ours, timed, in a process of its own: `python -m bench._ours '<json>'` (see `main`)."""

import json
import sys
import time
from pathlib import Path

import torch

from bench import _smollm2
from bench._processes import peak_memory
from sae_core.config import RowsConfig, Site, TrainConfig
from sae_core.train import train


def main() -> None:
    """Given layer, expansion, k, steps, batch, context, lr, dtype, heldout_tokens and folder; prints a JSON object.

    `seconds` runs from text to the saved SAE: tokenising, model passes, steps, checkpoint, calibration, saving. The
    model is loaded before it. `phases` splits it by what was reported to be going on; the rest is `end`.
    `cpu` is the processors' time.
    """
    given = json.loads(sys.argv[1])
    folder, context, batch = Path(given["folder"]), given["context"], given["batch"]
    n_rows = -(-given["steps"] * batch // (context - 1))  # as many as give just these steps; row starts are not trained on
    cfg = TrainConfig(
        model=_smollm2.NAME,
        corpus="demo-text",
        site=Site(layer=given["layer"]),
        rows=RowsConfig(context=context, tokens=n_rows * context, heldout_tokens=given["heldout_tokens"]),
        expansion=given["expansion"],
        k=given["k"],
        batch=batch,
        lr=given["lr"],
        model_dtype=given["dtype"],
        step_dtype=given["dtype"],
        harvests=(),
    )
    lens = _smollm2.lens()
    before = peak_memory()
    begun, used = time.perf_counter(), time.process_time()
    rows = _smollm2.rows(lens, cfg.rows, folder / "rows")
    phases = {"prepare": time.perf_counter() - begun, "collect": 0.0, "train": 0.0}
    tokens, mark = 0, time.perf_counter()
    running = train(cfg, lens, rows, folder / "run")
    while True:
        try:
            report = next(running)
        except StopIteration as end:
            sae = end.value
            break
        now = time.perf_counter()
        phases[report.phase] = phases.get(report.phase, 0.0) + now - mark
        tokens, mark = (report.done if report.phase == "train" else tokens), now
    seconds = time.perf_counter() - begun
    used = time.process_time() - used
    phases["end"] = time.perf_counter() - mark
    saved = next((folder / "run").rglob("sae.safetensors"))
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu": used,
                "tokens": tokens,
                "d_sae": sae.cfg.d_sae,
                "phases": phases,
                "peak": peak_memory(),
                "before": before,
                "rows": str(rows.folder),
                "weights": str(saved),
                "max_norm": sae.cfg.max_norm,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
