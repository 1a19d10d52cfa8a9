"""One training of ours, timed, in a process of its own: `python -m bench._ours '<json>'` (see `main`)."""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from bench import _smollm2
from bench._processes import peak_memory
from sae_core.config import RowsConfig, Site, TrainConfig
from sae_core.train import made_by, train_many


def main() -> None:
    """Given layers, expansion, k, steps, batch, context, lr, dtype, heldout_tokens and folder; prints a JSON object.

    `seconds` runs from text to the saved SAE: tokenising, model passes, steps, checkpoint, calibration, saving. The
    model is loaded before it. `phases` splits it by what was reported to be going on; the rest is `end`. `cpu` is the
    processors' time, `step` the median second of a step, each SAE's first left out, `tokens` those of each SAE.
    """
    given = json.loads(sys.argv[1])
    folder, context, batch = Path(given["folder"]), given["context"], given["batch"]
    n_rows = -(-given["steps"] * batch // (context - 1))  # as many as give just these steps; row starts are not trained on
    lens = _smollm2.lens()
    layers = given["layers"] or range(lens.info.n_layers)
    cfgs = [
        TrainConfig(
            model=_smollm2.NAME,
            corpus="demo-text",
            site=Site(layer=layer),
            rows=RowsConfig(context=context, tokens=n_rows * context, heldout_tokens=given["heldout_tokens"]),
            expansion=given["expansion"],
            k=given["k"],
            batch=batch,
            lr=given["lr"],
            model_dtype=given["dtype"],
            step_dtype=given["dtype"],
            harvests=(),
        )
        for layer in layers
    ]
    before = peak_memory()
    begun, used = time.perf_counter(), time.process_time()
    rows = _smollm2.rows(lens, cfgs[0].rows, folder / "rows")
    mark = time.perf_counter()
    phases, times, tokens, run = {"prepare": mark - begun, "collect": 0.0, "train": 0.0}, [], 0, -1
    running = train_many(cfgs, lens, rows, folder / "run")
    while True:
        try:
            report = next(running)
        except StopIteration as end:
            saes = end.value
            break
        now = time.perf_counter()
        phases[report.phase] += now - mark
        if report.phase == "train":
            if (report.run or 0) == run:
                times.append(now - mark)
            run, tokens = report.run or 0, report.done // len(cfgs)
        mark = now
    seconds, used = time.perf_counter() - begun, time.process_time() - used
    phases["end"] = time.perf_counter() - mark
    said = {
        "seconds": seconds,
        "cpu": used,
        "phases": phases,
        "step": statistics.median(times),
        "tokens": tokens,
        "collected": n_rows * context,
        "saes": len(saes),
        "d_sae": saes[0].cfg.d_sae,
        "max_norm": saes[0].cfg.max_norm,
        "peak": peak_memory(),
        "before": before,
        "rows": str(rows.folder),
        "weights": str(made_by(folder / "run", 0) / "sae.safetensors"),
        "dtypes": json.loads((folder / "run" / "run.json").read_text())[:2],
        "lr": given["lr"],
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
