"""The model and the text that benchmarks work on: SmolLM2-135M-Instruct and the demo's text, fetched once into the cache."""

import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

from sae_core.config import CorpusSource, ModelSource, RowsConfig
from sae_core.corpus import Rows, prepare_rows
from sae_core.lens import Lens, load_lens
from sae_core.saes.base import SAE, load_sae, save_sae
from sae_core.train import train
from server.demo import MODEL_SHA256, demo_config, fetch_model, fetch_text
from server.settings import Settings

T = TypeVar("T")

NAME = "smollm2-135m-instruct"


def lens() -> Lens:
    """The model on the CPU."""
    cache = Settings().cache
    return load_lens(ModelSource(location=str(fetch_model(cache))), name=NAME, device="cpu", cache=cache)


def folder() -> Path:
    """The same weights as a Hugging Face folder, for peers; `lens` makes it on first use."""
    place = Settings().cache / "models" / MODEL_SHA256
    if not place.is_dir():
        lens()
    return place


def rows(loaded: Lens, cfg: RowsConfig, place: Path) -> Rows:
    """The demo's text as rows of tokens in `place`."""
    making = prepare_rows(
        CorpusSource(location=str(fetch_text(Settings().cache))),
        cfg,
        encode=loaded.encode,
        row_start=loaded.row_start,
        tokenizer_fingerprint=loaded.tokenizer_fingerprint,
        folder=place,
    )
    return finished(making)


def demo_rows(loaded: Lens) -> Rows:
    """The rows that the demo trains on; kept in the cache."""
    return rows(loaded, demo_config(slow=False).rows, Settings().cache / "bench" / "demo-rows")


def demo_sae(loaded: Lens) -> SAE:
    """The demo's SAE, 4,608 features on layer 17; trained on first use, which takes minutes, and kept in the cache."""
    place, cfg = Settings().cache / "bench" / "smollm2-l17", demo_config(slow=False)
    if not (place / "cfg.json").exists():
        print(f"Training the demo's SAE into {place}; once, some minutes.", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="headscope-bench-") as folder:
            save_sae(finished(train(cfg, loaded, demo_rows(loaded), Path(folder) / "run")), place)
    return load_sae(place)


def finished(running: Generator[object, None, T]) -> T:
    """What a generator returns, its reports left aside."""
    while True:
        try:
            next(running)
        except StopIteration as end:
            found: T = end.value
            return found
