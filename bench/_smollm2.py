"""The model and the text that benchmarks work on: SmolLM2-135M-Instruct and the demo's text, fetched once into the cache."""

from pathlib import Path

from sae_core.config import CorpusSource, ModelSource, RowsConfig
from sae_core.corpus import Rows, prepare_rows
from sae_core.lens import Lens, load_lens
from server.demo import MODEL_SHA256, fetch_model, fetch_text
from server.settings import Settings

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
    while True:
        try:
            next(making)
        except StopIteration as end:
            made: Rows = end.value
            return made
