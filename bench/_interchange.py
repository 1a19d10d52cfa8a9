"""Dashboards in and out, each timed in a process of its own without torch. This part of `bench interchange` alone:
`python -m bench._interchange '{"features": 24576}'`.

In: files in SAEDashboard's form, 40 examples a feature of 127 tokens with DFA, drawn at random from as many prompts as
there are features, from reading the first byte to the harvest's publishing, search included. Out: that harvest as SAEDashboard's
batches and as Neuronpedia's bulk files, in a process of its own, and a quarter of it in another, so that memory which grows with
the harvest shows. MB are those of the JSON before compression; memory is what the process holds of its own (RssAnon), not the
database's file, which SQLite maps and the system takes back when others need it.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench._processes import measured, peak_of
from sae_core.config import CorpusSource, HarvestConfig, ModelSource, SAEConfig, Site
from sae_core.records import HarvestTotals
from server.db import Database
from server.exchange import dashboards, written
from server.exchange.reading import Readers
from server.settings import Settings
from server.store import exports, harvests, imports, registry, search
from server.store.saes import find_sae

HEADS, D_HEAD, CONTEXT, TOP, BANDS, PER_BAND, BATCH = 12, 64, 127, 15, 5, 5, 128
PROMPTS_PER_FEATURE = 1  # 24,576 of each by its defaults


def figures(features: int = 2048) -> dict[str, dict[str, object]]:
    """How fast dashboards come in and go out, and what memory the latter takes."""
    with tempfile.TemporaryDirectory(prefix="headscope-bench-") as folder:
        found = _ran("in", Path(folder) / "whole", features) | _ran("out", Path(folder) / "whole")
        _ran("in", Path(folder) / "quarter", features // 4)
        quarter = _ran("out", Path(folder) / "quarter")
    return {
        "import_examples_per_s": {"value": round(found["import"]), "unit": "examples/s", "target": ">= 15000"},
        "dashboards_mb_per_s": {
            "value": round(min(found["saedashboard"], found["neuronpedia"]), 1),
            "unit": "MB/s",
            "target": ">= 20",
        },
        "dashboards_memory_mb": {"value": round(found["peak"] / 1e6), "unit": "MB", "target": "< 200"},
        "dashboards_memory_of_quarter_mb": {"value": round(quarter["peak"] / 1e6), "unit": "MB", "target": None},
    }


def _ran(way: str, folder: Path, features: int = 0) -> dict[str, Any]:
    return measured([sys.executable, "-m", "bench._interchange"], way=way, folder=str(folder), features=features)


def main() -> None:
    """Given what to do, where, and how many features; prints a JSON object. Without what to do, all of it."""
    asked = json.loads(sys.argv[1])
    if "way" not in asked:
        print(json.dumps(figures(asked["features"])))
        return
    folder = Path(asked["folder"])
    settings = Settings(data=folder / "data", cache=folder / "cache").prepare()
    db = Database(settings.url)
    print(json.dumps(into(db, folder, asked["features"]) if asked["way"] == "in" else out_of(db, folder)))
    db.close()


def into(db: Database, folder: Path, features: int) -> dict[str, Any]:
    """Make files and import them: examples a second, and how many."""
    n = make(folder / "theirs", features)
    db.upgrade()
    sae_id = register(db, features)
    begun = time.perf_counter()
    take_in(db, sae_id, folder / "theirs", features)
    return {"import": n / (time.perf_counter() - begun), "examples": n}


def out_of(db: Database, folder: Path) -> dict[str, Any]:
    """Export it in both forms: MB a second of each, and most bytes held."""
    said: dict[str, Any] = {}
    with db.read() as session:
        door = find_sae(session, "bench")
    with peak_of(os.getpid()) as peak:
        for form, write in (("saedashboard", written.saedashboard), ("neuronpedia", written.neuronpedia)):
            begun = time.perf_counter()
            wrote = write(exports.features(db, door), door.sae, folder / "out")
            said[form] = wrote.size / 1e6 / (time.perf_counter() - begun)
            shutil.rmtree(folder / "out")
    return said | {"peak": peak[0]}


def make(folder: Path, features: int) -> int:
    """Batches as SAEDashboard writes them; how many examples."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = [f" word{i}" for i in range(5000)]
    prompts = [[words[i] for i in row] for row in rng.integers(0, len(words), (PROMPTS_PER_FEATURE * features, CONTEXT)).tolist()]
    n = 0
    for number, begin in enumerate(range(0, features, BATCH)):
        made = [_feature(index, prompts, rng) for index in range(begin, min(begin + BATCH, features))]
        n += sum(len(feature["activations"]) for feature in made)
        batch = {"model_id": "bench", "layer": 1, "sae_set": "att-bench", "sae_id_suffix": None, "features": made}
        (folder / f"batch-{number}.json").write_text(json.dumps(batch))
    return n


def _feature(index: int, prompts: Sequence[list[str]], rng: np.random.Generator) -> dict[str, Any]:
    bounds = [(-1.0, 9.0, -1.0)] * TOP + [(float(b), b + 1.0, 0.2) for b in range(BANDS) for _ in range(PER_BAND)]
    activations = []
    for low, high, share in bounds:
        values, dfa = np.zeros(CONTEXT), rng.normal(0, 0.05, CONTEXT).round(3)
        dest = int(rng.integers(3, CONTEXT))
        values[rng.integers(0, CONTEXT, 4)] = rng.random(4)
        values[dest] = 8 + rng.random() if low < 0 else low + rng.random()
        dfa[dest + 1 :] = 0
        tokens = prompts[int(rng.integers(len(prompts)))]
        activations.append(
            {
                "bin_min": low, "bin_max": high, "bin_contains": share, "tokens": tokens, "values": values.round(3).tolist(),
                "qualifying_token_index": dest, "dfa_values": dfa.tolist(), "dfa_maxValue": float(dfa.max()),
                "dfa_targetIndex": dest,
            }
        )  # fmt: skip
    bars = {"values": np.linspace(0.1, 9, 50).round(3).tolist(), "heights": rng.integers(0, 90, 50).tolist()}
    return {
        "feature_index": index, "frac_nonzero": 0.001, "neg_str": [" a"] * 10, "neg_values": [-1.0] * 10, "pos_str": [" b"] * 10,
        "pos_values": [1.0] * 10, "freq_hist_data_bar_values": bars["values"], "freq_hist_data_bar_heights": bars["heights"],
        "logits_hist_data_bar_values": bars["values"], "logits_hist_data_bar_heights": bars["heights"],
        "n_prompts_total": len(prompts), "n_tokens_in_prompt": CONTEXT + 1, "dataset": "bench/text",
        "decoder_weights_dist": [1 / HEADS] * HEADS, "activations": activations,
    }  # fmt: skip


def register(db: Database, features: int) -> int:
    """An SAE of so many features; its id."""
    cfg = SAEConfig(
        arch="relu", d_in=HEADS * D_HEAD, d_sae=features, k=0, n_heads=HEADS, d_head=D_HEAD, site=Site(layer=1), model="bench",
        model_fingerprint="none", processing={}, scale=1.0, max_norm=None, context=CONTEXT,
    )  # fmt: skip
    with db.write() as session:
        model = registry.add_model(session, "bench", ModelSource(location="bench"))
        registry.add_corpus(session, "text", CorpusSource(location="hf:bench/text"))
        return registry.upsert_sae(
            session, job_id="import-bench-1", name="bench", model_id=model.id, config=cfg, metrics={}, folder="none", sha256="0"
        )


def take_in(db: Database, sae_id: int, folder: Path, features: int) -> None:
    """What the job does, without its queue."""
    layout = dashboards.look(folder)
    about = dashboards.About(np.full((features, HEADS), 1 / HEADS, np.float32), [[]] * features)
    with db.write() as session:
        corpus = registry.foreign_corpus(session, None, layout.dataset)
    totals = HarvestTotals(layout.n_tokens, 0, 0, layout.context)
    config = HarvestConfig(window=layout.context).model_dump(mode="json")
    harvest_id = harvests.begin(
        db, sae_id=sae_id, corpus_id=corpus.id, job_id="bench", config=config, totals=totals, fence=search.unfenced
    )
    texts = imports.Texts()
    with Readers(layout, about, layout.parts) as readers:
        for number in layout.parts:
            imports.write_file(db, harvest_id, sae_id, number, readers.chunks(number), texts, search.unfenced)
    imports.write_dead(db, harvest_id, (), search.unfenced)
    imports.count_up(db, harvest_id, search.unfenced)
    search.write(db, harvest_id, search.unfenced)
    harvests.publish(db, harvest_id, 0, search.unfenced)


if __name__ == "__main__":
    main()
